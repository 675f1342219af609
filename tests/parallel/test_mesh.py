"""Meshes: axis sizes, kinds, and errors."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

from omni_jax.parallel import batch_axes, batch_shards, make_mesh, partition_spec


def test_axes_are_named_and_automatic():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert batch_axes(mesh) == ("data", "fsdp") and batch_shards(mesh) == 4
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


def test_slices_are_an_axis_of_their_own():
    mesh = make_mesh(data=1, fsdp=2, tensor=2, slices=2)
    assert dict(mesh.shape) == {"slice": 2, "data": 1, "fsdp": 2, "tensor": 2}
    assert list(mesh.devices[0].flat) == jax.devices()[:4]
    assert batch_axes(mesh) == ("slice", "data", "fsdp") and batch_shards(mesh) == 4
    assert partition_spec(("batch", "features"), (8, 3), mesh) == PartitionSpec(("slice", "data", "fsdp"), None)
    assert partition_spec(("embed", "mlp"), (8, 4), mesh) == PartitionSpec("fsdp", "tensor")  # weights lie whole in each slice


def test_slices_that_do_not_multiply_are_refused():
    with pytest.raises(ValueError, match=r"mesh slices=3 x data=1 x fsdp=2 x tensor=1 needs 6 devices, 8 are here"):
        make_mesh(fsdp=2, slices=3)
