"""The pictures and sounds of the synthetic clips, and the mp4 files they are put in.

A clip is drawn from four attribute values and a random generator; the generator decides everything that means nothing: place, size, tilt,
drift, tint, a distractor, stripes and grain of the picture; phase, detuning, gain and noise level of the sound.

Letters: F frames, N side of a square frame in pixels, T samples.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

RATE = 16_000  # samples per second
FPS = 8

SHAPES = ("disc", "ring", "cross", "plank", "pillar")
COLORS = {"red": (225, 45, 40), "green": (60, 205, 60), "blue": (60, 95, 245), "yellow": (240, 220, 50), "white": (242, 242, 242)}
DYNAMICS = ("still", "brightening", "dimming", "blinking", "growing")
BACKGROUNDS = {"black": (12, 12, 12), "brown": (115, 72, 30), "purple": (105, 40, 135), "teal": (15, 120, 120), "graded": None}

PITCHES = tuple(150.0 * 2**octave for octave in range(5))  # Hz
TIMBRES = ("sine", "odd", "saw", "vibrato", "inharmonic")
RHYTHMS = ("steady", "rising", "falling", "slow", "fast")
NOISES = ("none", "white", "rumble", "high", "crackle")

_PULSES = {"slow": 3.0, "fast": 10.0}  # per second
_GLIDE = 0.4  # octaves to either side of the pitch, so that neighbouring pitches stay apart


def picture(values: tuple[int, int, int, int], rng: np.random.Generator, frames: int, side: int) -> np.ndarray:
    """Returns a moving picture (F, N, N, 3) uint8.

    Args:
      values: places in SHAPES, COLORS, DYNAMICS and BACKGROUNDS.
      rng: source of what means nothing.
      frames: F.
      side: N, even.
    """
    shape, dynamics = SHAPES[values[0]], DYNAMICS[values[2]]
    color = np.array(list(COLORS.values())[values[1]]) + rng.normal(0, 7, 3)
    place, drift = rng.uniform(-0.12, 0.12, 2), rng.uniform(-0.08, 0.08, 2)
    size, tilt = rng.uniform(0.27, 0.33), rng.uniform(-0.2, 0.2)
    spot, spot_size = rng.choice([-0.42, 0.42], 2), rng.uniform(0.04, 0.07)
    stripes = 5 * np.sin(rng.uniform(0.5, 1.2) * np.arange(side) + rng.uniform(0, 6))
    y, x = np.mgrid[0:side, 0:side] / (side - 1) - 0.5
    ground = _background(list(BACKGROUNDS)[values[3]], y) + (stripes if rng.random() < 0.5 else stripes[:, None])[..., None]
    edge = 1.0 / side
    distractor = _soft(spot_size - np.maximum(abs(x - spot[0]), abs(y - spot[1])), edge)[..., None]
    ground = ground + distractor * (110 - ground)
    out = np.empty((frames, side, side, 3), np.uint8)
    for f in range(frames):
        at = f / max(frames - 1, 1)
        strength, growth = _moment(dynamics, at)
        dx, dy = x - place[0] - drift[0] * (at - 0.5), y - place[1] - drift[1] * (at - 0.5)
        mask = _soft(_inside(shape, dx, dy, size * growth, tilt), edge)[..., None] * strength
        frame = ground + mask * (color - ground) + rng.normal(0, 3, ground.shape)
        out[f] = np.clip(frame, 0, 255)
    return out


def sound(values: tuple[int, int, int, int], rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Returns a sound (T,) float32 at 16 kHz, peak below 1.

    Args:
      values: places in PITCHES, TIMBRES, RHYTHMS and NOISES.
      rng: source of what means nothing.
      seconds: length.
    """
    pitch, timbre, rhythm, noise = PITCHES[values[0]], TIMBRES[values[1]], RHYTHMS[values[2]], NOISES[values[3]]
    count = round(seconds * RATE)
    at = np.arange(count) / RATE
    octaves = {"rising": _GLIDE, "falling": -_GLIDE}.get(rhythm, 0.0) * (2 * at / seconds - 1)
    frequency = pitch * rng.uniform(0.96, 1.04) * 2**octaves
    if timbre == "vibrato":
        frequency = frequency * (1 + 0.06 * np.sin(2 * np.pi * 7 * at + rng.uniform(0, 6)))
    phase = 2 * np.pi * np.cumsum(frequency) / RATE + rng.uniform(0, 6)
    wave = np.zeros(count)
    for ratio, weight in _partials(timbre):
        # Above half the rate a partial would come back as another tone.
        wave += np.where(ratio * frequency < 0.47 * RATE, weight * np.sin(ratio * phase), 0)
    wave /= np.sqrt(np.mean(wave**2)) + 1e-9
    if rhythm in _PULSES:
        wave *= np.sin(2 * np.pi * _PULSES[rhythm] * at + rng.uniform(0, 6)) > 0
    mixed = 0.12 * wave + rng.uniform(0.05, 0.08) * _noise(noise, rng, count)
    return np.clip(rng.uniform(0.7, 1.3) * mixed, -0.99, 0.99).astype(np.float32)


