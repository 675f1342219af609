"""What training asks of the encoder: splitting and merging inside jit, grad and scan; gradients; rematerialisation; bfloat16."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni_jax.config import LoraConfig
from omni_jax.model import Encoder, abstract_encoder, abstract_params, layers, with_params
from tests.model import builders
from tests.tolerances import assert_close

pytestmark = pytest.mark.jit

CONFIG = dataclasses.replace(
    builders.ODD,
    decoder=dataclasses.replace(builders.ODD.decoder, num_layers=2),
    vision=dataclasses.replace(builders.ODD.vision, num_layers=1, full_attention_layers=()),
    audio=dataclasses.replace(builders.ODD.audio, num_layers=1),
    beats=dataclasses.replace(builders.ODD.beats, num_layers=1),
    lora=LoraConfig(rank=3, alpha=7.0, dropout=0.1),
)
ROWS = builders.pack(
    [[(builders.random_prompt(1, 6, 5, 270), 1, 1), (builders.random_prompt(2, 4, 5, 270), 2, 1)]] * 2, [[5, 9], [5, 9]], 10
)
FEATURES = builders.noise(1, 2, 1, 13, CONFIG.beats.hidden_size)  # two micro-batches of one segment's BEATs features


def keys() -> jax.Array:
    """One key for each micro-batch."""
    return jax.random.split(jax.random.key(0), 2)


@pytest.fixture(autouse=True)
def tree_mode() -> Iterator[None]:
    """NNX without its graph mode, and no deprecated call."""
    before = {name: getattr(flax.config, name) for name in ("nnx_graph_mode", "nnx_graph_updates")}
    for name in before:
        flax.config.update(name, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        yield
    for name, value in before.items():
        flax.config.update(name, value)


def trained(path: tuple[Any, ...], leaf: Any) -> bool:
    """LoRA, fusion head and bridge, as the recipe trains them."""
    return str(path[0]) in ("head", "bridge") or str(path[-1]).startswith("lora_")


def gradients(encoder: Encoder, remat: Callable[..., Any] | None = None) -> dict[str, np.ndarray]:
    """Gradients of a sum over two micro-batches, each merged anew inside jit, scan and grad, with LoRA dropout."""
    graph, heads, frozen = nnx.split(encoder, trained, ...)
    weights = jnp.asarray(builders.noise(3, CONFIG.decoder.hidden_size))

    @jax.jit
    def total(heads: nnx.State, frozen: nnx.State, rows: dict[str, jax.Array], features: jax.Array, keys: jax.Array) -> nnx.State:
        def loss(heads: nnx.State, segment: jax.Array, key: jax.Array) -> jax.Array:
            model = nnx.merge(graph, heads, frozen, copy=True)
            media = model.bridge(segment, 5)[0]
            fused, last = builders.embed_rows(model, rows, media, remat=remat, dropout_key=key)
            return jnp.sum(jnp.tanh(fused) @ weights) + jnp.sum(last @ weights)

        def step(sums: nnx.State, inputs: tuple[jax.Array, jax.Array]) -> tuple[nnx.State, None]:
            return jax.tree.map(jnp.add, sums, jax.grad(loss)(heads, *inputs)), None

        sums, _ = jax.lax.scan(step, jax.tree.map(jnp.zeros_like, heads), (features, keys))
        return sums

    rows = jax.tree.map(jnp.asarray, ROWS)
    found = total(heads, frozen, rows, jnp.asarray(FEATURES), keys())
    return {"/".join(str(p) for p in path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(found)}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return builders.random_encoder(CONFIG)[0]


@pytest.fixture(scope="module")
def plain_gradients(encoder: Encoder) -> dict[str, np.ndarray]:
    return gradients(encoder)


def test_gradients_reach_everything_trained(plain_gradients: dict[str, np.ndarray]):
    adapters = {f"decoder/layers/attn/{m}/lora_{side}" for m in "qkv" for side in "ab"}
    whole = {f"{part}/{layer}/{kind}" for part in ("head", "bridge") for layer in ("fc1", "fc2") for kind in ("kernel", "bias")}
    assert set(plain_gradients) == adapters | whole | {"bridge/norm/scale", "bridge/norm/bias"}
    for name, gradient in plain_gradients.items():
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-4, name
        if name in adapters:
            assert (np.abs(gradient).max(axis=(1, 2)) > 1e-5).all(), f"{name}: a layer without gradient"


def test_gradient_is_the_slope(encoder: Encoder, plain_gradients: dict[str, np.ndarray]):
    """Along one direction of all trained values, central differences of the same sum, from outputs alone."""
    graph, heads, frozen = nnx.split(encoder, trained, ...)
    direction = jax.tree.map(lambda a: jnp.asarray(builders.noise(a.size, *a.shape)), heads)
    weights = builders.noise(3, CONFIG.decoder.hidden_size).astype(np.float64)

    @jax.jit
    def outputs(amount: jax.Array, segment: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, jax.tree.map(lambda a, d: a + amount * d, heads, direction), frozen, copy=True)
        media = model.bridge(segment, 5)[0]
        return builders.embed_rows(model, jax.tree.map(jnp.asarray, ROWS), media, dropout_key=key)

    def total(amount: float) -> float:
        found = 0.0
        for segment, key in zip(FEATURES, keys(), strict=True):
            fused, last = (np.asarray(x, np.float64) for x in outputs(jnp.float32(amount), jnp.asarray(segment), key))
            found += float((np.tanh(fused) @ weights).sum() + (last @ weights).sum())
        return found

    along = {"/".join(str(p) for p in path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(direction)}
    slope = sum(float((plain_gradients[name].astype(np.float64) * along[name]).sum()) for name in along)
    step = 5e-4
    # Four points: the error of the difference is of the fourth order.
    measured = (8 * (total(step) - total(-step)) - (total(2 * step) - total(-2 * step))) / (12 * step)
    assert_close(measured, np.float64(slope), "slope")


def test_remat_gives_the_same_gradients(encoder: Encoder, plain_gradients: dict[str, np.ndarray]):
    got = gradients(encoder, jax.checkpoint_policies.nothing_saveable)
    for name, want in plain_gradients.items():
        assert_close(got[name], want, "gradient")


@pytest.mark.parametrize("remat", [None, jax.checkpoint_policies.nothing_saveable])
def test_layers_that_train_get_the_same_numbers_as_frozen_ones(encoder: Encoder, remat: Callable[..., Any] | None):
    """`frozen` says how the loop reads the layers' weights; states, and gradients of all weights, are the same."""
    graph, params = nnx.split(encoder.decoder)
    media = jnp.asarray(builders.noise(5, 5, CONFIG.decoder.hidden_size))

    def run(frozen: bool) -> tuple[jax.Array, nnx.State]:
        def loss(params: nnx.State) -> tuple[jax.Array, jax.Array]:
            pooled = nnx.merge(graph, params, copy=True)(**ROWS, media=media, dtype=jnp.float32, remat=remat, frozen=frozen)
            return jnp.sum(jnp.sin(pooled)), pooled

        (_, pooled), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return pooled, gradients

    (pooled, gradients), (want, wanted) = run(frozen=True), run(frozen=False)
    assert_close(pooled, want, "layer")
    for (path, got), (_, expected) in zip(nnx.to_flat_state(gradients), nnx.to_flat_state(wanted), strict=True):
        assert np.abs(expected[...]).max() > 1e-5 or path[-2:] == ("k", "bias"), path  # a bias of keys moves no softmax
        assert_close(got[...], expected[...], "gradient")


