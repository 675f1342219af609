"""Matrices in int8: what rounding leaves of a value, products with them, and which matrices they are."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from omni_jax.config import ConfigError, LoraConfig, ModelConfig
from omni_jax.model import Encoder, abstract_encoder, abstract_params, rounded_maps, with_params
from omni_jax.model.int8 import LEVELS, SCALE, product, restored, rounded
from omni_jax.parallel import make_mesh
from tests.model import builders
from tests.model.test_sharding import part_of
from tests.tolerances import assert_close

TINY = np.finfo(np.float32).tiny
KINDS = (np.float32, ml_dtypes.bfloat16)


@pytest.mark.costly
@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=3, max_side=9),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True),
    ),
    st.sampled_from(KINDS),
)
def test_no_value_moves_by_more_than_half_a_step(matrix: np.ndarray, kind: Any):
    with np.errstate(over="ignore"):  # of what bfloat16 rounds to infinity
        matrix = matrix.astype(kind)
    matrix = np.where(np.isfinite(matrix.astype(np.float32)), matrix, kind(0))
    q, scale = rounded(matrix)
    assert q.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == (*matrix.shape[:-2], matrix.shape[-1])
    assert np.abs(q.astype(int)).max() <= LEVELS and (scale >= TINY).all()
    step = scale[..., None, :].astype(np.float64)
    distance = np.abs(matrix.astype(np.float64) - q * step)
    assert (distance <= step * (0.5 + LEVELS * 2.0**-23)).all()  # the quotient has float32's own rounding
    # No step is larger than it must be: the largest value of a column takes all of them.
    full = np.abs(matrix.astype(np.float32)).max(axis=-2) >= LEVELS * TINY
    assert (np.abs(q.astype(int)).max(axis=-2)[full] == LEVELS).all()
    np.testing.assert_array_equal(rounded(-matrix)[0], -q)


def test_a_matrix_is_rounded_alike_whole_or_in_blocks(monkeypatch: pytest.MonkeyPatch):
    matrix = builders.noise(0, 2, 37, 12)
    whole = rounded(matrix)
    monkeypatch.setattr("omni_jax.model.int8._BLOCK", 60)
    for one, other in zip(whole, rounded(matrix), strict=True):
        np.testing.assert_array_equal(one, other)
    assert_close(restored(*whole), matrix, "int8")


@pytest.mark.jit
def test_columns_of_zeros_stay_zero_and_no_scale_underflows():
    matrix = np.zeros((4, 3), np.float32)
    matrix[1, 1], matrix[2, 2] = 1e-42, -3e-38
    q, scale = rounded(matrix)
    assert not q[:, 0].any() and np.isfinite(restored(q, scale)).all()
    assert (scale >= TINY).all()
    assert np.abs(restored(q, scale) - matrix).max() <= TINY / 2
    x = jnp.ones((2, 4))
    for dynamic in (False, True):
        assert not np.asarray(product(x, jnp.asarray(q), jnp.asarray(scale), dynamic=dynamic))[:, 0].any()
        assert not np.asarray(product(0 * x, jnp.asarray(q), jnp.asarray(scale), dynamic=dynamic)).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_has_no_int8_form(value: float):
    matrix = builders.noise(0, 5, 4)
    matrix[3, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        rounded(matrix)


@pytest.mark.jit
def test_a_product_is_the_one_with_the_restored_matrix():
    x, (q, scale) = builders.noise(1, 2, 5, 48), rounded(builders.noise(2, 48, 20))
    got = product(jnp.asarray(x), jnp.asarray(q), jnp.asarray(scale), dynamic=False)
    assert_close(got, x @ restored(q, scale), "layer")


@pytest.mark.jit
@pytest.mark.parametrize("outlier", [1.0, 30.0])
def test_a_dynamic_product_rounds_each_token_by_its_own_largest_value(outlier: float):
    x, (q, scale) = builders.noise(1, 2, 5, 48), rounded(builders.noise(2, 48, 20))
    x[0, 0, 7] *= outlier
    x[1, 2] = 0
    step = np.maximum(np.abs(x).max(axis=-1, keepdims=True) / np.float32(LEVELS), TINY)
    want = (np.rint(x / step).astype(np.int64) @ q.astype(np.int64)).astype(np.float64) * step * scale
    got = product(jnp.asarray(x), jnp.asarray(q), jnp.asarray(scale), dynamic=True)
    assert_close(got, want, "layer")
    # A token does not change with what stands beside it.
    assert_close(product(jnp.asarray(x[1, 4:]), jnp.asarray(q), jnp.asarray(scale), dynamic=True)[0], got[1, 4], "layer")


# ------------------------------------------------------------------------------------------------------------------- the encoder

ONLY_LORA = dataclasses.replace(builders.EVEN, lora=LoraConfig(rank=3, alpha=7.0))


def int8_encoder(config: ModelConfig, **options: Any) -> tuple[Encoder, Encoder]:
    """Returns an encoder with random weights in int8, and one in float32 with the matrices that these stand for."""
    plain = {p: builders.random_value("/".join(p), leaf.shape) for p, leaf in abstract_params(config.with_weights("float")).items()}
    held: dict[tuple[str, ...], Any] = dict(plain)
    for path in rounded_maps(config):
        held[(*path, "kernel")], held[(*path, SCALE)] = q, scale = rounded(plain[(*path, "kernel")])
        plain[(*path, "kernel")] = restored(q, scale)
    return with_params(abstract_encoder(config, **options), held), with_params(
        abstract_encoder(config.with_weights("float"), **options), plain
    )


def test_every_large_matrix_is_rounded_and_nothing_else():
    config = builders.ODD.with_weights("int8")
    shapes, maps = abstract_params(config, jnp.bfloat16), rounded_maps(config)
    kernels = {path[:-1] for path in shapes if path[-1] == "kernel"}
    whole = {"/".join(path) for path in kernels - maps}
    assert whole == {"vision/patch_embed", "audio/conv1", "audio/conv2", "beats/patch_embed", "beats/layers/attn/gate"}
    assert maps <= kernels and {path[0] for path in maps} == {"vision", "audio", "beats", "bridge", "decoder", "head"}
    for path, leaf in shapes.items():
        inside = path[:-1] in maps
        want = jnp.int8 if inside and path[-1] == "kernel" else jnp.float32 if path[-1] == SCALE else jnp.bfloat16
        assert leaf.dtype == want, path
        if path[-1] == SCALE:
            kernel = shapes[(*path[:-1], "kernel")].shape
            assert leaf.shape == (*kernel[:-2], kernel[-1])
    assert not rounded_maps(builders.ODD)


def test_at_7b_the_rounded_matrices_are_all_but_what_is_small():
    config = builders.SEVEN_B.with_weights("int8")
    shapes = abstract_params(config, jnp.bfloat16)
    whole = sum(leaf.size for path, leaf in shapes.items() if leaf.dtype != jnp.int8 and path[:2] != ("decoder", "embed"))
    assert whole < 0.003 * sum(leaf.size for leaf in shapes.values())


def test_maps_that_train_stay_as_they_are_and_the_head_is_never_dynamic():
    kept = rounded_maps(builders.ODD.with_weights("int8", ("head/fc1", "bridge/fc2")))
    assert rounded_maps(builders.ODD.with_weights("int8")) - kept == {("head", "fc1"), ("bridge", "fc2")}
    encoder = abstract_encoder(builders.ODD.with_weights("int8-dynamic"))
    assert encoder.decoder.layers.attn.q.weights == "int8-dynamic" and encoder.head.fc1.weights == "int8"
    with pytest.raises(ConfigError, match="model field weights='int4': choose one of float, int8, int8-dynamic"):
        builders.ODD.with_weights("int4")


@pytest.mark.jit
@pytest.mark.parametrize("sizes", [(2, 2, 2), pytest.param((1, 8, 1), marks=pytest.mark.slow)])
@pytest.mark.parametrize("part", ["embed_rows", *(pytest.param(p, marks=pytest.mark.slow) for p in ("video_tokens", "beats_tokens"))])
def test_an_int8_encoder_is_its_restored_one_on_one_device_and_on_eight(part: str, sizes: tuple[int, int, int]):
    held, plain = int8_encoder(ONLY_LORA.with_weights("int8"))
    want = part_of(held, part)
    assert_close(part_of(held, part, sizes), want, "sharding")
    assert_close(want, part_of(plain, part), "sharding")


def with_outliers(params: dict[tuple[str, ...], Any], channels: tuple[int, ...], factor: float = 30.0) -> dict[tuple[str, ...], Any]:
    """Returns weights of the same function whose decoder multiplies, in a few channels, values `factor` times as large as they were.

    The norm before a matrix is larger there, and the rows of the matrix smaller: trained language models are so by themselves.
    """
    made = {path: np.array(value) for path, value in params.items()}
    for norm, maps in (("norm_attn", ("attn/q", "attn/k", "attn/v")), ("norm_mlp", ("mlp/gate", "mlp/up"))):
        made["decoder", "layers", norm, "scale"][:, list(channels)] *= factor
        for name in maps:
            for matrix in ("kernel", "lora_a"):
                if (path := ("decoder", "layers", *name.split("/"), matrix)) in made:
                    made[path][:, list(channels)] /= factor
    return made


LIMITS = {"int8": ("int8_embedding", "int8_outliers"), "int8-dynamic": ("int8_dynamic_embedding", "int8_dynamic_outliers")}


@pytest.mark.jit
@pytest.mark.parametrize("kind", LIMITS)
def test_channels_that_stand_out_cost_a_dynamic_product_more(kind: str):
    """Embeddings of rows against float32, without such channels and with three of 64."""
    config = ONLY_LORA
    plain = {p: builders.random_value("/".join(p), leaf.shape) for p, leaf in abstract_params(config).items()}
    heavy = with_outliers(plain, (3, 17, 40))
    want = part_of(with_params(abstract_encoder(config), plain), "embed_rows")
    turned = []
    for params in (plain, heavy):
        held: dict[tuple[str, ...], Any] = dict(params)
        for path in rounded_maps(config.with_weights(kind)):
            held[(*path, "kernel")], held[(*path, SCALE)] = rounded(params[(*path, "kernel")])
        got = part_of(with_params(abstract_encoder(config.with_weights(kind)), held), "embed_rows")
        assert_close(got, want, LIMITS[kind][params is heavy])
        turned.append(1 - cosines(got, want).min())
    assert turned[1] > (100 if kind == "int8-dynamic" else 5) * turned[0]


def cosines(a: Any, b: Any) -> np.ndarray:
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return (a * b).sum(axis=-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.jit
def test_a_layers_int8_matrix_is_gathered_as_int8():
    """A quarter of the bytes of float32: the values, not what they stand for, cross the interconnect."""
    held, _ = int8_encoder(ONLY_LORA.with_weights("int8"))
    mesh = make_mesh(1, 8, 1)
    text = compiled_text(held, mesh)
    gathered = {line.split(" = ")[1].split("[")[0] for line in text.splitlines() if " all-gather(" in line and "[1,64," in line}
    assert gathered == {"s8"}


def compiled_text(encoder: Encoder, mesh: jax.sharding.Mesh) -> str:
    from omni_jax.model.runner import place_params
    from omni_jax.parallel import sharding

    layer = nnx.split(encoder.decoder.layers.mlp)
    x = jax.device_put(builders.noise(1, 8, 4, 64), sharding(("batch", None, None), (8, 4, 64), mesh))

    def run(params: nnx.State, x: jax.Array) -> jax.Array:
        from omni_jax.model.layers import scan_layers

        return scan_layers(nnx.merge(layer[0], params), lambda mlp, x, _: (mlp(x), None), x, in_place=lambda *_: True)[0]

    with jax.set_mesh(mesh):
        return jax.jit(run).lower(place_params(layer[1], mesh), x).compile().as_text() or ""