def write_mp4(path: Path, frames: np.ndarray, samples: np.ndarray) -> None:
    """Writes frames (F, N, N, 3) and samples (T,) as H.264 and AAC.

    The same input gives the same bytes as long as the encoders stay the same.
    """
    import av

    with av.open(path, "w", format="mp4", options={"fflags": "bitexact"}) as container:
        video: Any = container.add_stream("libx264", rate=Fraction(FPS))
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        video.options = {"threads": "1", "preset": "ultrafast", "crf": "14"}
        audio: Any = container.add_stream("aac", rate=RATE, layout="mono")
        audio.bit_rate = 96_000
        audio.options = {"aac_coder": "fast"}  # half the time of a clip, and nearer to the samples than the default at this rate
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode(None))
        block = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[None], np.float32), format="fltp", layout="mono")
        block.sample_rate, block.pts, block.time_base = RATE, 0, Fraction(1, RATE)
        container.mux(audio.encode(block))
        container.mux(audio.encode(None))


def _background(name: str, y: np.ndarray) -> np.ndarray:
    color = BACKGROUNDS[name]
    if color is None:  # dark above, light below
        return np.repeat((95 + 150 * y)[..., None], 3, axis=-1)
    return np.broadcast_to(np.array(color, float), (*y.shape, 3))


def _moment(dynamics: str, at: float) -> tuple[float, float]:
    """Returns how opaque the shape is at a moment from 0 to 1, and how much larger than its size."""
    if dynamics == "blinking":
        return (1.0 if int(at * 3.999) % 2 == 0 else 0.15), 1.0
    strength = {"brightening": 0.25 + 0.75 * at, "dimming": 1.0 - 0.75 * at}.get(dynamics, 1.0)
    return strength, 0.5 + 0.85 * at if dynamics == "growing" else 1.0


def _inside(shape: str, dx: np.ndarray, dy: np.ndarray, size: float, tilt: float) -> np.ndarray:
    """Returns the distance into a shape of this radius, negative outside."""
    u, v = np.cos(tilt) * dx + np.sin(tilt) * dy, np.cos(tilt) * dy - np.sin(tilt) * dx
    if shape == "disc":
        return size - np.hypot(u, v)
    if shape == "ring":
        return 0.22 * size - abs(np.hypot(u, v) - 0.85 * size)
    wide = np.minimum(1.15 * size - abs(u), 0.28 * size - abs(v))
    tall = np.minimum(1.15 * size - abs(v), 0.28 * size - abs(u))
    return {"plank": wide, "pillar": tall, "cross": np.maximum(wide, tall)}[shape]


def _soft(distance: np.ndarray, edge: float) -> np.ndarray:
    return np.clip(distance / edge + 0.5, 0, 1)


def _partials(timbre: str) -> list[tuple[float, float]]:
    """Returns (multiple of the pitch, amplitude) of each partial."""
    if timbre == "odd":
        return [(k, 1 / k) for k in range(1, 12, 2)]
    if timbre == "saw":
        return [(k, 1 / k**0.7) for k in range(1, 12)]
    if timbre == "inharmonic":
        return [(1.0, 1.0), (2.76, 0.8), (4.3, 0.6)]
    return [(1, 1.0)]


def _noise(name: str, rng: np.random.Generator, count: int) -> np.ndarray:
    """Returns noise (T,) of root mean square about 1."""
    if name == "none":
        return np.zeros(count)
    if name == "crackle":
        clicks = (rng.random(count) < 40 / RATE) * rng.choice([-1.0, 1.0], count)
        return 18 * np.convolve(clicks, np.exp(-np.arange(64) / 6.0))[:count]
    white = rng.standard_normal(count)
    if name == "white":
        return white
    spectrum, hertz = np.fft.rfft(white), np.fft.rfftfreq(count, 1 / RATE)
    kept = np.fft.irfft(np.where(hertz < 120 if name == "rumble" else hertz > 5000, spectrum, 0), count)
    return kept / (np.sqrt(np.mean(kept**2)) + 1e-9)
