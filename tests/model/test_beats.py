"""BEATs' rungs: buckets, position convolution, gated attention, block, whole encoder, bridge."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from omni_jax.model import Encoder, beats
from omni_jax.parallel import make_mesh
from tests.model import builders, reference_towers
from tests.model.reference import Weights
from tests.tolerances import assert_close

pytestmark = pytest.mark.jit

CFG = builders.ODD.beats
FRAMES = [96, 79, 16, 40]  # 6, 4, 1 and 2 whole patches in time


@pytest.mark.parametrize("num_buckets, max_distance", [(320, 800), (32, 128), (12, 20), (128, 50), (256, 100)])
def test_buckets(num_buckets: int, max_distance: int):
    length = 1000
    want = [reference_towers.bucket(d, num_buckets, max_distance) for d in range(-length + 1, length)]
    assert_close(beats.relative_buckets(length, num_buckets, max_distance), np.array(want), "position_ids")


def test_published_buckets_by_hand():
    """320 buckets, 160 for each sign: exact below 80, the last from 800 - a little on; the sign of key - query chooses the half."""
    got = beats.relative_buckets(1001, 320, 800)
    at = {d: int(got[d + 1000]) for d in (-1000, -800, -79, -1, 0, 1, 79, 80, 82, 83, 799, 800, 1000)}
    assert at == {-1000: 159, -800: 159, -79: 79, -1: 1, 0: 0, 1: 161, 79: 239, 80: 240, 82: 240, 83: 241, 799: 319, 800: 319, 1000: 319}


@pytest.mark.parametrize("taps", [10, 9])
def test_position_convolution(taps: int):
    config = dataclasses.replace(CFG, conv_pos=taps)
    module, w = builders.random_part(lambda: beats.PositionConv(builders.maker(), config))
    x = builders.noise(1, 1, 17, CFG.hidden_size)
    assert_close(builders.run(module, x)[0], reference_towers.position_conv(w, x[0].astype(np.float64), CFG.conv_pos_groups), "layer")


@pytest.mark.parametrize("sizes", [(1, 2, 2), (2, 2, 2), (1, 2, 4)])
def test_gradient_of_the_position_convolution_on_a_mesh(sizes: tuple[int, int, int]):
    """A grouped convolution's kernel gradient came out multiplied by the size of the tensor axis."""
    module, _ = builders.random_part(lambda: beats.PositionConv(builders.maker(), CFG))
    graph, params = nnx.split(module)
    x = builders.noise(1, 8, 17, CFG.hidden_size)
    mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])

    def loss(params: nnx.State, x: jax.Array, split: NamedSharding | None) -> jax.Array:
        y = nnx.merge(graph, params)(x if split is None else jax.lax.with_sharding_constraint(x, split))
        return jnp.sum(jnp.sin(y if split is None else jax.lax.with_sharding_constraint(y, split)))

    gradient = jax.jit(jax.grad(loss), static_argnums=2)
    want = gradient(params, jnp.asarray(x), None)
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    got = gradient(jax.device_put(params, NamedSharding(mesh, PartitionSpec())), jax.device_put(x, split), split)
    for name, one, other in zip(("bias", "g", "v"), jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-4, atol=1e-4 * float(jnp.abs(other).max()), err_msg=name)


def test_a_key_bias_changes_nothing():
    """So that its gradient vanishes, which tests of gradients count on; the kernel's does not."""
    _, w = builders.random_part(lambda: beats.Attention(builders.maker(), CFG))
    table, x = (
        builders.noise(seed, *shape).astype(np.float64)
        for seed, shape in ((1, (CFG.num_buckets, CFG.num_heads)), (2, (23, CFG.hidden_size)))
    )
    want = reference_towers.beats_attention(w, CFG, table, x)
    moved = {name: Weights({**w.arrays, name: w[name] + builders.noise(3, *w[name].shape)}) for name in ("k/bias", "k/kernel")}
    got = {name: reference_towers.beats_attention(other, CFG, table, x) for name, other in moved.items()}
    assert_close(got["k/bias"], want, "float64_rounding")
    assert np.abs(got["k/kernel"] - want).max() > 1e-3


