"""What each host reads of the weights when a run starts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from omni_jax.config import ModelConfig
from omni_jax.model import abstract_params, param_axes, rounded_maps
from omni_jax.model.int8 import SCALE
from omni_jax.parallel import partition_spec
from omni_jax.planning.chips import Topology


def host_bytes(config: ModelConfig, mesh: Mesh | AbstractMesh, topology: Topology, bytes_per_value: int = 2) -> dict[str, Any]:
    """Returns the bytes that each host reads, at least and at most, and their text.

    Int8 matrices take a byte a value and their scales four, whatever `bytes_per_value` is. A host reads the part of each array that its
    devices hold, once. Devices are taken in the order of the mesh, so many to a host.
    """
    per_host = topology.devices // topology.hosts
    names, sizes = list(mesh.axis_names), [mesh.shape[name] for name in mesh.axis_names]
    places = np.stack(np.unravel_index(np.arange(math.prod(sizes)), sizes), axis=1)  # (devices, axes)
    hosts = len(places) // per_host
    read = np.zeros(hosts)
    whole = 0
    axes = param_axes(config)
    own: dict[tuple[str, ...], int] = {}
    for path in rounded_maps(config):
        own[(*path, "kernel")], own[(*path, SCALE)] = 1, 4
    for path, leaf in abstract_params(config).items():
        spec = partition_spec(axes[path], leaf.shape, mesh)
        used = [names.index(axis) for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ())]
        ways = math.prod(sizes[axis] for axis in used)
        size = math.prod(leaf.shape) * own.get(path, bytes_per_value)
        whole += size
        shard = np.zeros(len(places), int)
        for axis in used:
            shard = shard * sizes[axis] + places[:, axis]
        for host in range(hosts):
            read[host] += size / ways * len(np.unique(shard[host * per_host : (host + 1) * per_host]))
    least, most = int(read.min()), int(read.max())
    gib = 2.0**30
    text = (
        f"weights       {whole / gib:.2f} GiB in all; each of {hosts} hosts reads {most / gib:.2f} GiB"
        + (f" at most, {least / gib:.2f} at least" if least != most else "")
        + f", {read.sum() / gib:.2f} GiB together (analytic, {'bfloat16' if config.weights == 'float' else config.weights})"
    )
    return {"hosts": hosts, "bytes": whole, "bytes_per_host": most, "bytes_per_host_least": least, "text": text}
