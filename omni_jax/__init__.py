"""OmniRetriever-7B in JAX: embeddings of text, video, audio and their combinations, training and evaluation.

The names below are loaded when first used, so that `import omni_jax` costs nothing and needs no accelerator.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from omni_jax import retrieval as retrieval
    from omni_jax.api import OmniRetriever as OmniRetriever

_LAZY = {
    "OmniRetriever": ("omni_jax.api", "OmniRetriever"),
    "retrieval": ("omni_jax.retrieval", ""),
}

__all__ = ["OmniRetriever", "__version__", "retrieval"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'omni_jax' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    loaded = importlib.import_module(module)
    return getattr(loaded, attribute) if attribute else loaded


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
