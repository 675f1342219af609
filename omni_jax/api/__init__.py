"""The Python API. This package and `omni_jax.cli` are the only ones that combine the others."""

from omni_jax.api.retriever import OmniRetriever

__all__ = ["OmniRetriever"]