def test_a_fresh_adapter_adds_nothing():
    """A is drawn, B is zero, norms are one and biases zero."""
    lora = LoraConfig(rank=3, targets=("there",))
    module = layers.Linear(builders.maker(lora, "there"), 5, 4, ("embed", "heads"))
    assert module.lora_a is not None and module.lora_b is not None and module.bias is not None
    assert np.asarray(module.lora_a[...]).all() and np.asarray(module.kernel[...]).all()
    assert not np.asarray(module.lora_b[...]).any() and not np.asarray(module.bias[...]).any()
    assert (np.asarray(layers.RMSNorm(builders.maker(), 4, 1e-6).scale[...]) == 1).all()


def test_abstract_tree_takes_no_storage():
    leaves = nnx.to_flat_state(nnx.state(abstract_encoder(CONFIG, param_dtype=jnp.bfloat16), nnx.Param))
    assert {type(leaf.get_value()) for _, leaf in leaves} == {jax.ShapeDtypeStruct}
    assert {leaf.dtype for _, leaf in leaves} == {jnp.dtype(jnp.bfloat16)}


def test_filling_refuses_what_does_not_fit():
    params: dict[tuple[str, ...], Any] = {path: np.zeros(s.shape, s.dtype) for path, s in abstract_params(CONFIG).items()}
    kernel = ("head", "fc1", "kernel")
    changes: list[tuple[dict[tuple[str, ...], Any], str]] = [
        ({kernel: None}, "1 parameters are missing: head/fc1/kernel"),
        ({("head", "fc3", "kernel"): np.zeros(1)}, "1 parameters are unknown: head/fc3/kernel"),
        ({kernel: np.zeros((2, 2))}, "1 parameters are misshapen: head/fc1/kernel"),
    ]
    for change, message in changes:
        wrong = {path: value for path, value in {**params, **change}.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            with_params(abstract_encoder(CONFIG), wrong)


# --------------------------------------------------------------------------------------------------------------------- bfloat16


def decoded(encoder: Encoder) -> dict[str, jax.Array]:
    """States and embeddings of packed rows, in whatever type the encoder gives."""
    rows = jax.tree.map(jnp.asarray, ROWS)
    media = jnp.asarray(builders.noise(5, 5, CONFIG.decoder.hidden_size))
    graph, params = nnx.split(encoder)

    @jax.jit
    def compute(params: nnx.State) -> dict[str, jax.Array]:
        model = nnx.merge(graph, params)
        states = model.decoder(**rows, media=media, dtype=model.dtype)
        fused, last = builders.embed_rows(model, rows, media)
        return {"states": states, "fused": fused, "last": last}

    return compute(params)


def media_tokens(encoder: Encoder) -> dict[str, jax.Array]:
    """Tokens of each tower."""
    step = np.arange(24)
    coords, window = np.stack([step // 6, step % 6], -1)[None], np.zeros((1, 24), np.int32)
    patches, mel = builders.noise(2, 1, 24, CONFIG.vision.patch_values), builders.noise(3, 1, 28, CONFIG.audio.num_mel_bins)
    fbank = builders.noise(4, 1, 48, CONFIG.beats.num_mel_bins)
    return {
        "video": builders.run(encoder, patches, coords, window, method="video_tokens"),
        "whisper": builders.run(encoder, mel, np.array([28]), method="whisper_tokens"),
        "beats": builders.run(encoder, fbank, np.array([48]), method="beats_tokens", max_tokens=5),
    }


@pytest.mark.parametrize("outputs", [decoded, pytest.param(media_tokens, marks=pytest.mark.slow)], ids=["decoder", "towers"])
def test_bfloat16_keeps_the_direction(encoder: Encoder, outputs: Callable[[Encoder], dict[str, jax.Array]]):
    half, _ = builders.random_encoder(CONFIG, param_dtype=jnp.bfloat16)
    assert {leaf.dtype for _, leaf in nnx.to_flat_state(nnx.state(half, nnx.Param))} == {jnp.dtype(jnp.bfloat16)}
    got, want = outputs(half), outputs(encoder)
    for name, value in got.items():
        # Embeddings leave in float32, everything on the way stays as it is stored.
        assert value.dtype == (jnp.float32 if name in ("fused", "last") else jnp.bfloat16), name
        assert_close(np.asarray(value, np.float32), want[name], "bfloat16_cosine")


def test_float32_activations_on_bfloat16_weights():
    mixed, _ = builders.random_encoder(CONFIG, param_dtype=jnp.bfloat16, dtype=jnp.float32)
    states = builders.run(mixed.bridge, FEATURES[0], tokens=5)
    assert mixed.dtype == jnp.float32 and states.dtype == jnp.float32