@pytest.mark.parametrize("part", ["attention", "block"])
def test_one_block(part: str):
    kind, want = {"attention": (beats.Attention, reference_towers.beats_attention), "block": (beats.Block, reference_towers.beats_block)}[
        part
    ]
    module, w = builders.random_part(lambda: kind(builders.maker(), CFG))
    table = builders.noise(1, CFG.num_buckets, CFG.num_heads)
    x = builders.noise(2, 1, 23, CFG.hidden_size)
    valid = 18
    buckets = np.array([[reference_towers.bucket(k - q, CFG.num_buckets, CFG.max_distance) for k in range(23)] for q in range(23)])
    position_bias = jnp.moveaxis(jnp.asarray(table)[buckets], -1, 0)
    mask = np.tile(np.arange(23) < valid, (1, 23, 1))
    got = module(jnp.asarray(x), lambda start, stop: position_bias[:, start:stop], jnp.asarray(mask))
    assert_close(got[0, :valid], want(w, CFG, table.astype(np.float64), x[0, :valid].astype(np.float64)), "layer")


def test_encoder_on_padded_segments(odd: tuple[Encoder, Weights]):
    encoder, w = odd
    fbank = builders.noise(1, len(FRAMES), 112, CFG.num_mel_bins)  # noise beyond the valid frames too
    features, patches = builders.run(encoder.beats, fbank, np.array(FRAMES), dtype=jnp.float32)
    for n, frames in enumerate(FRAMES):
        want = reference_towers.beats(w / "beats", CFG, fbank[n, :frames].astype(np.float64))
        assert int(patches[n]) == len(want)
        assert_close(features[n, : len(want)], want, "beats_features")
        assert not np.asarray(features[n, len(want) :]).any()


def test_bias_and_no_input_projection():
    """The settings other BEATs files have: a bias on the patch embedding, patches as wide as the encoder."""
    config = dataclasses.replace(CFG, embed_dim=CFG.hidden_size, conv_bias=True, predictor_classes=0)
    module, w = builders.random_part(lambda: beats.Beats(builders.maker(), config))
    assert module.input_proj is None
    fbank = builders.noise(1, 1, 48, CFG.num_mel_bins)
    features, _ = builders.run(module, fbank, np.array([48]), dtype=jnp.float32)
    assert_close(features[0], reference_towers.beats(w, config, fbank[0].astype(np.float64)), "beats_features")


@pytest.mark.parametrize("tokens", [4, 9], ids=["cut", "padded"])
def test_bridge(tokens: int):
    module, w = builders.random_part(lambda: beats.BeatsProjector(builders.maker(), 42, 20))
    features = builders.noise(1, 2, 13, 42)
    want = np.stack([reference_towers.bridge(w, item, tokens) for item in features.astype(np.float64)])
    assert_close(builders.run(module, features, tokens=tokens), want, "layer")


def test_beats_tokens(odd: tuple[Encoder, Weights]):
    encoder, w = odd
    fbank = builders.noise(1, 2, 64, CFG.num_mel_bins)
    got = builders.run(encoder, fbank, np.array([64, 33]), method="beats_tokens", max_tokens=8)
    for n, frames in enumerate((64, 33)):
        features = reference_towers.beats(w / "beats", CFG, fbank[n, :frames].astype(np.float64))
        assert_close(got[n], reference_towers.bridge(w / "bridge", features, 8), "beats_tokens")


def test_long_segments_in_blocks_of_queries_give_the_same(odd: tuple[Encoder, Weights], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, _ = odd
    side, bins = encoder.config.beats.patch_size, encoder.config.beats.num_mel_bins
    fbank = np.random.default_rng(4).normal(size=(2, 9 * side, bins)).astype(np.float32)
    frames = np.array([9 * side, 7 * side + 3], np.int32)

    def run() -> np.ndarray:
        return np.asarray(jax.jit(lambda fbank, frames: encoder.beats(fbank, frames, dtype=jnp.float32)[0])(fbank, frames))

    whole = run()
    monkeypatch.setattr(beats, "LONGEST_BLOCK", 5)  # 27 patches: five blocks and a short one
    assert_close(run(), whole, "layer")
