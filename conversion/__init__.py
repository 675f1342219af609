"""PyTorch weights to Flax parameters and back, bit for bit.

to_jax("WAVE-7B", "model", adapter="OmniRetriever-7B")     # writes a converted folder
config, params = load("model")                             # what the encoder takes
to_torch("model", base_out="base", adapter_out="adapter")  # gives the PyTorch folders back

The names below are loaded when first used: who loads a model needs neither the importer nor the exporter.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omni_jax.conversion.exporter import to_torch, write_adapter, write_trained
    from omni_jax.conversion.importer import Summary, to_jax
    from omni_jax.conversion.loader import load
    from omni_jax.conversion.torch_pickle import read_torch_file

__all__ = ["Summary", "load", "read_torch_file", "to_jax", "to_torch", "write_adapter", "write_trained"]

_HOME = {
    "to_torch": "exporter",
    "write_adapter": "exporter",
    "write_trained": "exporter",
    "Summary": "importer",
    "to_jax": "importer",
    "load": "loader",
    "read_torch_file": "torch_pickle",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'omni_jax.conversion' has no attribute {name!r}")
    return getattr(importlib.import_module(f"omni_jax.conversion.{_HOME[name]}"), name)
