"""Upper rungs on released weights: towers and bridge against the PyTorch reference, and the NumPy rewrite against it too."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni_jax.model import Encoder
from tests.golden_set import GoldenSet
from tests.model import builders, golden_inputs, reference_towers
from tests.model.reference import Weights
from tests.tolerances import assert_close

pytestmark = [pytest.mark.jit, pytest.mark.exact]


def each_clip(golden: GoldenSet, name: str, compute: Callable[[int], np.ndarray]) -> None:
    """Compares one array of every clip; the failure says which clip."""
    assert golden.clips > 0
    for clip in range(golden.clips):
        try:
            assert_close(compute(clip), golden.base[f"{clip}/{name}"], name)
        except AssertionError as e:
            e.add_note(f"clip {clip}")
            raise


def test_golden_video_tokens(golden: GoldenSet, golden_base: Encoder):
    def compute(clip: int) -> np.ndarray:
        tokens = builders.run(golden_base, *golden_inputs.video(golden, golden_base.config, clip), method="video_tokens")
        return np.asarray(tokens).reshape(-1, tokens.shape[-1])

    each_clip(golden, "video_tokens", compute)


def test_golden_whisper_tokens(golden: GoldenSet, golden_base: Encoder):
    def compute(clip: int) -> np.ndarray:
        mel, frames = golden_inputs.mel_chunks(golden, golden_base.config, clip)
        return golden_inputs.valid_tokens(builders.run(golden_base, mel, frames, method="whisper_tokens"), frames)

    each_clip(golden, "whisper_tokens", compute)


def test_golden_beats_features(golden: GoldenSet, golden_base: Encoder):
    def compute(clip: int) -> np.ndarray:
        fbank, frames = golden_inputs.fbank(golden, golden_base.config, clip)
        features, patches = builders.run(golden_base.beats, fbank, frames, dtype=jnp.float32)
        return np.asarray(features)[0, : int(patches[0])]

    each_clip(golden, "beats_features", compute)


def test_golden_bridge_on_the_reference_features(golden: GoldenSet, golden_base: Encoder):
    def compute(clip: int) -> np.ndarray:
        tokens = int(golden.inputs[f"{clip}/audio_tokens"])
        return np.asarray(builders.run(golden_base.bridge, golden.base[f"{clip}/beats_features"][None], tokens=tokens))[0]

    each_clip(golden, "beats_tokens", compute)


def test_golden_beats_tokens(golden: GoldenSet, golden_base: Encoder):
    def compute(clip: int) -> np.ndarray:
        tokens = int(golden.inputs[f"{clip}/audio_tokens"])
        got = builders.run(golden_base, *golden_inputs.fbank(golden, golden_base.config, clip), method="beats_tokens", max_tokens=tokens)
        return np.asarray(got)[0]

    each_clip(golden, "beats_tokens", compute)


@pytest.fixture(scope="module")
def weights(golden_base: Encoder) -> Weights:
    """The golden weights in float64."""
    flat = nnx.to_flat_state(nnx.state(golden_base, nnx.Param))
    return Weights({"/".join(str(p) for p in path): np.asarray(leaf[...]) for path, leaf in flat})


def test_golden_rewrite_of_the_audio_tower(golden: GoldenSet, golden_base: Encoder, weights: Weights):
    """The ladder's own yardstick measured: where this fails the rewrite is wrong, not the model."""
    mel = golden.inputs["0/log_mel"].T[: int(golden.inputs["0/mel_frames"])].astype(np.float64)
    size = golden_base.config.audio.chunk_frames
    got = reference_towers.audio_tower(weights / "audio", golden_base.config.audio, mel[:size])
    assert_close(got, golden.base["0/whisper_tokens"][: len(got)], "whisper_tokens")


def test_golden_rewrite_of_the_vision_tower(golden: GoldenSet, golden_base: Encoder, weights: Weights):
    _, h, w = (int(n) for n in golden.inputs["0/grid_thw"][0])
    step = golden.inputs["0/pixel_values"][: h * w].astype(np.float64)
    got = reference_towers.vision_tower(weights / "vision", golden_base.config.vision, step, h, w)
    assert_close(got, golden.base["0/video_tokens"][: len(got)], "video_tokens")


def test_golden_rewrite_of_beats(golden: GoldenSet, golden_base: Encoder, weights: Weights):
    config = golden_base.config.beats
    features = reference_towers.beats(weights / "beats", config, golden.inputs["0/fbank"].astype(np.float64))
    assert_close(features, golden.base["0/beats_features"], "beats_features")
    tokens = int(golden.inputs["0/audio_tokens"])
    assert_close(reference_towers.bridge(weights / "bridge", features, tokens), golden.base["0/beats_tokens"], "beats_tokens")
