"""The operations of a step against a count by hand and against XLA's own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from omni_jax.config import AudioConfig, BeatsConfig, DecoderConfig, LoraConfig, ModelConfig, SpecialTokens, VisionConfig
from omni_jax.model import abstract_params, flops
from omni_jax.planning.abstract import abstract_batch
from omni_jax.planning.step_flops import PassFlops, clip_flops, padded_counts
from omni_jax.train import BatchShapes, LossConfig, TrainableConfig, TrainStep, kinds_of_update, step_kind
from omni_jax.train.trainable import select
from omni_jax.types import VideoGrid
from tests.model.builders import SEVEN_B
from tests.train.random_batches import recipe
from tools.training_cost import ClipSizes, exact_counts, mean, per_triple, released_counts, released_per_triple, table, total, update_flops

SHAPES = BatchShapes(steps=2, patches=64, chunks=2, fbank_frames=80, row_tokens=256, hard_tokens=192)
CLIPS = 4


def one_layer() -> ModelConfig:
    """One layer of each kind, and the decoder's last: XLA counts the body of a loop once, which is right for a loop of one."""
    width = 256
    return ModelConfig(
        decoder=DecoderConfig(width, 512, num_layers=2, num_heads=2, num_kv_heads=1, vocab_size=64),
        vision=VisionConfig(128, 256, num_layers=1, num_heads=2, output_size=width, full_attention_layers=(0,)),
        audio=AudioConfig(128, 256, num_layers=1, num_heads=2, output_size=width),
        beats=BeatsConfig(num_layers=1, hidden_size=128, intermediate_size=256, num_heads=2, embed_dim=64, conv_pos_groups=4),
        tokens=SpecialTokens(0, 1, 2, 3, 4, 5, 6),
        lora=LoraConfig(rank=8, dropout=0.0),
    )


@pytest.mark.jit
@pytest.mark.parametrize(
    ("update", "micro", "remat", "choice"),
    [
        (0, 1, "layer:1,none", "adapter"),
        (1, 1, "none", "adapter"),
        (2, 1, "dots", "adapter"),
        (1, 2, "layer", "adapter"),
        (2, 1, "layer", "all"),
        (0, 1, "attention", "adapter"),
        (0, 1, "offload", "adapter"),
    ],
)
def test_counted_operations_are_what_xla_counts(update: int, micro: int, remat: str, choice: str) -> None:
    """XLA adds elementwise work, a few operations a value. A loop over micro-batches is counted as one of them."""
    config = one_layer()
    made = recipe(remat=remat, trainable=TrainableConfig(recipe=choice))
    step = TrainStep(config, made, dtype=jnp.float32)
    state, frozen = jax.eval_shape(step.init, abstract_params(config))
    kinds = kinds_of_update(update, micro, made.losses)
    batch = abstract_batch(config, kinds[0], SHAPES, clips=CLIPS, micro_batches=micro)
    cost = step.lower(state, frozen, batch).cost_analysis()
    assert cost is not None
    counts = padded_counts(config, kinds[0], SHAPES)
    counted = CLIPS * total(clip_flops(config, counts, step.names, remat=remat, cached=micro > 1))
    assert counted <= cost["flops"] <= 1.03 * counted
    whole = update_flops(config, made, [(kind, SHAPES) for kind in kinds], clips=CLIPS)
    assert total(whole) == pytest.approx(micro * counted)


