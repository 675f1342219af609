"""The Python face. This room and `omni_jax.cli` are the only places that wire rooms together."""

from omni_jax.api.retriever import OmniRetriever

__all__ = ["OmniRetriever"]
