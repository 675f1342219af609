"""Meshes, logical-axis rules and placing. Knows nothing about the model beyond the names of its axes."""

from omni_jax.parallel.distributed import any_process, barrier, first_does, start, total_over_processes
from omni_jax.parallel.mesh import BATCH, batch_axes, batch_shards, make_mesh, use_mesh
from omni_jax.parallel.rules import RULES, constrain, partition_spec, sharding

__all__ = [
    "BATCH",
    "RULES",
    "any_process",
    "barrier",
    "batch_axes",
    "batch_shards",
    "constrain",
    "first_does",
    "make_mesh",
    "partition_spec",
    "sharding",
    "start",
    "total_over_processes",
    "use_mesh",
]
