"""Operation counts against a count by hand and against XLA's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni_jax.config import AudioConfig, BeatsConfig, DecoderConfig, LoraConfig, ModelConfig, SpecialTokens, VisionConfig
from omni_jax.model import abstract_encoder
from omni_jax.model.flops import PARTS
from omni_jax.model.layers import CAUSAL_UNIT, attend, attend_causal, causal_blocks
from omni_jax.towers.work import FlopCount
from omni_jax.types import AudioBatch, BeatsBatch, EncoderBatch, RowBatch, VisionBatch
from tests.tolerances import assert_close
from tools.benchmarks.forward_work import forward_work, total

STEPS, PATCHES, CHUNKS, SEGMENTS, FRAMES, TOKENS, ROWS, LENGTH, PROMPTS = 3, 64, 2, 2, 160, 44, 2, 256, 3


def one_layer() -> ModelConfig:
    """One layer of each kind, and the decoder's last: XLA counts the body of a loop once, which is right for a loop of one."""
    width = 256
    return ModelConfig(
        decoder=DecoderConfig(width, 512, num_layers=2, num_heads=2, num_kv_heads=1, vocab_size=64),
        vision=VisionConfig(128, 256, num_layers=1, num_heads=2, output_size=width, full_attention_layers=(0,)),
        audio=AudioConfig(128, 256, num_layers=1, num_heads=2, output_size=width),
        beats=BeatsConfig(num_layers=1, hidden_size=128, intermediate_size=256, num_heads=2, embed_dim=64, conv_pos_groups=4),
        tokens=SpecialTokens(0, 1, 2, 3, 4, 5, 6),
    )


def padded_batch() -> EncoderBatch:
    """Two of three steps with 6 x 8 patches in windows of 4 x 4 tokens, one chunk of 100 frames, rows of 200 and 100 + 50 tokens."""
    window = np.full((STEPS, PATCHES), -1, np.int32)
    window[:2, :48] = np.repeat([0, 1], [32, 16])
    segment = np.zeros((ROWS, LENGTH), np.int32)
    segment[0, :200], segment[1, :100], segment[1, 100:150] = 1, 1, 2
    branch = np.zeros((ROWS, LENGTH), np.int32)
    branch[0, 150:180], branch[0, 180:200] = 1, 2
    owner = np.full((ROWS, PROMPTS, 2), -1, np.int32)
    owner[0, :2], owner[1, :2] = 0, 0
    pool = np.array([[179, 199, 0], [99, 149, 0]], np.int32)
    zeros = np.zeros((ROWS, LENGTH), np.int32)
    return EncoderBatch(
        vision=(VisionBatch(np.zeros((STEPS, PATCHES, 1176), np.float32), np.zeros((STEPS, PATCHES, 2), np.int32), window),),
        audio=(AudioBatch(np.zeros((CHUNKS, 200, 128), np.float32), np.array([200, 99], np.int32)),),
        beats=(BeatsBatch(np.zeros((SEGMENTS, FRAMES, 128), np.float32), np.array([160, 100]), np.array([40, 25]), TOKENS),),
        rows=(RowBatch(zeros, zeros - 1, np.zeros((ROWS, 3, LENGTH), np.int32), segment, branch, pool),),
        owners=(owner,),
        used_tokens=0,
        total_tokens=0,
    )


def test_work_equals_a_count_by_hand() -> None:
    work = forward_work(one_layer(), padded_batch())
    assert tuple(work) == PARTS
    block = 4 * 128 * 128 + 3 * 128 * 256
    merger = 512 * 512 + 512 * 256
    assert work["vision"] == FlopCount(
        computed=2 * 192 * (1176 * 128 + block) + 2 * 48 * merger + 4 * 128 * 3 * 64 * 64,
        needed=2 * 96 * (1176 * 128 + block) + 2 * 24 * merger + 4 * 128 * 2 * 48 * 48,
    )
    layer = 4 * 128 * 128 + 2 * 128 * 256
    conv1, conv2, proj = 3 * 128 * 128, 3 * 128 * 128, 128 * 256
    assert work["audio"] == FlopCount(
        computed=2 * 400 * conv1 + 2 * 200 * (conv2 + layer) + 2 * 100 * proj + 4 * 128 * 2 * 100 * 100,
        needed=2 * 299 * conv1 + 2 * 150 * (conv2 + layer) + 2 * 75 * proj + 4 * 128 * (100 * 100 + 50 * 50),
    )
    inside = 256 * 64 + 64 * 128 + layer + 2 * 64 * 8
    # Of 80 x 80 pairs, those where the key stands more than 64 before or 63 behind the position are outside the kernel of 128 taps.
    conv = 128 * 32
    taps = {80: 80 * 80 - sum(range(1, 16 + 1)) - sum(range(1, 16)), 48: 48 * 48}
    assert work["beats"] == FlopCount(
        computed=2 * 160 * inside + 2 * conv * 2 * taps[80] + 4 * 128 * 2 * 80 * 80,
        needed=2 * 128 * inside + 2 * conv * (taps[80] + taps[48]) + 4 * 128 * (80 * 80 + 48 * 48),
    )
    bridge = 128 * 256 + 256 * 256
    assert work["bridge"] == FlopCount(2 * 88 * bridge, 2 * 65 * bridge)
    keys, others = 2 * 256 * 128, 2 * 256 * 256 + 3 * 256 * 512
    # 150 tokens of prefix; branches of 30 and 20 tokens, each seeing the prefix and itself; then segments of 100 and 50 tokens.
    pairs = 150 * 151 // 2 + 30 * 150 + 30 * 31 // 2 + 20 * 150 + 20 * 21 // 2 + 100 * 101 // 2 + 50 * 51 // 2
    # The last layer answers for the pooled tokens, which see 180, 170, 100 and 50; two slots of six pool nothing.
    assert work["decoder"] == FlopCount(
        computed=2 * (2 * 512 * keys + (512 + 6) * others) + 4 * 256 * (2 * (128 * 128 + 128 * 256) + 6 * 256),
        needed=2 * (2 * 350 * keys + (350 + 4) * others) + 4 * 256 * (pairs + 180 + 170 + 100 + 50),
    )
    assert work["head"] == FlopCount(2 * 6 * 3 * 256 * 256, 2 * 4 * 3 * 256 * 256)
    assert total(work).computed == sum(w.computed for w in work.values())
    assert 0.2 < total(work).padding < 0.5


