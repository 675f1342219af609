"""The augmented copy of a clip. Source: SPEC section 6, each change with probability one half.

Pure functions of what is changed and of a random stream. Letters: F frames, N samples.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from omni_jax.config.batches import AugmentConfig
from omni_jax.types import Clip

PROBABILITY = 0.5
COLOUR = (0.8, 1.2)  # factors of brightness, contrast and saturation
GAIN = (0.8, 1.2)
NOISE = (0.001, 0.01)  # of the peak
SPEED = (0.9, 1.1)
SHIFT = 0.1  # of the length, either way
DROPPED = (0.1, 0.2)  # share of the words
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def augment_clip(clip: Clip, rng: np.random.Generator, config: AugmentConfig) -> Clip:
    """Returns a copy with changed frames and sound, of the same shapes. `augment_text` changes its caption."""
    # A stream for each part: switching one off leaves the others' changes as they were.
    picture, sound = rng.spawn(2)
    video, waveform = clip.video, clip.waveform
    if config.video and video is not None:
        video = dataclasses.replace(video, frames=augment_frames(video.frames, picture))
    if config.audio and waveform is not None:
        waveform = augment_waveform(waveform, sound)
    return dataclasses.replace(clip, video=video, waveform=waveform)


def augment_frames(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns (F, height, width, 3) uint8: perhaps mirrored, brighter or darker, of other contrast, of other saturation.

    The three changes of colour are one linear map of each pixel, rounded once; contrast pulls towards the clip's mean luma.
    """
    flip, *chosen = (rng.random(4) < PROBABILITY).tolist()
    brightness, contrast, saturation = (float(f) if on else 1.0 for f, on in zip(rng.uniform(*COLOUR, 3), chosen, strict=True))
    if any(chosen):
        grey = np.broadcast_to(LUMA[:, None], (3, 3))  # every channel becomes the luma
        mean = float(frames.reshape(-1, 3).mean(axis=0, dtype=np.float64) @ LUMA) * brightness
        matrix = (brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * grey)).astype(np.float32)
        changed = frames.reshape(-1, 3).astype(np.float32) @ matrix + np.float32((1 - contrast) * mean + 0.5)
        frames = np.clip(changed, 0, 255).astype(np.uint8).reshape(frames.shape)
    return np.ascontiguousarray(frames[:, :, ::-1]) if flip else frames


def augment_waveform(waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns (N,) float32: perhaps slower or faster, shifted in a circle, louder or softer, with white noise. Silence stays silence.

    A faster copy ends in zeros, a slower one is cut, so that the length is kept.
    """
    speed, shift, gain, noise = (rng.random(4) < PROBABILITY).tolist()
    factor, turn, loudness, level = rng.uniform(*SPEED), rng.uniform(-SHIFT, SHIFT), rng.uniform(*GAIN), rng.uniform(*NOISE)
    if speed:
        places = np.arange(waveform.size)
        waveform = np.interp(places * factor, places, waveform, right=0.0).astype(np.float32)
    if shift:
        waveform = np.roll(waveform, round(turn * waveform.size))
    if gain:
        waveform = waveform * np.float32(loudness)
    if noise and (peak := float(np.abs(waveform).max(initial=0.0))) > 0:
        waveform = waveform + np.float32(level * peak) * rng.standard_normal(waveform.size, np.float32)
    return waveform


def augment_text(text: str, rng: np.random.Generator) -> str:
    """Returns a caption that perhaps lacks 10-20 % of its words (of more than 3) and has one or two neighbours swapped (of more than 2)."""
    drop, swap = (rng.random(2) < PROBABILITY).tolist()
    share, swaps = rng.uniform(*DROPPED), int(rng.integers(1, 3))
    words = text.split()
    before = list(words)
    if drop and len(words) > 3:
        gone = rng.choice(len(words), max(1, round(share * len(words))), replace=False)
        words = [word for i, word in enumerate(words) if i not in set(gone.tolist())]
    if swap and len(words) > 2:
        for i in rng.integers(0, len(words) - 1, swaps):
            words[i], words[i + 1] = words[i + 1], words[i]
    return text if words == before else " ".join(words)
