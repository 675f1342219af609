"""Meshes: axis sizes, kinds, and errors."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import AxisType

from omni_jax.parallel import BATCH, make_mesh


def test_axes_are_named_and_automatic():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert set(BATCH) <= set(mesh.axis_names)
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize("data, tensor, fsdp", [(1, 1, 8), (2, 1, 4), (1, 4, 2), (8, 1, 1)])
def test_fsdp_takes_the_devices_that_are_left(data: int, tensor: int, fsdp: int):
    assert make_mesh(data=data, tensor=tensor).shape["fsdp"] == fsdp


def test_some_devices_only():
    mesh = make_mesh(data=1, fsdp=2, tensor=1, devices=jax.devices()[3:5])
    assert list(mesh.devices.flat) == jax.devices()[3:5]


@pytest.mark.parametrize("data, fsdp, tensor", [(3, None, 1), (2, 2, 1), (1, 16, 1), (1, None, 16), (5, None, 2)])
def test_sizes_that_do_not_fit_are_refused(data: int, fsdp: int | None, tensor: int):
    with pytest.raises(ValueError, match=r"mesh data=\d+ x fsdp=\d+ x tensor=\d+ needs \d+ devices, 8 are here"):
        make_mesh(data, fsdp, tensor)
