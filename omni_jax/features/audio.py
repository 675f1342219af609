"""Waveform to log-mel (Whisper) and filter banks (BEATs). Source: SPEC section 2.

Letters: F mel frames, F' filter-bank frames.
"""

from __future__ import annotations

import functools

import numpy as np

from omni_jax.config import AudioConfig, Preset
from omni_jax.types import AudioSegment, ClipError

SAMPLE_RATE = 16_000  # samples per second
MEL_BINS = AudioConfig.num_mel_bins
HOP = SAMPLE_RATE // 100  # samples between frames, 10 ms, of both spectrograms

WHISPER_WINDOW = SAMPLE_RATE // 40  # samples, 25 ms
WHISPER_FLOOR = 1e-10  # of a mel bin before the logarithm
BLOCK = 4096  # windows transformed at once: blocks bound the memory of a long track
SEGMENT_SECONDS = 300  # longest audio encoded in one piece
SEGMENT_SAMPLES = SEGMENT_SECONDS * SAMPLE_RATE

KALDI_WINDOW = SAMPLE_RATE // 40  # samples, 25 ms
KALDI_FFT = 1 << (KALDI_WINDOW - 1).bit_length()  # samples, the window rounded up to a power of two
KALDI_LOW = 20.0  # Hz, lower edge of the lowest bin; the upper edge of the highest is the Nyquist frequency
PREEMPHASIS = 0.97
POVEY_POWER = 0.85
LOG_FLOOR = float(np.finfo(np.float32).eps)  # 1.19e-7
PCM_SCALE = float(1 << 15)  # BEATs was trained on 16-bit samples
BEATS_MEAN, BEATS_STD = 15.41663, 6.55582  # of BEATs' training set; the division is by twice the deviation