def test_windows_and_lora_are_counted() -> None:
    config = one_layer()
    windowed = dataclasses.replace(config, vision=dataclasses.replace(config.vision, full_attention_layers=()))
    plain, other = forward_work(config, padded_batch()), forward_work(windowed, padded_batch())
    assert plain["vision"].computed == other["vision"].computed
    assert plain["vision"].needed - other["vision"].needed == 4 * 128 * 2 * (48**2 - 32**2 - 16**2)
    adapted = forward_work(dataclasses.replace(config, lora=LoraConfig(rank=4)), padded_batch())
    keys, queries = 2 * 4 * (256 + 128), 4 * (256 + 256)
    assert adapted["decoder"].computed - plain["decoder"].computed == 2 * (2 * 512 * keys + (512 + 6) * queries)


@pytest.mark.jit
@pytest.mark.parametrize("part", PARTS)
def test_work_is_what_xla_counts(part: str) -> None:
    """XLA adds elementwise work, a few operations a value; it never counts less."""
    config, batch = one_layer(), padded_batch()
    graph, params = nnx.split(abstract_encoder(config))
    v, a, b, r = batch.vision[0], batch.audio[0], batch.beats[0], batch.rows[0]
    rows = {n: getattr(r, n) for n in ("ids", "media_index", "positions", "segment", "branch", "pool")}
    f32 = jnp.float32
    calls = {
        "vision": (lambda m, *x: m.vision(*x, dtype=f32), (v.patches, v.coords, v.window)),
        "audio": (lambda m, *x: m.audio(*x, dtype=f32), (a.mel, a.frames)),
        "beats": (lambda m, *x: m.beats(*x, dtype=f32)[0], (b.fbank, b.frames)),
        "bridge": (lambda m, x: m.bridge(x, TOKENS), (np.zeros((SEGMENTS, 80, 128), np.float32),)),
        "decoder": (lambda m, x: m.pool(RowBatch(**x), jnp.zeros((0, 256))), (rows,)),
        "head": (lambda m, x: m.head(x), (np.zeros((ROWS * PROMPTS, 2, 256), np.float32),)),
    }
    call, arguments = calls[part]
    lowered = jax.jit(lambda p, *x: call(nnx.merge(graph, p), *x)).lower(params, *arguments)
    cost = lowered.cost_analysis()
    assert cost is not None
    counted = forward_work(config, batch)[part].computed
    assert counted <= cost["flops"] <= 1.1 * counted


@pytest.mark.parametrize("tokens", [1, 100, CAUSAL_UNIT, 640, 2000])
def test_causal_blocks_cover_the_row(tokens: int) -> None:
    blocks = causal_blocks(tokens)
    assert [start for start, _ in blocks] == [0, *(stop for _, stop in blocks[:-1])]
    assert blocks[-1][1] == tokens
    assert len(blocks) <= 8


@pytest.mark.jit
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_causal_attention_in_blocks_equals_attention(kv_heads: int) -> None:
    """Values and gradients, over several blocks with a short last one."""
    tokens, rng = 2 * CAUSAL_UNIT + 30, np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, tokens, n, 8)), jnp.float32) for n in (4, kv_heads, kv_heads))
    segment = np.sort(rng.integers(0, 3, (2, tokens)), axis=1)
    mask = jnp.asarray(np.tri(tokens, dtype=bool) & (segment[:, :, None] == segment[:, None]))

    def values_and_gradients(function: Callable[..., jax.Array]) -> list[np.ndarray]:
        run = lambda *x: function(*x, mask)  # noqa: E731
        both = jax.jit(lambda *x: (run(*x), *jax.grad(lambda *y: jnp.sum(jnp.sin(run(*y))), argnums=(0, 1, 2))(*x)))
        return [np.asarray(x) for x in both(q, k, v)]

    for blocked, whole in zip(values_and_gradients(attend_causal), values_and_gradients(attend), strict=True):
        assert_close(blocked, whole, "layer")
