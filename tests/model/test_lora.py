"""LoRA against weights with the adapter folded in; alpha never equals the rank, and A and B are never zero."""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.config import LoraConfig
from omni_jax.model import Encoder, layers
from omni_jax.model.decoder import Decoder
from tests.model import builders, reference, reference_towers
from tests.model.reference import Weights
from tests.tolerances import assert_close

pytestmark = pytest.mark.jit

ATTENTION = tuple(f"decoder/layers/attn/{m}" for m in "qkv")
OUTPUT_AND_MLP = ("decoder/layers/attn/o", *(f"decoder/layers/mlp/{m}" for m in ("gate", "up", "down")))
TOWERS = (
    "vision/layers/attn/q",
    "vision/layers/mlp/down",
    "vision/merger/fc1",
    "audio/layers/attn/k",
    "audio/layers/fc1",
    "audio/proj",
    "beats/layers/attn/q",
    "beats/layers/attn/gate",
    "beats/layers/fc2",
    "bridge/fc1",
)
# One layer of each tower: LoRA does not see how many there are.
BASE = dataclasses.replace(
    builders.ODD,
    decoder=dataclasses.replace(builders.ODD.decoder, num_layers=2),
    vision=dataclasses.replace(builders.ODD.vision, num_layers=2),
    audio=dataclasses.replace(builders.ODD.audio, num_layers=1),
    beats=dataclasses.replace(builders.ODD.beats, num_layers=1),
)
PROMPT = builders.random_prompt(1, 8, 4, BASE.decoder.vocab_size)
MEDIA = builders.noise(1, 4, BASE.decoder.hidden_size)
STEP = builders.noise(2, 4 * 6, BASE.vision.patch_values)
MEL = builders.noise(3, BASE.audio.chunk_frames, BASE.audio.num_mel_bins)
FBANK = builders.noise(4, 48, BASE.beats.num_mel_bins)


def decoder_outputs(encoder: Encoder) -> dict[str, np.ndarray]:
    """The prompt's embedding through each head."""
    rows = builders.pack([[(PROMPT, 1, 1)]], [[len(PROMPT) - 1]], len(PROMPT))
    fused, last = builders.run(encoder, rows, MEDIA, method="embed_rows")
    return {"fused": fused[0, 0], "last": last[0, 0]}


def tower_outputs(encoder: Encoder) -> dict[str, np.ndarray]:
    """The tokens of one temporal step, one chunk and one segment."""
    coords = np.array([reference_towers.patch_order(4, 6, BASE.vision.merge_size)])
    return {
        "video": builders.run(encoder, STEP[None], coords, np.zeros((1, len(STEP)), int), method="video_tokens")[0],
        "whisper": builders.run(encoder, MEL[None], np.array([len(MEL)]), method="whisper_tokens")[0],
        "beats": builders.run(encoder, FBANK[None], np.array([len(FBANK)]), method="beats_tokens", max_tokens=5)[0],
    }


def plain_decoder_outputs(w: Weights) -> dict[str, np.ndarray]:
    """`decoder_outputs` by the plain rewrite, which knows no adapters."""
    media = {place: MEDIA[index] for place, index in enumerate(PROMPT.media_index) if index >= 0}
    embeddings = reference.embed_prompt(w / "decoder", PROMPT.ids, media)
    states = reference.decoder(w / "decoder", BASE.decoder, embeddings, PROMPT.positions)[:, -1]
    return {"fused": reference.fusion_head(w / "head", states), "last": states[-1]}


def plain_tower_outputs(w: Weights) -> dict[str, np.ndarray]:
    """`tower_outputs` by the plain rewrite."""
    features = reference_towers.beats(w / "beats", BASE.beats, FBANK.astype(np.float64))
    return {
        "video": reference_towers.vision_tower(w / "vision", BASE.vision, STEP.astype(np.float64), 4, 6),
        "whisper": reference_towers.audio_chunk(w / "audio", BASE.audio, MEL.astype(np.float64)),
        "beats": reference_towers.bridge(w / "bridge", features, 5),
    }


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_scale(rslora: bool):
    lora = LoraConfig(rank=3, alpha=7.0, rslora=rslora)
    assert lora.scale == pytest.approx(7 / math.sqrt(3) if rslora else 7 / 3)


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_one_linear_map(rslora: bool):
    lora = LoraConfig(rank=3, alpha=7.0, rslora=rslora, targets=("there",))
    module, w = builders.random_part(lambda: layers.Linear(builders.maker(lora, "there"), 11, 9, ("embed", "heads")))
    x = builders.noise(1, 4, 11)
    factor = 7 / math.sqrt(3) if rslora else 7 / 3
    want = x @ w["kernel"] + w["bias"] + factor * (x @ w["lora_a"]) @ w["lora_b"]
    assert_close(builders.run(module, x), want, "layer")


def test_other_paths_get_no_slot():
    lora = LoraConfig(rank=3, targets=("there",))
    module = builders.random_part(lambda: layers.Linear(builders.maker(lora, "elsewhere"), 11, 9, ("embed", "heads")))[0]
    assert module.lora_a is None and module.lora_b is None


@pytest.mark.parametrize("part", ["attention", "output_and_mlp", "towers"])
def test_adapter_agrees_with_merged_weights(part: str):
    targets = {"attention": ATTENTION, "output_and_mlp": OUTPUT_AND_MLP, "towers": TOWERS}[part]
    lora = LoraConfig(rank=3, alpha=7.0, rslora=part == "output_and_mlp", targets=targets)
    encoder, w = builders.random_encoder(dataclasses.replace(BASE, lora=lora))
    assert {name.rsplit("/", 1)[0] for name in w.arrays if name.endswith("lora_a")} == set(targets)
    outputs, plain = (tower_outputs, plain_tower_outputs) if part == "towers" else (decoder_outputs, plain_decoder_outputs)
    got, want, without = outputs(encoder), plain(reference.merged(w, lora.scale)), plain(reference.merged(w, 0.0))
    for name, value in got.items():
        assert_close(value, want[name], "encoder")
        assert np.abs(want[name] - without[name]).max() > 1e-2, f"the adapter does not move {name}, so nothing was tested"


