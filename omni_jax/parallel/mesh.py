"""The device mesh: axes `data`, `fsdp` and `tensor`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
"""Mesh axes a batch dimension is split over."""


def make_mesh(data: int = 1, fsdp: int | None = None, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a (data, fsdp, tensor) mesh; `fsdp=None` takes the devices that the other axes leave.

    Axes are `Auto`: the compiler propagates shardings from the weights and inputs (`jax.make_mesh` alone would make them Explicit).

    Raises:
      ValueError: when the axis sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp is None:
        fsdp = max(1, len(devices) // (data * tensor))
    if data * fsdp * tensor != len(devices):
        raise ValueError(f"mesh data={data} x fsdp={fsdp} x tensor={tensor} needs {data * fsdp * tensor} devices, {len(devices)} are here")
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
