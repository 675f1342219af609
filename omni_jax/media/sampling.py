"""Which frames of a clip are taken (SPEC section 2, and the samplers of WAVE and mteb).

Letters: F frames sampled, n frames of the clip.
"""

from __future__ import annotations

import dataclasses
import os

import numpy as np

from omni_jax.config import Preset
from omni_jax.types import ClipError


@dataclasses.dataclass(frozen=True)
class FrameRule:
    """How many frames of a clip are taken, and which; the fields are those of `config.Preset`.

    Attributes:
      frames: F where `fps` is 0.
      fps: frames a second; F then depends on the clip's length.
      max_frames: most frames taken by `fps`; 0 for no limit.
      rounding: "floor": F places evenly spaced over the clip, rounded down, some twice where n < F; by `fps`, F is the length times fps,
        rounded. As OmniRetriever and WAVE train. "nearest": the same places rounded to the nearest, half to even, or place i * n // F
        where n < F; by `fps`, F is the length times fps, rounded down, at most n. As mteb from 2.26 on. "stride": every
        max(1, n // F)-th frame from the first, the clip over again where n < F; by `fps`, F as under "nearest". As mteb before 2.26.
    """

    frames: int
    fps: float = 0.0
    max_frames: int = 0
    rounding: str = "floor"

    @classmethod
    def of(cls, preset: Preset) -> FrameRule:
        return cls(preset.frames, preset.fps, preset.max_frames, preset.frame_rounding)

    def places(self, first: int, last: int, seconds: float) -> np.ndarray:
        """Returns the (F,) int64 frames to take of those from `first` to `last`, which span so many seconds; F >= 1."""
        n = last - first + 1
        count = self._count(n, seconds)
        if self.rounding == "stride":
            return first + np.resize(np.arange(0, n, max(1, n // count))[:count], count)
        if self.rounding == "nearest" and n < count:
            return first + np.arange(count) * n // count
        even = np.linspace(first, last, count)
        return (even.round() if self.rounding == "nearest" else np.floor(even)).astype(np.int64)

    def _count(self, n: int, seconds: float) -> int:
        if not self.fps:
            return self.frames
        exact = seconds * self.fps
        count = max(1, round(exact) if self.rounding == "floor" else min(int(exact), n))
        return min(count, self.max_frames or count)


def sample_indices(
    num_frames: int,
    fps: float,
    frames: int | FrameRule,
    timestamps: tuple[float, float] | None = None,
    path: os.PathLike[str] | str = "clip",
) -> tuple[np.ndarray, float]:
    """Returns the (F,) int64 indices of the frames to take and the length they span in seconds.

    Args:
      num_frames: frames of the whole stream.
      fps: its average frames per second.
      frames: how many, spread as in training, or a rule.
      timestamps: (start, end) seconds of the part to sample; None for the whole stream.

    Raises:
      ClipError: when the clip ends before `timestamps` start.
    """
    rule = frames if isinstance(frames, FrameRule) else FrameRule(frames)
    last, length = num_frames - 1, num_frames / fps
    if timestamps is None:
        return rule.places(0, last, length), length
    start, end = timestamps
    if start >= length:
        raise ClipError(f"{path}: timestamps start at {start:g} s, but the video is {length:.6g} s long; correct the record")
    first = min(round(start * fps), last)  # the end of the last frame's interval may round to the frame after it
    seconds = min(end, length) - start
    return rule.places(first, max(first, min(round(end * fps), last)), seconds), seconds
