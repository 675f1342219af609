"""OmniRetriever-7B in JAX: embeddings of text, video, audio and their combinations, training and evaluation.

The names below are loaded when first used, so that `import omni_jax` costs nothing and needs no accelerator.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from omni_jax.config.public_names import loaded_when_used

__version__ = "0.1.0"

if TYPE_CHECKING:
    from omni_jax import retrieval as retrieval
    from omni_jax.api import OmniRetriever as OmniRetriever
    from omni_jax.api.run import train as train
    from omni_jax.retrieval import evaluate as evaluate
    from omni_jax.retrieval.search import Index as Index
    from omni_jax.train.run_config import TrainConfig as TrainConfig

__all__ = ["Index", "OmniRetriever", "TrainConfig", "__version__", "evaluate", "retrieval", "train"]

__getattr__, __dir__ = loaded_when_used(
    __name__,
    {
        "api": "OmniRetriever",
        "retrieval": "evaluate retrieval",
        "retrieval.search": "Index",
        "train": "train",
        "train.run_config": "TrainConfig",
    },
)


class _Train(ModuleType):
    """The package `omni_jax.train`, which is called to train: the function has the name that the package takes."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        from omni_jax.api.run import train as run

        return run(*args, **options)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "train" and isinstance(value, ModuleType):  # as it is imported
            value.__class__ = _Train
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