# ---------------------------------------------------------------------------------------------------------------------- dropout


def masks(path: str, dropout: float, key: jax.Array, shape: tuple[int, ...]) -> np.ndarray:
    """What a dropout leaves of ones: the adapter of an otherwise empty linear map, with A and B the identity and scale 1."""
    width = shape[-1]
    lora = LoraConfig(rank=width, alpha=float(width), dropout=dropout, targets=("first", "second"))
    module, _ = builders.random_part(lambda: layers.Linear(builders.maker(lora, path), width, width, ("embed", "heads"), bias=False))
    assert module.lora_a is not None and module.lora_b is not None
    module.kernel[...] = jnp.zeros((width, width))
    module.lora_a[...] = module.lora_b[...] = jnp.eye(width)
    return np.asarray(module(jnp.ones(shape), key))


def test_dropout_drops_its_share_and_keeps_the_mean():
    kept = masks("first", 0.3, jax.random.key(0), (500, 40))
    assert_close(np.unique(kept), np.array([0, 1 / 0.7]), "layer")
    dropped = (kept == 0).mean()
    assert abs(dropped - 0.3) < 5 * math.sqrt(0.3 * 0.7 / kept.size)
    # Over tokens and over features alike: no mask is shared along an axis.
    assert np.ptp((kept == 0).mean(axis=0)) > 0 and np.ptp((kept == 0).mean(axis=1)) > 0


def test_dropout_is_a_function_of_its_key_and_adapter():
    shape = (20, 16)
    first = masks("first", 0.5, jax.random.key(1), shape)
    assert np.array_equal(first, masks("first", 0.5, jax.random.key(1), shape))
    assert not np.array_equal(first, masks("first", 0.5, jax.random.key(2), shape))
    assert not np.array_equal(first, masks("second", 0.5, jax.random.key(1), shape))


def test_masks_of_one_draw_are_independent():
    """Every combination of what q, k and v drop is as frequent as its probability, and a fourth mask has a draw of its own."""
    rate, shape = 0.3, (500, 400)
    drops = [~np.asarray(layers.keep_mask(jax.random.key(3), stream, rate, shape)) for stream in range(4)]
    for which in itertools.product((False, True), repeat=4):
        share = np.mean(np.all([drop == on for drop, on in zip(drops, which, strict=True)], axis=0))
        likely = math.prod(rate if on else 1 - rate for on in which)
        assert abs(share - likely) < 5 * math.sqrt(likely * (1 - likely) / math.prod(shape)), which
    assert all(layers.keep_mask(jax.random.key(3), stream, 1e-12, (50, 40)).all() for stream in range(3))


def test_dropout_without_key_or_share_does_nothing():
    lora = LoraConfig(rank=3, alpha=7.0, dropout=0.4, targets=("there",))
    module, _ = builders.random_part(lambda: layers.Linear(builders.maker(lora, "there"), 11, 9, ("embed", "heads")))
    never, _ = builders.random_part(
        lambda: layers.Linear(builders.maker(dataclasses.replace(lora, dropout=0.0), "there"), 11, 9, ("embed", "heads"))
    )
    x = builders.noise(1, 4, 11)
    want = builders.run(module, x, None)
    assert_close(builders.run(never, x, jax.random.key(0)), want, "layer")
    assert np.abs(np.asarray(builders.run(module, x, jax.random.key(0))) - np.asarray(want)).max() > 1e-2


def test_dropout_of_the_decoder_is_a_function_of_its_key():
    lora = LoraConfig(rank=3, alpha=7.0, dropout=0.5, targets=ATTENTION)
    module, _ = builders.random_part(lambda: Decoder(builders.maker(lora, "decoder"), BASE.decoder))
    rows = jax.tree.map(jnp.asarray, builders.pack([[(PROMPT, 1, 1)]], [[len(PROMPT) - 1]], len(PROMPT)))

    @jax.jit
    def pooled(key: jax.Array | None) -> jax.Array:
        return module(**rows, media=jnp.asarray(MEDIA), dtype=jnp.dtype(jnp.float32), dropout_key=key)

    without, first, again, other = (np.asarray(pooled(key)) for key in (None, *(jax.random.key(n) for n in (1, 1, 2))))
    assert np.array_equal(first, again)
    for layer in range(BASE.decoder.num_layers):
        assert np.abs(first - other)[:, :, layer].max() > 1e-3 and np.abs(first - without)[:, :, layer].max() > 1e-3


def test_layers_draw_different_masks():
    lora = LoraConfig(rank=16, alpha=16.0, dropout=0.5, targets=("stack",))
    module, _ = builders.random_part(lambda: layers.Linear(builders.maker(lora, "stack").stack(4), 16, 16, ("embed", "heads"), bias=False))
    assert module.lora_a is not None and module.lora_b is not None
    module.kernel[...] = jnp.zeros((4, 16, 16))
    module.lora_a[...] = module.lora_b[...] = jnp.tile(jnp.eye(16), (4, 1, 1))
    keys = jax.random.split(jax.random.key(0), 4)

    def body(layer: layers.Linear, x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x, layer(x, key)

    _, kept = layers.scan_layers(module, body, jnp.ones((6, 16)), keys)
    assert len({np.asarray(layer).tobytes() for layer in kept}) == 4
