"""A weight brought together for a product, and its gradient brought back, on eight devices."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from omni_jax.parallel import constrain, gather, make_mesh, partition_spec, use_mesh

pytestmark = pytest.mark.jit

AXES = ("embed", "mlp")
X = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(32, 24)).astype(np.float32)


def loss(w: jax.Array, x: jax.Array, axes: tuple[str, ...] = AXES) -> jax.Array:
    return jnp.sum(jnp.square(constrain(x @ gather(w, *axes), "batch", "mlp")))


def placed(fsdp: int, tensor: int):
    mesh = make_mesh(fsdp=fsdp, tensor=tensor)
    return mesh, *(
        jax.device_put(value, NamedSharding(mesh, partition_spec(axes, value.shape, mesh)))
        for value, axes in ((W, AXES), (X, ("batch", "features")))
    )


@pytest.mark.parametrize(("fsdp", "tensor"), [(8, 1), (4, 2), (1, 8)])
def test_value_and_gradient_are_those_of_one_device(fsdp: int, tensor: int):
    mesh, w, x = placed(fsdp, tensor)
    with use_mesh(mesh):
        value, gradient = jax.jit(jax.value_and_grad(loss))(w, x)
    expected = np.square(X @ W).sum(), 2 * X.T @ (X @ W)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("fsdp", "tensor"), [(8, 1), (4, 2)])
def test_the_weight_comes_together_once_and_its_gradient_goes_back_to_its_shards(fsdp: int, tensor: int):
    mesh, w, x = placed(fsdp, tensor)
    with use_mesh(mesh):
        compiled = jax.jit(jax.grad(loss)).lower(w, x).compile()
    # Forward and backward read one gathered weight, whole along its input and split over tensor; nothing is multiplied in rings.
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", compiled.as_text() or "")
    assert gathered == [f"32,{24 // tensor}"] and "collective-permute" not in (compiled.as_text() or "")
    assert compiled.output_shardings.is_equivalent_to(w.sharding, 2)


@pytest.mark.parametrize("axes", [("fused", "mlp"), ("rank", "mlp")])
def test_what_is_not_split_along_embed_stays_where_it_is(axes: tuple[str, str]):
    """The fusion head's first matrix (686 MiB at 7B) is never whole anywhere."""
    mesh, *_ = placed(8, 1)
    w = jax.device_put(W, NamedSharding(mesh, partition_spec(axes, W.shape, mesh)))
    with use_mesh(mesh):
        traced = jax.jit(lambda w: gather(w, *axes)).trace(w)
    assert not traced.jaxpr.eqns


def test_nothing_happens_without_a_mesh():
    w = jnp.asarray(W)
    assert gather(w, *AXES) is w
