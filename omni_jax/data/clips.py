"""What a training set offers: clips by number, and what is known of each before it is read.

Letters: N clips, t temporal steps, h and w patches of a frame, P patches of a step.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol

from omni_jax.config import Preset
from omni_jax.types import Clip, VideoGrid


@dataclasses.dataclass(frozen=True)
class ClipInfo:
    """What is known of a clip before it is read.

    Attributes:
      id, caption: of its record.
      grid: of its video; None where only reading shows it.
      samples: of the waveform; None likewise.
      silent: whether silence stands in for a missing audio track.
      timestamps: seconds, [start, end), of its record's files; None for whole files, and for clips that were cut already.
      video, audio: its record's files; None where there is none, or it is not known any more.
    """

    id: str
    caption: str
    grid: VideoGrid | None = None
    samples: int | None = None
    silent: bool = False
    timestamps: tuple[float, float] | None = None
    video: str | None = None
    audio: str | None = None


def digest_line(clip: ClipInfo) -> bytes:
    """Returns what a digest of a source's clips takes of one of them: what is known before it is read.

    Paths are not in it, since files may move; nor is what only decoding streamed media shows.
    """
    grid = (clip.grid.thw, clip.grid.second_per_grid) if clip.grid else (None, None)
    return f"{json.dumps((clip.id, clip.caption, *grid, clip.samples, clip.silent, clip.timestamps))}\n".encode()


def same_as(source: ClipSource, modality: str | None, number: int) -> Hashable:
    """Returns what is equal for clips whose caption, sound or picture is known to be equal: one part of a file, or no sound."""
    clip = source.record(number)
    file = clip.audio if modality == "audio" else clip.video
    if modality == "text":
        return clip.caption
    return "silent" if modality == "audio" and clip.silent else (file, clip.timestamps) if file is not None else number


@dataclasses.dataclass(frozen=True)
class Limits:
    """The largest clip of a source: t steps, P patches of a step, samples of the waveform."""

    steps: int
    patches: int
    samples: int


class ClipSource(Protocol):
    """N clips by number. Sources can be pickled; a copy opens its files again."""

    @property
    def preset(self) -> Preset:
        """How its clips were or are decoded."""
        ...

    @property
    def limits(self) -> Limits:
        """What every clip fits."""
        ...

    @property
    def ids(self) -> Sequence[str]:
        """The N ids."""
        ...

    @property
    def captions(self) -> Sequence[str]:
        """The N captions."""
        ...

    @property
    def silent(self) -> int:
        """How many clips have silence in place of sound."""
        ...

    def __len__(self) -> int: ...

    def numbers_of(self, ids: Sequence[str]) -> Iterable[int]:
        """Returns the numbers of the clips that have one of these ids."""
        ...

    def record(self, index: int) -> ClipInfo:
        """Returns what is known of a clip without reading it."""
        ...

    def load(self, index: int) -> Clip:
        """Returns a clip with frames at training size and waveform. Raises ClipError where it cannot be used."""
        ...
