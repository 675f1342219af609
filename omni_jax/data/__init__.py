"""Manifests, shards and the pipelines that turn records into features. Importing this package loads none of them."""
