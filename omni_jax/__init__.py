"""OmniRetriever-7B in JAX: embeddings of text, video, audio and their combinations, training and evaluation.

The names below are loaded when first used, so that `import omni_jax` costs nothing and needs no accelerator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from omni_jax.config.public_names import loaded_when_used

__version__ = "0.1.0"

if TYPE_CHECKING:
    from omni_jax import retrieval as retrieval
    from omni_jax.api import OmniRetriever as OmniRetriever

__all__ = ["OmniRetriever", "__version__", "retrieval"]

__getattr__, __dir__ = loaded_when_used(__name__, {"api": "OmniRetriever", "retrieval": "retrieval"})
