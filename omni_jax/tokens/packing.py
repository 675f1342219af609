"""Prompts into rows: which share a media prefix, which share a row, and the arrays of a row.

Letters: R rows, S tokens, K prompts per row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from omni_jax.config import TABLE_MODALITIES, TABLES
from omni_jax.types import SOURCE_AUDIO, SOURCE_VIDEO, RowBatch, TokenSequence


@dataclasses.dataclass(frozen=True)
class Group:
    """Prompts of one clip that share a row, the media they share once.

    Attributes:
      clip: number of the clip in the batch.
      prompts: (name, prompt); where there are several, all start with the same `prefix` tokens.
    """

    clip: int
    prompts: tuple[tuple[str, TokenSequence], ...]

    @property
    def prefix(self) -> int:
        """Tokens that are shared; the whole prompt where there is only one."""
        first = self.prompts[0][1]
        return first.prefix if len(self.prompts) > 1 else len(first.ids)

    @property
    def length(self) -> int:
        """Tokens in all."""
        return self.prefix + sum(len(s.ids) - self.prefix for _, s in self.prompts)


def group_prompts(clip: int, sequences: Mapping[str, TokenSequence], share_prefix: bool = True) -> list[Group]:
    """Returns the groups of one clip's prompts: those with the same media share a group; text has its own."""
    groups: dict[object, list[tuple[str, TokenSequence]]] = {}
    for table, sequence in sequences.items():
        media = TABLE_MODALITIES[table] - frozenset("t")
        groups.setdefault(media if share_prefix and media else table, []).append((table, sequence))
    return [Group(clip, tuple(prompts)) for prompts in groups.values()]


def first_fit_decreasing(lengths: Sequence[int], prompts: Sequence[int], size: int, slots: int) -> list[list[int]]:
    """Returns rows of item numbers: longest first, each in the first row that has space for its tokens and prompts."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = (r for r, (tokens, places) in enumerate(free) if lengths[item] <= tokens and prompts[item] <= places)
        r = next(fits, len(rows))
        if r == len(rows):
            rows.append([])
            free.append((size, slots))
        rows[r].append(item)
        free[r] = (free[r][0] - lengths[item], free[r][1] - prompts[item])
    return rows


@dataclasses.dataclass(frozen=True)
class MediaRows:
    """Rows of the media table that hold one clip's tokens.

    Attributes:
      video: (video tokens,) int32, in the order of the patches.
      audio: (2k,) int32, Whisper's and BEATs' tokens in turn.
    """

    video: np.ndarray
    audio: np.ndarray

    def of(self, sequence: TokenSequence) -> np.ndarray:
        """Returns (S,) int32: the table row of each media token, -1 for text."""
        index = np.full(len(sequence.ids), -1, np.int32)
        for source, rows in ((SOURCE_VIDEO, self.video), (SOURCE_AUDIO, self.audio)):
            here = sequence.source == source
            wanted = sequence.source_index[here]
            if len(wanted) and wanted.max() >= len(rows):
                raise ValueError(f"a prompt has {wanted.max() + 1} tokens of a medium whose clip has {len(rows)}")
            index[here] = rows[wanted]
        return index


def row_batch(rows: Sequence[Sequence[Group]], *, count: int, size: int, slots: int, media: Mapping[int, MediaRows], pad: int) -> RowBatch:
    """Returns the arrays (R, ...) of packed rows.

    Args:
      rows: the groups in each row, at most `count` rows.
      count, size, slots: R, S and K.
      media: clip -> its rows of the media table.
      pad: id of empty places.

    Raises:
      ValueError: where groups do not fit their row, or a clip has fewer media tokens than a prompt of it.
    """
    batch = RowBatch(
        ids=np.full((count, size), pad, np.int32),
        media_index=np.full((count, size), -1, np.int32),
        positions=np.zeros((count, 3, size), np.int32),
        segment=np.zeros((count, size), np.int32),
        branch=np.zeros((count, size), np.int32),
        pool=np.zeros((count, slots), np.int32),
    )
    for r, groups in enumerate(rows):
        if (asked := sum(group.length for group in groups)) > size:
            raise ValueError(f"prompts of {asked} tokens do not fit a row of {size}")
        start = slot = 0
        for segment, group in enumerate(groups, 1):
            prefix = group.prefix
            end = start
            for number, (_, sequence) in enumerate(group.prompts):
                # The prefix is written with the first prompt only; a continuation alone with its own branch.
                skip = 0 if number == 0 else prefix
                span = slice(end, end + len(sequence.ids) - skip)
                batch.ids[r, span] = sequence.ids[skip:]
                batch.media_index[r, span] = media[group.clip].of(sequence)[skip:]
                batch.positions[r, :, span] = sequence.positions[:, skip:]
                batch.segment[r, span] = segment
                batch.branch[r, span] = number + 1
                if number == 0:
                    batch.branch[r, start : start + prefix] = 0
                end = span.stop
                # A prompt without text of its own is read from the end of the prefix.
                batch.pool[r, slot] = end - 1 if len(sequence.ids) > prefix else start + prefix - 1
                slot += 1
            start = end
    return batch


def owners(rows: Sequence[Sequence[Group]], *, count: int, slots: int) -> np.ndarray:
    """Returns (R, K, 2) int32: clip and index into TABLES of each prompt that `row_batch` pools, -1 where there is none."""
    found = np.full((count, slots, 2), -1, np.int32)
    for r, groups in enumerate(rows):
        for slot, (clip, name) in enumerate((group.clip, name) for group in groups for name, _ in group.prompts):
            found[r, slot] = clip, TABLES.index(name)
    return found
