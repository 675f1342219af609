"""Waveforms to log-mel and filter banks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_jax.config import preset
from omni_jax.features import audio, audio_segments, audio_tokens, kaldi_fbank, log_mel
from omni_jax.types import ClipError
from tests.golden_set import GoldenSet
from tests.tolerances import TOLERANCES, assert_close


def _noise(samples: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=samples) * 0.1).astype(np.float32)


def test_golden_log_mel(golden: GoldenSet) -> None:
    for i in range(golden.clips):
        mel = log_mel(golden.inputs[f"{i}/waveform"])
        assert_close(mel, golden.inputs[f"{i}/log_mel"], "log_mel")
        assert mel.shape[1] == int(golden.inputs[f"{i}/mel_frames"])
        assert audio_tokens(mel.shape[1]) == int(golden.inputs[f"{i}/audio_tokens"])
        assert_close(log_mel(golden.inputs[f"{i}/aug/waveform"]), golden.inputs[f"{i}/aug/log_mel"], "log_mel")


def test_golden_fbank(golden: GoldenSet) -> None:
    for i in range(golden.clips):
        assert_close(kaldi_fbank(golden.inputs[f"{i}/waveform"]), golden.inputs[f"{i}/fbank"], "fbank")


def test_golden_whole_tracks_of_the_second_backbone(golden_nemotron: GoldenSet) -> None:
    for i in range(golden_nemotron.clips):
        assert_close(log_mel(golden_nemotron.inputs[f"{i}/waveform"]), golden_nemotron.inputs[f"{i}/log_mel"], "log_mel")


@pytest.mark.parametrize("samples", [1, 39, 41, 159, 160, 161, 399, 480, 1600, 16001, 20806])
def test_short_padding_equals_300_seconds_of_zeros(samples: int) -> None:
    """Quirk of the reference: it pads to 300 s and keeps the frames that hold samples."""
    waveform = _noise(samples)
    padded = np.concatenate([waveform, np.zeros(audio.SEGMENT_SAMPLES // 50, np.float32)])
    frames = -(-samples // audio.HOP)
    mel = log_mel(waveform)
    assert mel.shape == (128, frames)
    np.testing.assert_allclose(mel, log_mel(padded)[:, :frames], atol=TOLERANCES["log_mel"][1])


@pytest.mark.parametrize("samples", [560, 16001, audio.HOP * (audio.BLOCK + 1)])
def test_log_mel_is_the_feature_extractor_s_of_transformers_bit_for_bit(samples: int) -> None:
    """The largest goes through two blocks."""
    waveform = _noise(samples)
    from transformers import WhisperFeatureExtractor  # takes a second, which each worker would wait for

    extract = WhisperFeatureExtractor(feature_size=128, hop_length=160, n_fft=400)
    padded = np.concatenate([waveform, np.zeros(audio.HOP, np.float32)])
    whole = extract(padded, sampling_rate=16_000, padding="do_not_pad", truncation=False, return_tensors="np")["input_features"][0]
    mel = log_mel(waveform)
    np.testing.assert_array_equal(mel, whole[:, : mel.shape[1]])


def test_constants_divide() -> None:
    assert audio.SEGMENT_SAMPLES == 30_000 * audio.HOP
    assert audio.HOP * 100 == audio.SAMPLE_RATE
    assert audio.KALDI_FFT == 512
    assert audio_tokens(800) == 200
    assert audio_tokens(30_000) == 7500


@given(frames=st.integers(1, 40_000))
def test_tokens_add_up_over_chunks(frames: int) -> None:
    """A clip's tokens are those of its 200-frame chunks, which the tower convolves alone."""
    chunks = [200] * (frames // 200) + [frames % 200] * (frames % 200 > 0)
    assert audio_tokens(frames) == sum(((c - 1) // 2 + 1) // 2 for c in chunks)


def _naive_fbank(waveform: np.ndarray) -> np.ndarray:
    """Kaldi's definition, one window and one bin at a time."""
    x = waveform.astype(np.float64) * 32768
    window = [(0.5 - 0.5 * np.cos(2 * np.pi * n / 399)) ** 0.85 for n in range(400)]

    def mel(f: float) -> float:
        return 1127 * np.log(1 + f / 700)

    low, high = mel(20.0), mel(8000.0)
    delta = (high - low) / 129
    rows = []
    for start in range(0, len(x) - 400 + 1, 160):
        frame = x[start : start + 400] - x[start : start + 400].mean()
        frame = np.array([frame[n] - 0.97 * frame[max(n - 1, 0)] for n in range(400)]) * window
        power = np.abs(np.fft.fft(np.concatenate([frame, np.zeros(112)]))) ** 2
        row = []
        for b in range(128):
            left, centre, right = low + b * delta, low + (b + 1) * delta, low + (b + 2) * delta
            energy = 0.0
            for k in range(256):
                m = mel(k * 16000 / 512)
                if left < m < right:
                    energy += power[k] * ((m - left) / (centre - left) if m <= centre else (right - m) / (right - centre))
            row.append(np.log(max(energy, 1.1920928955078125e-07)))
        rows.append(row)
    return (np.array(rows) - 15.41663) / (2 * 6.55582)


def test_fbank_against_the_definition() -> None:
    waveform = _noise(400 + 2 * 160 + 7)
    np.testing.assert_allclose(kaldi_fbank(waveform), _naive_fbank(waveform), atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(samples=st.integers(1, 4000))
def test_short_waveforms_never_crash(samples: int) -> None:
    bank = kaldi_fbank(_noise(samples))
    assert bank.shape == (max(0, (samples - 400) // 160 + 1), 128)
    frames = -(-samples // 160)
    if audio_tokens(frames) < 1:
        with pytest.raises(ClipError, match="too few"):
            audio_segments(_noise(samples), preset("mteb"))
    else:
        (segment,) = audio_segments(_noise(samples), preset("mteb"))
        assert segment.tokens == audio_tokens(frames)
        assert segment.log_mel.shape == (128, frames)


def test_silence_is_finite() -> None:
    (segment,) = audio_segments(np.zeros(16000, np.float32), preset("mteb"))
    assert np.isfinite(segment.log_mel).all()
    assert np.isfinite(segment.fbank).all()


@pytest.mark.parametrize(("tail", "segments"), [(0, 1), (100, 1), (480, 2), (8000, 2)])
def test_long_audio_is_cut_every_300_seconds(monkeypatch: pytest.MonkeyPatch, tail: int, segments: int) -> None:
    """Run with a 2-second limit; a tail too short for a token is left out."""
    monkeypatch.setattr(audio, "SEGMENT_SAMPLES", 2 * audio.SAMPLE_RATE)
    waveform = _noise(2 * audio.SAMPLE_RATE + tail)
    found = audio_segments(waveform, preset("mteb"))
    assert len(found) == segments
    assert [s.tokens for s in found] == [50, audio_tokens(-(-tail // 160))][:segments]
    np.testing.assert_array_equal(found[0].log_mel, log_mel(waveform[: 2 * audio.SAMPLE_RATE]))
    if segments == 2:
        np.testing.assert_array_equal(found[1].log_mel, log_mel(waveform[2 * audio.SAMPLE_RATE :]))


def test_empty_and_broken_audio_are_refused() -> None:
    with pytest.raises(ClipError, match="0 samples"):
        audio_segments(np.zeros(0, np.float32), preset("training"))
    with pytest.raises(ClipError, match="not finite"):
        audio_segments(np.array([0.0, np.nan] * 1000, np.float32), preset("training"))
    with pytest.raises(ClipError, match="one channel"):
        audio_segments(np.zeros((2, 1000), np.float32), preset("training"))
