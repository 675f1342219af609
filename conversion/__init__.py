"""PyTorch weights to Flax parameters and back, bit for bit.

to_jax("WAVE-7B", "model", adapter="OmniRetriever-7B")     # writes a converted folder
config, params = load("model")                             # what the encoder takes
to_torch("model", base_out="base", adapter_out="adapter")  # gives the PyTorch folders back

The names below are loaded when first used: who loads a model needs neither the importer nor the exporter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from omni_jax.config.public_names import loaded_when_used

if TYPE_CHECKING:
    from omni_jax.conversion.exporter import to_torch, write_adapter, write_trained
    from omni_jax.conversion.importer import Summary, to_jax
    from omni_jax.conversion.loader import load

__all__ = ["Summary", "load", "to_jax", "to_torch", "write_adapter", "write_trained"]

__getattr__, __dir__ = loaded_when_used(
    __name__,
    {
        "exporter": "to_torch write_adapter write_trained",
        "importer": "Summary to_jax",
        "loader": "load",
    },
)
