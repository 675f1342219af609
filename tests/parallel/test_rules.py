"""Logical axes to mesh axes: which dimension is split, what stays whole, what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from omni_jax.parallel import RULES, constrain, make_mesh, partition_spec, sharding


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize(
    "axes, shape, spec",
    [
        (("embed", "heads"), (6, 8), ("fsdp", "tensor")),
        (("mlp", "embed"), (4, 6), ("tensor", "fsdp")),
        (("layers", "embed", "mlp"), (3, 6, 4), (None, "fsdp", "tensor")),
        (("fused", "mlp"), (12, 4), ("fsdp", "tensor")),
        (("vocab", "embed"), (10, 6), ("tensor", "fsdp")),
        (("batch", "tokens", "features"), (8, 5, 6), (("data", "fsdp"), None, None)),
        (("batch_data", "fused"), (4, 6), ("data", "fsdp")),
        ((None, "embed"), (4, 6), (None, "fsdp")),
        ((), (), ()),
    ],
)
def test_partition_spec(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...], spec: tuple[object, ...]):
    assert partition_spec(axes, shape, mesh) == PartitionSpec(*spec)


@pytest.mark.parametrize(
    "axes, shape, spec",
    [
        (("embed", "heads"), (5, 8), (None, "tensor")),
        (("embed", "heads"), (6, 7), ("fsdp", None)),
        (("batch", "tokens"), (6, 4), (None, None)),  # 6 rows do not divide over 2 x 2 devices
        (("batch",), (1,), (None,)),
    ],
)
def test_dimensions_that_do_not_divide_stay_whole(mesh: Mesh, axes: tuple[str, ...], shape: tuple[int, ...], spec: tuple[object, ...]):
    assert partition_spec(axes, shape, mesh) == PartitionSpec(*spec)


def test_mesh_axes_of_one_device_are_not_named():
    assert partition_spec(("embed", "heads"), (8, 8), make_mesh(data=8, fsdp=1)) == PartitionSpec(None, None)


def test_an_abstract_mesh_will_do():
    mesh = AbstractMesh((1, 256, 1), ("data", "fsdp", "tensor"))
    assert partition_spec(("embed", "mlp"), (3584, 18944), mesh) == PartitionSpec("fsdp", None)


@pytest.mark.parametrize("axes", [("embed", "embed"), ("heads", "mlp"), ("batch", "fused"), ("batch", "batch_data"), ("vocab", "heads")])
def test_two_dimensions_on_one_mesh_axis_are_refused(mesh: Mesh, axes: tuple[str, str]):
    with pytest.raises(ValueError, match=f"{axes[0]!r} and {axes[1]!r} .*both map to mesh axis"):
        partition_spec(axes, (8, 8), mesh)


def test_collisions_are_refused_even_where_nothing_would_be_split(mesh: Mesh):
    """Otherwise the mistake would wait for a mesh and a width that divide."""
    for shape, on in (((7, 7), mesh), ((8, 8), make_mesh(data=8, fsdp=1))):
        with pytest.raises(ValueError, match="both map to mesh axis"):
            partition_spec(("embed", "embed"), shape, on)


def test_unknown_names_are_refused(mesh: Mesh):
    with pytest.raises(ValueError, match="unknown logical axis 'hedas'"):
        partition_spec(("embed", "hedas"), (8, 8), mesh)


def test_every_dimension_needs_a_name(mesh: Mesh):
    with pytest.raises(ValueError, match="do not fit shape"):
        partition_spec(("embed",), (8, 8), mesh)


def test_rules_name_axes_of_the_mesh(mesh: Mesh):
    targets = {axis for target in RULES.values() for axis in ((target,) if isinstance(target, str) else target or ())}
    assert targets == {"slice", *mesh.axis_names}


def test_sharding_places_shards(mesh: Mesh):
    x = jax.device_put(np.zeros((6, 8)), sharding(("embed", "heads"), (6, 8), mesh))
    assert {s.data.shape for s in x.addressable_shards} == {(3, 4)}


@pytest.mark.jit
def test_constrain_pins_inside_jit_where_a_mesh_is_set(mesh: Mesh):
    @jax.jit
    def double(x: jax.Array) -> jax.Array:
        return constrain(2 * x, "batch", "features")

    with jax.set_mesh(mesh):
        y = double(jnp.ones((8, 3)))
    assert y.sharding.is_equivalent_to(sharding(("batch", "features"), (8, 3), mesh), 2)
    assert {s.data.shape for s in y.addressable_shards} == {(2, 3)}
    assert double(jnp.ones((8, 3))).sharding.is_fully_replicated


@pytest.mark.jit
def test_constrain_without_a_mesh_gives_its_argument():
    x = jnp.ones((3, 3))
    assert constrain(x, "batch", "features") is x