def test_a_step_at_7b_equals_a_count_by_hand() -> None:
    """docs/reports/training_cost.md goes through the same count."""
    sizes = ClipSizes()
    layer = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944
    lora = 3 * 3584 * 16 + 16 * (3584 + 512 + 512)
    anchor, audio, video, text = 4 + 216 + 400 + 40, 2 + 400 + 6, 2 + 216 + 6, 40
    assert [sizes.prompt(name) for name in ("anchor", "audio", "video", "text")] == [anchor, audio, video, text]
    pairs = {n: n * (n + 1) // 2 for n in (anchor, audio, video, text)}
    # The last layer: keys and values of all tokens, everything else for the last one.
    keys = 2 * 3584 * 512 + 2 * (3584 + 512) * 16
    rest = layer + lora - keys
    attention = {n: 4 * 3584 * (27 * pairs[n] + n) for n in pairs}
    ours = {n: 2 * (28 * keys * n + rest * (27 * n + 1)) + attention[n] for n in pairs}
    whole = {n: 28 * (2 * (layer + lora) * n + 4 * 3584 * pairs[n]) for n in pairs}
    # Step 1: the hard negative exchanges the audio; L_A and L_D play text and video.
    with_gradient = (anchor, anchor, text, video)
    tokens, forward = sum(with_gradient), sum(ours[n] for n in with_gradient)
    counted = per_triple(SEVEN_B, sizes, LossConfig())[1]["decoder"]
    lora_keys = 2 * 16 * (3584 + 512)
    assert counted == PassFlops(
        forward=pytest.approx(forward + ours[anchor]),
        recomputed=pytest.approx(forward - 2 * 3584 * 18944 * (27 * tokens + 4)),
        activations=pytest.approx(forward + sum(attention[n] for n in with_gradient)),
        weights=pytest.approx(2 * (28 * lora_keys * tokens + (lora - lora_keys) * (27 * tokens + 4))),
    )
    # The release computes all layers whole, and embeds the audio as well, which takes no gradient.
    forward, seen = sum(whole[n] for n in with_gradient), sum(pairs[n] for n in with_gradient)
    assert released_per_triple(SEVEN_B, sizes, LossConfig())[1]["decoder"] == PassFlops(
        forward=pytest.approx(forward + whole[anchor] + whole[audio]),
        recomputed=pytest.approx(forward - 28 * 2 * 3584 * 18944 * tokens),
        activations=pytest.approx(forward + 28 * 4 * 3584 * seen),
        weights=pytest.approx(28 * 2 * lora * tokens),
    )
    # Step 0: the other caption is 40 tokens behind the anchor's media.
    shared, apart = (exact_counts(SEVEN_B, step_kind(0, LossConfig()), sizes, share_prefix=s) for s in (True, False))
    assert (
        shared.with_gradient.tokens - apart.with_gradient.tokens == 40
        and apart.without_gradient.tokens == anchor
        and shared.without_gradient.tokens == 0
    )
    assert shared.with_gradient.pairs - apart.with_gradient.pairs == 40 * (anchor - 40) + pairs[text]
    assert shared.with_gradient.last_tokens - apart.with_gradient.last_tokens == 1
    assert shared.with_gradient.last_pairs - apart.with_gradient.last_pairs == anchor


def test_the_head_and_the_bridge_train_and_towers_run_once_a_copy() -> None:
    step = per_triple(SEVEN_B, ClipSizes(), LossConfig())[1]
    fc1, fc2 = 28 * 3584 * 3584, 3584 * 3584
    # Anchor, positive and video take a gradient, the hard negative none; text is read from the last layer.
    assert step["head"] == PassFlops(forward=2 * (fc1 + fc2) * 4, activations=2 * (fc1 + fc2) * 3, weights=2 * (fc1 + fc2) * 3)
    bridge = 768 * 3584 + 3584 * 3584
    assert step["bridge"] == PassFlops(forward=2 * bridge * 600, activations=2 * bridge * 400, weights=2 * bridge * 400)
    for tower in ("vision", "audio", "beats"):
        assert step[tower].total == step[tower].forward > 0
    cached = per_triple(SEVEN_B, ClipSizes(), LossConfig(), cached=True)[1]
    assert cached["head"].again == 2 * fc1 * 3 and cached["vision"] == step["vision"]
    last = flops.FlopCount(1), flops.FlopCount(660)
    hard = flops.decoder_terms(SEVEN_B, flops.FlopCount(660), flops.FlopCount(660 * 661 // 2), last)
    assert cached["decoder"].again == pytest.approx(step["decoder"].forward - flops.operations(SEVEN_B, hard).computed)


def test_what_is_frozen_costs_no_weight_gradient_and_what_trains_does() -> None:
    config, kind = one_layer(), step_kind(1, LossConfig())
    counts = padded_counts(config, kind, SHAPES)
    frozen = clip_flops(config, counts, select(config, TrainableConfig()))
    whole = clip_flops(config, counts, select(config, TrainableConfig(recipe="all")))
    keys, others = 2 * 256 * 128, 256 * 512 * 3 + 2 * 256 * 256
    tokens, pooled = counts.with_gradient.tokens, counts.with_gradient.last_tokens
    assert whole["decoder"].weights - frozen["decoder"].weights == 2 * (2 * keys * tokens + others * (tokens + pooled))
    assert frozen["decoder"].activations == whole["decoder"].activations
    assert frozen["vision"].weights == 0 and whole["vision"].weights == whole["vision"].forward - 4 * 128 * 2 * 2 * 64**2


def test_a_release_step_costs_more_and_caching_a_forward_more() -> None:
    sizes, losses = ClipSizes(), LossConfig()
    ours, cached, theirs = (
        total(mean(made))
        for made in (
            per_triple(SEVEN_B, sizes, losses),
            per_triple(SEVEN_B, sizes, losses, cached=True),
            released_per_triple(SEVEN_B, sizes, losses),
        )
    )
    assert ours < theirs < cached
    assert f"{theirs / 1e12:.2f}" in table(mean(released_per_triple(SEVEN_B, sizes, losses))).splitlines()[-1]


def test_windows_and_ragged_sizes_are_counted() -> None:
    """9 x 10 patches in windows of 8 x 8: 64 + 16 + 8 + 2 patches; 250 frames: a chunk of 100 convolved frames and one of 25."""
    sizes = ClipSizes(grid=VideoGrid((1, 9, 10), 2.0), mel_frames=250)
    counts = released_counts(SEVEN_B, step_kind(0, LossConfig()), sizes)
    vision, audio = (
        sum(term.pairs.computed for term in counts.towers[name] if isinstance(term, flops.Attention)) for name in ("vision", "audio")
    )
    assert vision == 2 * (4 * 90**2 + 28 * (64**2 + 16**2 + 8**2 + 2**2))
    assert audio == 2 * 32 * (100**2 + 25**2)
