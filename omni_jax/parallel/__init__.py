"""Meshes, logical-axis rules and placing. Knows nothing about the model beyond the names of its axes."""

from omni_jax.parallel.compiler import compiler_options
from omni_jax.parallel.distributed import (
    any_process,
    barrier,
    process_allgather,
    process_allgather_str,
    process_sum,
    run_on_all_processes,
    run_on_process_0,
    start,
)
from omni_jax.parallel.mesh import batch_axes, batch_shards, computing_in, make_mesh, use_mesh
from omni_jax.parallel.rules import RULES, constrain, gather, partition_spec, sharding, writes_gathers
