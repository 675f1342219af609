"""What a run says before it begins: which of its data it will not use, or use otherwise than one might think."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from omni_jax.data.clips import ClipSource
from omni_jax.data.manifest import NEGATIVES
from omni_jax.data.negatives import LISTS
from omni_jax.data.plan import Planner
from omni_jax.data.sources import MediaSource
from omni_jax.train import RunConfig
from omni_jax.types import Record


def data_notes(run: RunConfig, source: ClipSource, planner: Planner, total: int) -> Iterator[str]:
    """Yields a line each for fields that are not read, clips that no step holds, clips without sound, hard negatives that are none.

    Args:
      total: steps of the run.
    """
    clips, size, per_epoch = len(source), run.batch.clips, planner.updates_per_epoch
    yield from (f"{run.data.train}: {note}" for note in getattr(source, "notes", ()))
    for name, section, path in (("data", run.data, run.data.train), ("evaluation", run.evaluation, run.evaluation.manifest)):
        if section.media_root and Path(path).is_dir():
            yield f"{name}.media_root={section.media_root} is not used: {path} is a prepared folder, which holds its media"
    if total <= per_epoch and total * size < clips:
        yield f"{total} steps of {size} clips take {total * size} of the {clips} clips; {clips - total * size} are never trained on"
    elif per_epoch * size < clips:
        left = clips - per_epoch * size
        yield f"an epoch of {per_epoch} steps of {size} clips leaves {left} of the {clips} clips out, other ones in each"
    yield from _mined_notes(run, source, planner)
    silent = source.silent
    if silent:
        why = "no audio field" if isinstance(source, MediaSource) else "no sound"
        yield f"{silent} of {clips} clips have {why} and are trained with silence" + ("; nothing is learned of sound" * (silent == clips))
    for name in ("audio", "video") if not run.losses.hn_audio_only else ("audio",):
        most = _most_alike(source, planner, name) if "hard" in run.losses.needs else 0
        if 2 * most > clips:
            yield (
                f"{most} of {clips} clips have the same {name}: where such clips fill more than half of a block, hard negatives that "
                f"exchange it equal their anchor (equal_hard in metrics.jsonl counts them)"
            )


def _most_alike(source: ClipSource, planner: Planner, modality: str) -> int:
    """Returns the largest number of clips that have one sound, or one picture; of prepared clips only silence is known to be equal."""
    if isinstance(source, MediaSource):
        return int(np.bincount(planner.alike(modality, np.arange(len(source)))).max())
    return source.silent if modality == "audio" else 1


def _mined_notes(run: RunConfig, source: ClipSource, planner: Planner) -> Iterator[str]:
    """Yields a line each for records without a mined negative, and for mined negatives that are not trained with."""
    negatives = planner.negatives
    if negatives is None:
        if isinstance(source, MediaSource) and any(NEGATIVES in record.extra for record in source.records):
            yield f"{run.data.train}: has mined negatives, which data.negatives=shuffle does not use; set it to mined or both"
        return
    path = run.data.mined or run.data.train
    if negatives.unknown:
        yield f"{path}: {negatives.unknown} of the mined clips are not trained on and are left out"
    for modality in ("audio",) if run.losses.hn_audio_only else LISTS:
        if len(without := negatives.without(modality)):
            first, lists = source.ids[int(without[0])], ", ".join(LISTS[modality])
            note = f"{len(without)} of {len(source)} records have no mined negative that exchanges {modality} (from {lists})"
            yield f"{path}: {note} and take another clip's of their step; the first: {first!r}"


def trained_too(source: ClipSource, records: Sequence[Record]) -> list[str]:
    """Returns the ids of held-out records that are trained on: those of equal id and caption, or of one part of one file."""
    names = [record.id for record in records]
    known = {(source.ids[number], source.captions[number]) for number in source.numbers_of(names)}
    files = {(str(r.video), r.timestamps) for r in source.records} if isinstance(source, MediaSource) else set()
    return [r.id for r in records if (r.id, r.text) in known or (str(r.video), r.timestamps) in files]
