"""Options of the TPU compiler that the large programs are compiled with, by kind of chip."""

from __future__ import annotations

import os

import jax
from jax.sharding import AbstractMesh, Mesh

from omni_jax.parallel.mesh import device_kind

_V6E = {
    # KiB of on-chip memory that an operation may use. By default the tiles of the MLP's products come out too small.
    "xla_tpu_scoped_vmem_limit_kib": "65536",
    # A layer's weights are gathered while products run, as on v5e without options.
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}
_OPTIONS = {"TPU v6 lite": _V6E}


def compiler_options(mesh: Mesh | AbstractMesh | None) -> dict[str, str]:
    """Returns `compiler_options` of `jax.jit` for programs on a mesh, or on the default device; {} where its chips need none.

    What LIBTPU_INIT_ARGS says about an option holds.
    """
    kind = jax.devices()[0].device_kind if mesh is None else device_kind(mesh)
    given = {word.partition("=")[0].lstrip("-") for word in os.environ.get("LIBTPU_INIT_ARGS", "").split()}
    return {name: value for name, value in _OPTIONS.get(kind, {}).items() if name not in given}
