"""PyTorch weights to Flax parameters and back, bit for bit.

to_jax("WAVE-7B", "model", adapter="OmniRetriever-7B")     # writes a converted folder
config, params = load("model")                             # what the encoder takes
to_torch("model", base_out="base", adapter_out="adapter")  # gives the PyTorch folders back
"""

from conversion.exporter import to_torch, write_adapter, write_trained
from conversion.importer import Summary, to_jax
from conversion.loader import load
from conversion.torch_pickle import read_torch_file

__all__ = ["Summary", "load", "read_torch_file", "to_jax", "to_torch", "write_adapter", "write_trained"]
