"""Which frames of a clip are taken (SPEC section 2, and the samplers of WAVE and mteb).

Letters: F frames sampled, n frames of the clip.
"""

from __future__ import annotations

import os

import numpy as np

from omni_jax.config import Preset
from omni_jax.types import ClipError


def sample_indices(
    num_frames: int,
    fps: float,
    rule: int | Preset,
    timestamps: tuple[float, float] | None = None,
    path: os.PathLike[str] | str = "clip",
) -> tuple[np.ndarray, float]:
    """Returns the (F,) int64 indices of the frames to take, F >= 1, and the length they span in seconds.

    By `fps` of a preset, where it is not 0, F is that length times `fps`, at most `max_frames`. `frame_rounding` says which are taken:
      floor     F places evenly spaced over the clip, rounded down, some twice where n < F; by `fps` F is rounded. As OmniRetriever and WAVE
                train.
      nearest   the same places rounded to the nearest, half to even, or place i * n // F where n < F; by `fps` F is rounded down, at most
                n. As mteb from 2.26 on.
      stride    every max(1, n // F)-th frame from the first, the clip over again where n < F; by `fps` F as under nearest. As mteb before
                2.26.

    Args:
      num_frames: frames of the whole stream.
      fps: its average frames per second.
      rule: F, spread as in training, or a preset.
      timestamps: (start, end) seconds of the part to sample; None for the whole stream.

    Raises:
      ClipError: when the clip ends before `timestamps` start.
    """
    last, length = num_frames - 1, num_frames / fps
    start, end = timestamps or (0.0, length)
    if start >= length:
        raise ClipError(f"{path}: timestamps start at {start:g} s, but the video is {length:.6g} s long; correct the record")
    first = min(round(start * fps), last)  # the end of the last frame's interval may round to the frame after it
    last, seconds = max(first, min(round(end * fps), last)), min(end, length) - start
    n = last - first + 1
    rounding, count = ("floor", rule) if isinstance(rule, int) else (rule.frame_rounding, rule.frames)
    if isinstance(rule, Preset) and rule.fps:
        exact = seconds * rule.fps
        count = max(1, round(exact) if rounding == "floor" else min(int(exact), n))
        count = min(count, rule.max_frames or count)
    if rounding == "stride":
        return first + np.resize(np.arange(0, n, max(1, n // count))[:count], count), seconds
    if rounding == "nearest" and n < count:
        return first + np.arange(count) * n // count, seconds
    even = np.linspace(first, last, count)
    return (even.round() if rounding == "nearest" else np.floor(even)).astype(np.int64), seconds
