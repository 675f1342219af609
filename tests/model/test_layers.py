"""Lowest rungs: norms, feed-forward, attention, rotary positions, layer stacks, against plain NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni_jax.model import layers, rope
from tests.model import builders, reference, reference_towers
from tests.model.reference import Weights
from tests.tolerances import assert_close

pytestmark = pytest.mark.jit

CFG = builders.ODD.decoder


def test_rms_norm():
    module, w = builders.random_part(lambda: layers.RMSNorm(builders.maker(), 13, 1e-3))
    x = 3 * builders.noise(1, 2, 5, 13)
    assert_close(builders.run(module, x), reference.rms_norm(w, x, 1e-3), "layer")


def test_layer_norm():
    module, w = builders.random_part(lambda: layers.LayerNorm(builders.maker(), 13, 1e-3))
    x = 3 * builders.noise(1, 2, 5, 13) + 7
    assert_close(builders.run(module, x), reference.layer_norm(w, x.astype(np.float64), 1e-3), "layer")


@pytest.mark.parametrize("norm", [layers.RMSNorm, layers.LayerNorm])
def test_norms_keep_bfloat16_but_sum_in_float32(norm: type):
    module = norm(builders.maker(), 4096, 1e-6)
    x = jnp.full((1, 4096), 300.0, jnp.bfloat16).at[:, ::2].mul(-1)
    y = builders.run(module, x)
    assert y.dtype == jnp.bfloat16
    # 4096 squares of 300 summed in bfloat16 would stop growing after 256 of them.
    assert_close(jnp.abs(y.astype(jnp.float32)), np.ones((1, 4096)), "layer")


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool):
    module, w = builders.random_part(lambda: layers.Linear(builders.maker(), 11, 7, ("embed", "mlp"), bias=bias))
    assert ("bias" in w) == bias
    x = builders.noise(2, 3, 11)
    assert_close(builders.run(module, x), reference.linear(w, x), "layer")


@pytest.mark.parametrize("bias", [True, False])
def test_swiglu(bias: bool):
    module, w = builders.random_part(lambda: layers.SwiGLU(builders.maker(), 11, 7, bias=bias))
    x = builders.noise(2, 1, 3, 11)
    assert_close(builders.run(module, x), reference.swiglu(w, x), "layer")


def test_gelu_is_the_exact_form():
    x = np.linspace(-6, 6, 301, dtype=np.float32)
    assert_close(layers.gelu(jnp.asarray(x)), reference.gelu(x.astype(np.float64)), "layer")


def test_attend_with_grouped_heads_is_causal_attention_head_by_head():
    q, k, v = builders.noise(1, 1, 9, 6, 10), builders.noise(2, 1, 9, 2, 10), builders.noise(3, 1, 9, 2, 10)
    mask = np.tril(np.ones((1, 9, 9), bool))
    got = jax.jit(layers.attend)(q, k, v, mask)
    assert_close(got[0], reference.attend_causal(*(x[0].astype(np.float64) for x in (q, k, v))), "layer")


def test_attend_with_a_bias():
    q, k, v = (builders.noise(seed, 1, 7, 3, 6) for seed in (1, 2, 3))
    bias = builders.noise(4, 1, 3, 7, 7)
    got = jax.jit(layers.attend)(q, k, v, np.ones((1, 7, 7), bool), bias)
    assert_close(got[0], reference.attend_all(*(x[0].astype(np.float64) for x in (q, k, v)), bias=bias[0]), "layer")


def test_attend_keeps_its_logits_in_float32():
    """Logits of 128 and 128.5, which bfloat16 would round to the same number, weigh 0.38 and 0.62."""
    q = jnp.full((1, 1, 1, 64), 2, jnp.bfloat16)
    k = jnp.full((1, 2, 1, 64), 8, jnp.bfloat16).at[0, 1, 0, 0].set(10)
    v = jnp.eye(2, 64, dtype=jnp.bfloat16)[None, :, None]
    got = jax.jit(layers.attend)(q, k, v, jnp.ones((1, 1, 2), bool))
    assert got.dtype == jnp.bfloat16
    assert_close(got[0, :, :2].astype(jnp.float32), reference.softmax(np.array([128, 128.5]))[None], "bfloat16_cosine")


@pytest.mark.parametrize("sections", [(1, 1, 3), (2, 0, 3), (0, 5, 0)])
def test_tmrope(sections: tuple[int, int, int]):
    x = builders.noise(1, 1, 12, 6, 10)
    positions = np.random.default_rng(2).integers(0, 60, (3, 1, 12))

    def turned(x: jax.Array, positions: jax.Array) -> jax.Array:
        angles = rope.tmrope_angles(positions, 10, CFG.rope_theta, sections)
        return rope.rotate(x, jnp.cos(angles), jnp.sin(angles))

    want = reference.tmrope(x[0].astype(np.float64), positions[:, 0], CFG.rope_theta, sections)
    assert_close(jax.jit(turned)(x, positions)[0], want, "layer")


def test_rope_of_equal_axes_depends_on_distance_only():
    q, k = builders.noise(1, 1, 1, 1, 10), builders.noise(2, 1, 1, 1, 10)

    def score(at_q: int, at_k: int) -> np.ndarray:
        def turned(x: np.ndarray, at: int) -> jax.Array:
            angles = rope.tmrope_angles(jnp.full((3, 1, 1), at), 10, CFG.rope_theta, (1, 1, 3))
            return rope.rotate(jnp.asarray(x), jnp.cos(angles), jnp.sin(angles))

        return np.asarray(jnp.sum(turned(q, at_q) * turned(k, at_k)))

    assert_close(score(25, 20), score(5, 0), "layer")
    assert abs(score(25, 20) - score(26, 20)) > 1e-3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_halves_exchanged_by_a_product_give_the_same_numbers(dtype: jnp.dtype):
    x, turns = jnp.asarray(builders.noise(1, 2, 5, 3, 16), dtype), builders.noise(2, 2, 5, 8)
    weight = builders.noise(3, 2, 5, 3, 16)

    def rotated(product: bool) -> tuple[jax.Array, jax.Array]:
        def weighed(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = rope.rotate(x, jnp.cos(turns), jnp.sin(turns), product=product)
            return jnp.sum(out.astype(jnp.float32) * weight), out

        gradient, out = jax.grad(weighed, has_aux=True)(x)
        return out, gradient

    for got, want in zip(rotated(True), rotated(False), strict=True):
        assert got.dtype == dtype
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def test_vision_rope():
    x = builders.noise(1, 1, 24, 2, 20)
    places = reference_towers.patch_order(4, 6, 2)

    def turned(x: jax.Array, coords: jax.Array) -> jax.Array:
        angles = rope.vision_angles(coords, 20, 1e4)
        return rope.rotate(x, jnp.cos(angles), jnp.sin(angles))

    want = reference_towers.rope_2d(x[0].astype(np.float64), places, 1e4)
    assert_close(jax.jit(turned)(x, np.asarray(places)[None])[0], want, "layer")


def stacked() -> tuple[layers.Linear, list[Weights], np.ndarray, np.ndarray]:
    """(five maps, their weights, their input, what each adds)."""
    stack, w = builders.random_part(lambda: layers.Linear(builders.maker().stack(5), 6, 6, ("embed", "mlp")))
    each = [Weights({n: a[i] for n, a in w.arrays.items()}) for i in range(5)]
    return stack, each, builders.noise(1, 2, 6), builders.noise(2, 5, 6)


def turn(layer: layers.Linear, x: jax.Array, extra: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = jnp.tanh(layer(x)) + extra
    return y, y.sum(axis=0)


REMATS = [None, jax.checkpoint_policies.nothing_saveable, (jax.checkpoint_policies.nothing_saveable,) * 2 + (None,) * 3]


@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.parametrize(("count", "in_place"), [(None, False), (4, False), (4, True), (0, True)])
def test_scan_runs_a_stack_in_order(remat: layers.Remat, count: int | None, in_place: nnx.filterlib.Filter):
    stack, each, x, extra = stacked()
    last, sums = jax.jit(lambda x, e: layers.scan_layers(stack, turn, x, e, remat, count=count, in_place=in_place))(x, extra)
    want, kept = x.astype(np.float64), []
    for weights, add in zip(each[:count], extra, strict=False):
        want = np.tanh(reference.linear(weights, want)) + add
        kept.append(want.sum(axis=0))
    assert_close(last, want, "layer")
    assert sums.shape == (len(kept), 6)
    assert_close(sums, np.array(kept).reshape(-1, 6), "layer")


def test_neighbours_that_keep_the_same_share_a_loop():
    stack, _, x, extra = stacked()
    again = jax.checkpoint_policies.nothing_saveable

    def loops(remat: layers.Remat) -> list[int]:
        def loss(x: jax.Array) -> jax.Array:
            return jnp.sum(layers.scan_layers(stack, turn, x, extra, remat)[0])

        return [eqn.params["length"] for eqn in jax.make_jaxpr(jax.grad(loss))(x).eqns if eqn.primitive.name == "scan"]

    assert loops((again, again, None, None, None)) == [2, 3, 3, 2] and loops((again,) * 5) == loops(again) == [5, 5]


@pytest.mark.parametrize("remat", REMATS)
def test_one_layer_of_a_stack_runs_alone(remat: layers.Remat):
    stack, each, x, extra = stacked()
    got, _ = jax.jit(lambda x, e: layers.run_layer(stack, 3, turn, x, e, remat))(x, extra[3])
    assert_close(got, np.tanh(reference.linear(each[3], x.astype(np.float64))) + extra[3], "layer")


def test_a_parameter_needs_a_name_for_every_axis():
    with pytest.raises(ValueError, match="do not fit shape"):
        builders.maker().param((3, 4), ("embed",), layers.ZEROS)


def test_stacked_parameters_carry_the_layer_axis():
    module = layers.Linear(builders.maker().stack(3), 4, 5, ("embed", "mlp"))
    assert module.kernel.shape == (3, 4, 5)
    assert module.kernel.get_metadata()["axes"] == ("layers", "embed", "mlp")
    kernel = np.asarray(module.kernel[...])
    assert not np.array_equal(kernel[0], kernel[1])
    assert isinstance(module.bias, nnx.Param) and module.bias.get_metadata()["axes"] == ("layers", "mlp")
