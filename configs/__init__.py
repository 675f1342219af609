"""Experiments as ml_collections configs: one file each, `get_config()` returns it, the command that runs it opens the file."""
