"""The device mesh: axes `data`, `fsdp` and `tensor`, and `slice` where there are several slices of a pod."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

SLICE = "slice"
AXES = ("data", "fsdp", "tensor")
BATCH = (SLICE, "data", "fsdp")
"""Mesh axes a batch dimension is split over, those that a mesh has."""


def make_mesh(data: int = 1, fsdp: int | None = None, tensor: int = 1, devices: Sequence[Any] | None = None, slices: int = 1) -> Mesh:
    """Returns a (data, fsdp, tensor) mesh; `fsdp=None` takes the devices that the other axes leave.

    With several slices, the first axis is `slice`: weights lie whole in each, so that only gradients and embeddings cross the slower
    network between them. Sizes are those within a slice.

    Axes are `Auto`: the compiler propagates shardings from the weights and inputs (`jax.make_mesh` alone would make them Explicit).

    Raises:
      ValueError: when the axis sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if fsdp is None:
        fsdp = max(1, len(devices) // (slices * data * tensor))
    if slices * data * fsdp * tensor != len(devices):
        several = f"slices={slices} x " if slices > 1 else ""
        needed = slices * data * fsdp * tensor
        raise ValueError(f"mesh {several}data={data} x fsdp={fsdp} x tensor={tensor} needs {needed} devices, {len(devices)} are here")
    if slices == 1:
        return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    groups = _by_slice(devices, slices)
    array = np.stack([mesh_utils.create_device_mesh((data, fsdp, tensor), devices=group) for group in groups])
    return Mesh(array, (SLICE, *AXES), axis_types=(AxisType.Auto,) * 4)


def device_kind(mesh: Mesh | AbstractMesh) -> str:
    """Returns JAX's name of a mesh's kind of device ("TPU v5 lite"), "" of an abstract mesh that does not say."""
    device = mesh.abstract_mesh.abstract_device
    return device.device_kind if device else ""


def batch_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Returns the axes of BATCH that the mesh has."""
    return tuple(axis for axis in BATCH if axis in mesh.shape)


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Returns into how many parts a batch dimension is split."""
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def use_mesh(mesh: Mesh | AbstractMesh) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which the mesh is set, abstract or not."""
    return jax.set_mesh(mesh) if isinstance(mesh, Mesh) else jax.sharding.use_abstract_mesh(mesh)


@contextlib.contextmanager
def computing_in(dtype: Any, mesh: Mesh | AbstractMesh | None) -> Iterator[None]:
    """Makes float32 mean float32 while the block runs (TPU and GPU multiply at lower precision by default), and sets the mesh, if any."""
    precision = jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")
    with precision, use_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        yield


def _by_slice(devices: Sequence[Any], slices: int) -> list[list[Any]]:
    """Devices by the slice they lie in; where none says so (CPU), consecutive ones are a slice."""
    numbers = sorted({n for d in devices if (n := getattr(d, "slice_index", None)) is not None})
    if len(numbers) <= 1:
        size = len(devices) // slices
        return [list(devices[i * size : (i + 1) * size]) for i in range(slices)]
    groups = [[d for d in devices if d.slice_index == number] for number in numbers]
    if len(groups) != slices or len({len(g) for g in groups}) > 1:
        raise ValueError(f"mesh slices={slices}, but the devices lie in {len(groups)} slices of {[len(g) for g in groups]}")
    return groups
