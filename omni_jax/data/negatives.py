"""Mined hard negatives of a training set: from the ids that `omni-jax mine` wrote to clips whose caption, sound or picture is exchanged.

Letters: N clips of the source, B clips of a micro-batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from omni_jax.data.clips import ClipSource, same_as
from omni_jax.data.manifest import NEGATIVES, read_manifest
from omni_jax.data.order import RngStream, generator
from omni_jax.types import InputError

LISTS: Mapping[str, tuple[str, ...]] = {
    "text": ("av2t", "v2t", "a2t"),
    "audio": ("tv2a", "v2a", "t2a"),
    "video": ("at2v", "a2v", "t2v"),
}
"""What the hard negative exchanges -> the directions whose list gives it: what the tuple keeps asks for what it loses. A record takes the
first of them that has a valid id."""

SHARES: Mapping[str, float] = {"mined": 1.0, "both": 0.5}
"""`data.negatives` -> the share of hard negatives that are mined, among those of records that have one."""


@dataclasses.dataclass(frozen=True)
class MinedNegatives:
    """The mined hard negatives of the N clips of a source.

    Attributes:
      starts: modality -> (N + 1,) int64: clip i has the numbers `starts[i]` to `starts[i + 1]` of `clips`.
      clips: modality -> (n,) int64, clips of the source.
      share: of the hard negatives that are mined where there is one.
      unknown: ids that are records of the mined manifest, but not clips of the source: they are left out.
    """

    starts: Mapping[str, np.ndarray]
    clips: Mapping[str, np.ndarray]
    share: float = 1.0
    unknown: int = 0

    def without(self, modality: str) -> np.ndarray:
        """Returns the clips that have no valid negative for an exchange of this modality."""
        return np.flatnonzero(np.diff(self.starts[modality]) == 0)

    def drawn(self, seed: int, micro_batch: int, modality: str, clips: np.ndarray) -> np.ndarray:
        """Returns for each clip (B,) of micro-batch number `micro_batch` of the run one of its mined negatives, or -1: (B,) int64.

        Every call draws again. All negatives of a clip are equally likely.
        """
        first = self.starts[modality][clips]
        count = self.starts[modality][clips + 1] - first
        uniform = generator(seed, RngStream.MINED, micro_batch).random((2, len(clips)))
        taken = (count > 0) & (uniform[0] < self.share)
        place = first + np.minimum((uniform[1] * count).astype(np.int64), np.maximum(count - 1, 0))
        return np.where(taken, np.append(self.clips[modality], -1)[np.where(taken, place, -1)], -1)

    @property
    def digest(self) -> str:
        """The same for equal negatives."""
        digest = hashlib.blake2b(digest_size=16)
        for table in (self.starts, self.clips):
            for name in LISTS:
                digest.update(np.ascontiguousarray(table[name], "<i8").tobytes())
        return digest.hexdigest()


def read_negatives(path: os.PathLike[str] | str, source: ClipSource, negatives: str = "mined") -> MinedNegatives:
    """Returns the hard negatives that the records of a manifest list for the clips of a source.

    A negative that equals its clip in what is exchanged (caption, file, silence) is none, and is left out.

    Args:
      path: manifest that `omni-jax mine` wrote; it may hold more records than the source, and the source more than it.
      negatives: "mined" or "both", as in `data.negatives`.

    Raises:
      InputError: for a manifest without negatives of the source's clips, a list that is none, or an id that neither has.
    """
    manifest = read_manifest(path)
    number = {name: i for i, name in enumerate(source.ids)}
    # Also of records that cannot be used: one broken clip is no reason to stop.
    known = {*(r.id for r in manifest.records), *(p.id for p in manifest.problems if p.id is not None)}
    listed: list[Mapping[str, Sequence[str]]] = [{}] * len(source)
    for record in manifest.records:
        lists = _lists(record.extra.get(NEGATIVES, {}), f"{path}:{record.line}: record {record.id!r}")
        for direction, ids in lists.items():
            if strange := next((name for name in ids if name not in number and name not in known), None):
                raise InputError(
                    f"{path}:{record.line}: record {record.id!r}: its negatives of {direction} name {strange!r}, which is neither trained "
                    f"on nor a record of {path}; mine the negatives again from the manifest that is trained on"
                )
        if record.id in number:
            listed[number[record.id]] = lists
    if not any(lists for lists in listed):
        raise InputError(f"{path}: lists no negatives of the clips that are trained on; name the file that 'omni-jax mine' wrote of them")
    unknown = len({name for lists in listed for ids in lists.values() for name in ids if name not in number})
    starts, clips = {}, {}
    for modality, directions in LISTS.items():
        found, counts = [], [0]
        for clip, lists in enumerate(listed):
            for direction in directions:
                others = [number[name] for name in lists.get(direction, ()) if name in number]
                own = same_as(source, modality, clip) if others else None
                valid = [other for other in others if same_as(source, modality, other) != own]
                if valid:
                    found += valid
                    break
            counts.append(len(found))
        starts[modality], clips[modality] = np.array(counts, np.int64), np.array(found, np.int64)
    return MinedNegatives(starts, clips, SHARES[negatives], unknown)


def _lists(value: Any, where: str) -> Mapping[str, Sequence[str]]:
    """Returns what a record lists. Raises InputError for what is no object of lists of ids."""
    fits = isinstance(value, dict) and all(isinstance(ids, list) and all(isinstance(n, str) for n in ids) for ids in value.values())
    if not fits:
        raise InputError(
            f"{where}: field {NEGATIVES} must hold lists of ids by direction, as in {{'t2v': ['a', 'b']}}; mine the negatives again"
        )
    return value
