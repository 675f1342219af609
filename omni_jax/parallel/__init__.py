"""Meshes, logical-axis rules and placing. Knows nothing about the model beyond the names of its axes."""

from omni_jax.parallel.distributed import (
    all_do,
    any_process,
    barrier,
    first_does,
    of_every_process,
    start,
    texts_of_every_process,
    total_over_processes,
)
from omni_jax.parallel.mesh import BATCH, batch_axes, batch_shards, make_mesh, use_mesh
from omni_jax.parallel.rules import RULES, constrain, gather, partition_spec, sharding

__all__ = [
    "BATCH",
    "RULES",
    "all_do",
    "any_process",
    "barrier",
    "batch_axes",
    "batch_shards",
    "constrain",
    "first_does",
    "gather",
    "make_mesh",
    "of_every_process",
    "partition_spec",
    "sharding",
    "start",
    "texts_of_every_process",
    "total_over_processes",
    "use_mesh",
]