def log_mel(waveform: np.ndarray) -> np.ndarray:
    """Returns (128, F) float32, F = ceil(samples / 160): Whisper's log-mel spectrogram as it is with 300 s of zero padding.

    160 zeros on the right give the same numbers as the reference's 300 s; without them the last frame differs by up to 0.19.

    Args:
      waveform: (samples,) at 16 kHz, at most 300 s.
    """
    frames = -(-waveform.size // HOP)
    # The spectrogram mirrors half a window at both ends, which needs more samples than that.
    zeros = max(HOP, WHISPER_WINDOW + HOP - waveform.size)
    padded = np.pad(waveform.astype(np.float32), (0, zeros))
    padded = np.pad(padded, WHISPER_WINDOW // 2, mode="reflect").astype(np.float64)
    filters, window = _whisper()
    windows = np.lib.stride_tricks.sliding_window_view(padded, WHISPER_WINDOW)[::HOP]
    power = np.empty((len(windows), WHISPER_WINDOW // 2 + 1))
    for start in range(0, len(windows), BLOCK):
        # complex64 between the transform and the power, as the feature extractor of transformers has it.
        spectrum = np.fft.rfft(windows[start : start + BLOCK] * window, axis=1).astype(np.complex64)
        power[start : start + BLOCK] = np.abs(spectrum, dtype=np.float64) ** 2.0
    mel = np.log10(np.maximum(WHISPER_FLOOR, filters.T @ power.T)).astype(np.float32)[:, :-1]
    mel = (np.maximum(mel, mel.max() - 8.0) + 4.0) / 4.0
    return np.ascontiguousarray(mel[:, :frames], np.float32)


@functools.cache
def _whisper() -> tuple[np.ndarray, np.ndarray]:
    """Returns Slaney's mel filters (WHISPER_WINDOW / 2 + 1, 128) and the periodic Hann window (WHISPER_WINDOW,), float64.

    They equal those of transformers' feature extractor bit for bit. It is not asked for them: its import takes over a second of each
    process that hears a clip, it transforms frame by frame in Python, and it computes otherwise where PyTorch is installed.
    """
    # 3/200 of a mel for each Hz up to 1,000 Hz; from there 27 mels for each factor of 6.4.
    step = np.log(6.4) / 27.0
    mels = np.linspace(0.0, 15.0 + np.log(SAMPLE_RATE / 2 / 1000.0) * (27.0 / np.log(6.4)), MEL_BINS + 2)
    edges = np.where(mels < 15.0, 200.0 * mels / 3.0, 1000.0 * np.exp(step * (mels - 15.0)))
    filters = _triangles(edges, np.linspace(0, SAMPLE_RATE // 2, WHISPER_WINDOW // 2 + 1))
    return filters * (2.0 / (edges[2:] - edges[:-2])), np.hanning(WHISPER_WINDOW + 1)[:-1]


def _triangles(edges: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Returns (places, bins): how far up the triangle of each bin a place is; `edges` are the peaks, with one before and one behind."""
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    at = at[:, None]
    return np.maximum(0.0, np.minimum((at - left) / (centre - left), (right - at) / (right - centre)))


def kaldi_fbank(waveform: np.ndarray) -> np.ndarray:
    """Returns (F', 128) float32, normalised for BEATs; F' counts the whole 25 ms windows, one each 10 ms (0 for a shorter waveform).

    Kaldi's log filter bank of the waveform times 2^15: povey window, no dither, snipped edges; float64 inside.

    Args:
      waveform: (samples,) at 16 kHz, -1..1.
    """
    samples = waveform.astype(np.float64) * PCM_SCALE
    if samples.size < KALDI_WINDOW:
        return np.zeros((0, MEL_BINS), np.float32)
    rows = []
    windows = np.lib.stride_tricks.sliding_window_view(samples, KALDI_WINDOW)[::HOP]
    for start in range(0, len(windows), BLOCK):
        x = windows[start : start + BLOCK]
        x = x - x.mean(axis=1, keepdims=True)
        before = np.concatenate([x[:, :1], x[:, :-1]], axis=1)
        x = (x - PREEMPHASIS * before) * _povey_window()
        power = np.square(np.abs(np.fft.rfft(x, KALDI_FFT, axis=1)))
        rows.append(np.log(np.maximum(power @ _kaldi_bins(), LOG_FLOOR)))
    bank = np.concatenate(rows)
    return ((bank - BEATS_MEAN) / (2 * BEATS_STD)).astype(np.float32)


@functools.cache
def _povey_window() -> np.ndarray:
    phase = 2 * np.pi * np.arange(KALDI_WINDOW) / (KALDI_WINDOW - 1)
    return (0.5 - 0.5 * np.cos(phase)) ** POVEY_POWER


@functools.cache
def _kaldi_bins() -> np.ndarray:
    """(KALDI_FFT/2 + 1, 128): triangles evenly spaced in mel; the Nyquist bin belongs to none."""

    def mel(hertz: np.ndarray | float) -> np.ndarray:
        return 1127.0 * np.log1p(np.asarray(hertz) / 700.0)

    edges = np.linspace(mel(KALDI_LOW), mel(SAMPLE_RATE / 2), MEL_BINS + 2)
    triangles = _triangles(edges, mel(np.arange(KALDI_FFT // 2) * (SAMPLE_RATE / KALDI_FFT)))
    return np.pad(triangles, ((0, 1), (0, 0)))


def audio_tokens(mel_frames: int) -> int:
    """Returns k, the audio tokens (before doubling) of so many mel frames: a stride-2 convolution, then pairs averaged."""
    return ((mel_frames - 1) // 2 + 1 - 2) // 2 + 1


def audio_segments(waveform: np.ndarray, preset: Preset) -> tuple[AudioSegment, ...]:
    """Returns the clip's audio in pieces of at most 300 s, each encoded on its own.

    A last piece too short for one token (less than three frames, 30 ms) is left out.

    Args:
      waveform: (samples,) at 16 kHz, cropped and padded as the preset says.
      preset: the preset the waveform was prepared with; only named in messages.

    Raises:
      ClipError: for a waveform too short for one token, or with samples that are not finite.
    """
    if waveform.ndim != 1:
        raise ClipError(f"audio has shape {waveform.shape}; one channel is expected; join its channels (preset channels={preset.channels})")
    if not np.isfinite(waveform).all():
        raise ClipError("audio has samples that are not finite (NaN or infinity); decode it again or remove the record")
    pieces = [waveform[start : start + SEGMENT_SAMPLES] for start in range(0, waveform.size, SEGMENT_SAMPLES)]
    segments = tuple(s for s in map(_segment, pieces) if s is not None)
    if not segments:
        raise ClipError(
            f"audio has {waveform.size} samples at 16 kHz, too few for one token; give one of at least 30 ms or remove the record"
        )
    return segments


def _segment(waveform: np.ndarray) -> AudioSegment | None:
    tokens = audio_tokens(-(-waveform.size // HOP))
    if tokens < 1:
        return None
    return AudioSegment(log_mel=log_mel(waveform), fbank=kaldi_fbank(waveform), tokens=tokens)
