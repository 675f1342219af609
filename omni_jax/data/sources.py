"""Random access to the clips of a training set: from prepared shards, or straight from media files.

Letters: N clips, F frames, t temporal steps, h and w patches of a frame, k audio tokens before doubling.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePath

import numpy as np

from omni_jax.config import BeatsConfig, Preset
from omni_jax.data.clips import ClipInfo, ClipSource, Limits
from omni_jax.data.formats.table import is_source
from omni_jax.data.loading import DECODE_LIMIT_S, load_training_clip
from omni_jax.data.manifest import Problem, read_manifest
from omni_jax.data.record_cache import RecordCache
from omni_jax.features.audio import HOP, KALDI_WINDOW, SAMPLE_RATE, audio_tokens
from omni_jax.features.vision import PATCH, smart_resize, temporal_steps
from omni_jax.io.remote import is_remote
from omni_jax.media.workers import Guarded
from omni_jax.types import Clip, InputError, Record

MANIFESTS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".tar")
LONGEST_ASPECT = 4  # of a streamed clip's frames: shapes are fixed before any of them is seen


class MediaSource:
    """Clips decoded from their files whenever they are asked for, each in a process that can be killed.

    Attributes:
      problems: lines of the manifest and records that cannot be trained on.
      notes: of the manifest.
    """

    def __init__(
        self,
        records: Sequence[Record],
        preset: Preset,
        *,
        problems: Sequence[Problem] = (),
        notes: Sequence[str] = (),
        timeout_s: float = DECODE_LIMIT_S,
    ) -> None:
        """Takes the records that have a caption and a video; the others become problems.

        Raises:
          InputError: when none is left, or when the preset keeps whole tracks or all frames, whose lengths are known only by decoding.
        """
        if not preset.most_frames:
            raise InputError("fps without max_frames samples clips of unknown length; run 'omni-jax prepare' first, or set max_frames")
        if preset.audio_seconds == 0:
            raise InputError("audio_seconds=0 keeps whole tracks of unknown length; run 'omni-jax prepare' first, or set a length")
        self.records, unfit = trainable(records)
        self.problems, self.notes = (*problems, *unfit), tuple(notes)
        if not self.records:
            first = f"; the first: {self.problems[0].reason}" if self.problems else ""
            raise InputError(f"no record can be trained on: each needs text and video{first}")
        self.preset = preset
        self.ids = [r.id for r in self.records]
        self.captions = [r.text or "" for r in self.records]
        self.silent = sum(r.audio is None for r in self.records)
        self.limits = Limits(
            temporal_steps(preset.most_frames),
            most_patches(*preset.areas),
            max(SAMPLE_RATE, round(preset.audio_seconds * SAMPLE_RATE)),
        )
        self._load = Guarded(load_training_clip, timeout_s)

    def __len__(self) -> int:
        return len(self.records)

    def record(self, index: int) -> ClipInfo:
        r = self.records[index]
        samples = self.limits.samples if self.preset.audio_pad else None
        video, audio = (None if file is None else str(file) for file in (r.video, r.audio))
        return ClipInfo(r.id, r.text or "", samples=samples, silent=audio is None, timestamps=r.timestamps, video=video, audio=audio)

    def numbers_of(self, ids: Sequence[str]) -> list[int]:
        """Returns the numbers of the clips that have one of these ids."""
        wanted = set(ids)
        return [number for number, name in enumerate(self.ids) if name in wanted]

    def load(self, index: int) -> Clip:
        record = self.records[index]
        return self._load((record, self.preset), name=str(record.video))


def open_source(
    path: os.PathLike[str] | str,
    preset: Preset,
    media_root: os.PathLike[str] | str | None = None,
    *,
    timeout_s: float = DECODE_LIMIT_S,
    cache: RecordCache | None = None,
) -> ClipSource:
    """Returns the clips of a folder that `omni-jax prepare` wrote, or of a manifest, in any format, whose files are decoded while training.

    Args:
      path: either may be in an object store, where the name of a manifest has one of the suffixes `MANIFESTS`.
      cache: of clips that are read from there.

    Raises:
      InputError: when there is neither, the shards are damaged or belong to another preset, or no record can be used.
    """
    if (Path(path).is_dir() and not is_source(path)) or (is_remote(path) and PurePath(path).suffix not in MANIFESTS):
        from omni_jax.data.shards import ShardSource  # the reader of shards is loaded for shards alone

        return ShardSource(path, preset, cache=cache)
    manifest = read_manifest(path, media_root)
    try:
        return MediaSource(manifest.records, preset, problems=manifest.problems, notes=manifest.notes, timeout_s=timeout_s)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def trainable(records: Sequence[Record]) -> tuple[list[Record], list[Problem]]:
    """Returns the records with caption and video, and the others as problems. A record without audio is trained with silence."""
    usable, unfit = [], []
    for r in records:
        lacking = [name for name, value in (("text", r.text), ("video", r.video)) if value is None]
        if lacking:
            unfit.append(Problem(r.id, r.line, "", f"record {r.id!r}: has no {' and no '.join(lacking)}; training needs both"))
        else:
            usable.append(r)
    return usable, unfit


def most_patches(smallest: int, largest: int) -> int:
    """Returns the most patches that a large frame of an aspect ratio up to LONGEST_ASPECT gets between areas in pixels."""
    sizes = [smart_resize(1000, round(1000 * aspect), smallest, largest) for aspect in np.linspace(1, LONGEST_ASPECT, 301)]
    return max(h * w for h, w in sizes) // PATCH**2


def tokens_of(samples: int) -> int:
    """Returns k, the audio tokens of a waveform of at most 300 s."""
    return audio_tokens(-(-samples // HOP))


def fbank_frames(samples: int) -> int:
    """Returns the fbank frames of a waveform that fill whole patches of BEATs."""
    return max(0, (samples - KALDI_WINDOW) // HOP + 1) // BeatsConfig.patch_size * BeatsConfig.patch_size
