"""Features of clips that were never filmed: right shapes, numbered contents."""

from __future__ import annotations

import numpy as np

from omni_jax.config import Preset
from omni_jax.features import audio_tokens, smart_resize
from omni_jax.features.audio import HOP, KALDI_WINDOW, SAMPLE_RATE, SEGMENT_SAMPLES
from omni_jax.types import AudioSegment, Features, Record, VideoGrid, VisionFeatures

# Width and height in pixels of common cameras, phones and video sites.
FORMATS = (
    *((1920, 1080), (1280, 720), (640, 480), (1080, 1920), (320, 240), (720, 720), (480, 360), (854, 480), (1440, 1080)),
    *((3840, 2160), (720, 1280), (1080, 1350), (640, 360), (400, 224), (2560, 1080), (1080, 2340), (352, 288), (160, 120)),
)
WORDS = ("ball", "red", "slow tone", "a", "dog barks", "footsteps", "in the rain")


def vision(grid: tuple[int, int, int], second_per_grid: float = 0.5, first: int = 0) -> VisionFeatures:
    """Patches whose first value is their number, counted from `first`."""
    t, h, w = grid
    patches = np.zeros((t * h * w, 1176), np.float32)
    patches[:, 0] = first + np.arange(len(patches))
    return VisionFeatures(patches, VideoGrid(grid, second_per_grid))


def audio(samples: int, first: int = 0) -> tuple[AudioSegment, ...]:
    """Segments whose frames hold their number, counted from `first`."""
    segments = []
    for start in range(0, samples, SEGMENT_SAMPLES):
        size = min(SEGMENT_SAMPLES, samples - start)
        frames = -(-size // HOP)
        mel, bank = np.zeros((128, frames), np.float32), np.zeros((max(0, (size - KALDI_WINDOW) // HOP + 1), 128), np.float32)
        mel[0], bank[:, 0] = first + np.arange(frames), first + np.arange(len(bank))
        if audio_tokens(frames) > 0:
            segments.append(AudioSegment(mel, bank, audio_tokens(frames)))
        first += frames
    return tuple(segments)


def clips(count: int, preset: Preset, seed: int, seconds: tuple[float, float]) -> list[Features]:
    """Clips of common formats with captions of 1 to 25 words and audio between two lengths in seconds."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        width, height = FORMATS[rng.integers(len(FORMATS))]
        h, w = smart_resize(height, width, preset.pixels)
        grid = (preset.frames // 2, h // 14, w // 14)
        caption = " ".join(WORDS[n] for n in rng.integers(0, len(WORDS), rng.integers(1, 25)))
        samples = int(rng.uniform(*seconds) * SAMPLE_RATE)
        found.append(Features(Record(str(i), caption), vision(grid, float(rng.uniform(0.1, 5.0))), audio(samples)))
    return found
