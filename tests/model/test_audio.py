"""The audio tower's rungs; chunks of 28 frames, 7 tokens."""

from __future__ import annotations

import numpy as np
import pytest

from omni_jax.model import Encoder, audio
from tests.model import builders, reference_towers
from tests.model.reference import Weights
from tests.tolerances import assert_close

pytestmark = pytest.mark.jit

CFG = builders.ODD.audio
FRAMES = [28, 27, 13, 6, 3]  # odd and even counts, down to one token


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("frames", [2, 8])
def test_convolution(stride: int, frames: int):
    module, w = builders.random_part(lambda: audio.Conv3(builders.maker(), 5, 7, stride))
    x = builders.noise(1, 2, frames, 5)
    want = np.stack([reference_towers.conv3(w, item, stride) for item in x.astype(np.float64)])
    assert_close(builders.run(module, x), want, "layer")


def test_positions():
    assert_close(audio.sinusoids(50, 36), reference_towers.whisper_positions(50, 36), "layer")


@pytest.mark.parametrize("part", ["attention", "block"])
def test_one_block(part: str):
    kind, want = {"attention": (audio.Attention, reference_towers.audio_attention), "block": (audio.Block, reference_towers.audio_block)}[
        part
    ]
    module, w = builders.random_part(lambda: kind(builders.maker(), CFG))
    x = builders.noise(1, 1, 14, CFG.hidden_size)
    # Nine tokens are valid; the others must not be seen, whatever they hold.
    mask = np.tile(np.arange(14) < 9, (1, 14, 1))
    assert_close(builders.run(module, x, mask)[0, :9], want(w, CFG, x[0, :9]), "layer")


def test_tower_on_chunks_with_few_valid_frames(odd: tuple[Encoder, Weights]):
    encoder, w = odd
    mel = builders.noise(1, len(FRAMES), CFG.chunk_frames, CFG.num_mel_bins)  # noise beyond the valid frames too
    got = builders.run(encoder, mel, np.array(FRAMES), method="whisper_tokens")
    assert got.shape == (len(FRAMES), 7, CFG.output_size)
    for n, frames in enumerate(FRAMES):
        want = reference_towers.audio_chunk(w / "audio", CFG, mel[n, :frames])
        assert len(want) == ((frames - 1) // 2 + 1) // 2
        assert_close(got[n, : len(want)], want, "whisper_tokens")


def test_chunks_of_padding_alone_are_finite(odd: tuple[Encoder, Weights]):
    encoder, _ = odd
    mel = np.zeros((2, CFG.chunk_frames, CFG.num_mel_bins), np.float32)
    assert np.isfinite(builders.run(encoder, mel, np.array([0, 0]), method="whisper_tokens")).all()
