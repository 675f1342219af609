"""From a stream of clips to embedding tables: groups clips, encodes, keeps order, sets bad clips aside.

Planning (tokens) and encoding (model) are passed in as functions; this file knows neither.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

from omni_jax.config import TABLE_MODALITIES
from omni_jax.types import ClipError, EmbeddingTable, EncoderBatch, Record, TokenizedClip

Encode = Callable[[EncoderBatch], Iterator[tuple[int, str, np.ndarray]]]
Plan = Callable[[Sequence[TokenizedClip]], EncoderBatch]


@dataclasses.dataclass(frozen=True)
class Part:
    """What one group of clips gave, or several together.

    Attributes:
      ids: embedded records, in the order they came.
      rows: table name -> (N, D) float32, or fewer rows where `own` says whose they are.
      own: table name -> ids of the records that have it, for a table that some record lacks what it needs for.
      problems: (record id, reason) of skipped records.
      warnings: (record id, line): what was replaced or left out so that the record could be used.
      used_tokens, total_tokens: tokens encoded without and with padding.
      truncated: captions that were cut.
      shapes: kind -> shapes that the planner knew after this group, from which a resumed pass continues as one that was not interrupted.
    """

    ids: tuple[str, ...] = ()
    rows: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    problems: tuple[tuple[str, str], ...] = ()
    warnings: tuple[tuple[str, str], ...] = ()
    used_tokens: int = 0
    total_tokens: int = 0
    truncated: int = 0
    own: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    shapes: dict[str, list[tuple[int, ...]]] = dataclasses.field(default_factory=dict)

    @property
    def records(self) -> int:
        """Records embedded or skipped."""
        return len(self.ids) + len(self.problems)

    @property
    def table(self) -> EmbeddingTable:
        return EmbeddingTable(self.ids, self.rows, own=self.own)

    @property
    def padded_share(self) -> float:
        return 1 - self.used_tokens / self.total_tokens if self.total_tokens else 0.0


def embedding_pass(
    clips: Iterable[tuple[Record, TokenizedClip | ClipError]],
    tables: Sequence[str],
    *,
    plan: Plan,
    encode: Encode,
    group: int,
    normalize: bool = True,
) -> Iterator[Part]:
    """Yields one part for every `group` clips embedded; records skipped in between come with the next part.

    One group is prepared on the host while the devices work on the one before it. A caller that stops early has every part it was given.

    Args:
      clips: records with their features and prompts, or the error that took their place.
      tables: names of the tables to fill; a record's prompts say which of them it fills.
      plan: clips of a group -> a batch of static shapes.
      encode: starts a batch and yields (clip of the group, table, vector (D,) float32).
      normalize: whether rows are scaled to length 1.
    """

    started: Callable[[], Part] | None = None
    for waiting, problems in grouped(clips, group):
        before, started = started, start_group(waiting, problems, tables, plan=plan, encode=encode, normalize=normalize)
        if before:
            yield before()
    if started:
        yield started()


Clip = TypeVar("Clip")


def grouped(clips: Iterable[tuple[Record, Clip | ClipError]], size: int) -> Iterator[tuple[list[Clip], list[tuple[str, str]]]]:
    """Yields `size` usable clips at a time, the last time fewer, with (record id, reason) of the records skipped in between."""
    waiting: list[Clip] = []
    problems: list[tuple[str, str]] = []
    for record, item in clips:
        if isinstance(item, ClipError):
            problems.append((record.id, str(item)))
        else:
            waiting.append(item)
        if len(waiting) == size:
            yield waiting, problems
            waiting, problems = [], []
    if waiting or problems:
        yield waiting, problems


def start_group(
    clips: Sequence[TokenizedClip],
    problems: list[tuple[str, str]],
    tables: Sequence[str],
    *,
    plan: Plan,
    encode: Encode,
    normalize: bool = True,
) -> Callable[[], Part]:
    """Starts the devices on a group of clips; the function that is returned waits for them and gives the group's part."""
    batch = plan(clips) if clips else None
    vectors = encode(batch) if batch else iter(())
    return lambda: _collect(clips, problems, batch, vectors, tables, normalize)


def _collect(
    clips: Sequence[TokenizedClip],
    problems: list[tuple[str, str]],
    batch: EncoderBatch | None,
    vectors: Iterator[tuple[int, str, np.ndarray]],
    tables: Sequence[str],
    normalize: bool,
) -> Part:
    """Waits for a group's vectors and sorts them into rows; a vector that is no direction sets its clip aside."""
    found: list[dict[str, np.ndarray]] = [{} for _ in clips]
    for clip, table, vector in vectors:
        found[clip][table] = vector
    good: list[int] = []
    for number, (clip, by_table) in enumerate(zip(clips, found, strict=True)):
        bad = [name for name in tables if name in by_table and not (np.isfinite(by_table[name]).all() and by_table[name].any())]
        if bad:
            reason = f"the embedding for {', '.join(bad)} is zero or not finite; check the weights and --dtype"
            problems.append((clip.features.record.id, reason))
        else:
            good.append(number)
    having = {name: [n for n in good if name in found[n]] for name in tables}
    rows = {name: np.stack([found[n][name] for n in numbers]) for name, numbers in having.items() if numbers}
    if normalize:
        rows = {name: values / np.linalg.norm(values, axis=1, keepdims=True) for name, values in rows.items()}
    return Part(
        ids=tuple(clips[n].features.record.id for n in good),
        rows=rows,
        problems=tuple(problems),
        warnings=tuple((clip.features.record.id, line) for clip in clips for line in clip.features.warnings),
        used_tokens=batch.used_tokens if batch else 0,
        total_tokens=batch.total_tokens if batch else 0,
        truncated=batch.truncated if batch else 0,
        own={name: tuple(clips[n].features.record.id for n in numbers) for name, numbers in having.items() if len(numbers) < len(good)},
    )


def assemble(records: Sequence[Record], parts: Sequence[Part]) -> Part:
    """Returns parts that hold some or all of these records as one, all in the order of the records.

    All records that have the same prompt for a table get one row, the first one's. In groups of other shapes the same prompt comes out a
    few times 1e-7 apart: what is level by its nature would be ranked by rounding.
    """
    place = {record.id: n for n, record in enumerate(records)}
    ids = sorted((i for part in parts for i in part.ids), key=place.__getitem__)
    rows: dict[str, np.ndarray] = {}
    own: dict[str, tuple[str, ...]] = {}
    for name in dict.fromkeys(name for part in parts for name in part.rows):
        have = [i for part in parts if name in part.rows for i in part.own.get(name, part.ids)]
        order = sorted(range(len(have)), key=lambda n: place[have[n]])
        whose = tuple(have[n] for n in order)
        first = _first_of_prompt([records[place[i]] for i in whose], name)
        rows[name] = np.concatenate([part.rows[name] for part in parts if name in part.rows])[order][first]
        if len(have) < len(ids):
            own[name] = whose
    problems = sorted(((place[i], reason) for part in parts for i, reason in part.problems))
    return Part(
        ids=tuple(ids),
        rows=rows,
        own=own,
        problems=tuple((records[n].id, reason) for n, reason in problems),
        warnings=tuple(pair for part in parts for pair in part.warnings),
        used_tokens=sum(part.used_tokens for part in parts),
        total_tokens=sum(part.total_tokens for part in parts),
        truncated=sum(part.truncated for part in parts),
    )


def first_of_prompts(records: Sequence[Record], tables: Iterable[str]) -> dict[str, dict[str, str]]:
    """Returns table -> id -> the first of all records with the same prompt, for the records that are not the first themselves."""
    found = {}
    for name in tables:
        able = [record for record in records if TABLE_MODALITIES[name] <= record.modalities]
        found[name] = {able[n].id: able[first].id for n, first in enumerate(_first_of_prompt(able, name)) if first != n}
    return found


def same_in_other_parts(firsts: Mapping[str, Mapping[str, str]], part: Container[str]) -> dict[str, dict[str, str]]:
    """Returns of `first_of_prompts` what concerns records of a part whose first record is of another part."""
    found = {
        name: {record: first for record, first in pairs.items() if record in part and first not in part} for name, pairs in firsts.items()
    }
    return {name: pairs for name, pairs in found.items() if pairs}


def _first_of_prompt(records: Sequence[Record], table: str) -> list[int]:
    """For each record the first one whose prompt for a table is made of the same: caption, files and interval, as far as they are known."""
    needed = TABLE_MODALITIES[table]
    first: dict[tuple, int] = {}
    found = []
    for n, record in enumerate(records):
        fields = {"t": record.text, "v": record.video, "a": record.audio}
        made_of = tuple(fields[modality] for modality in sorted(needed))
        prompt = made_of, record.prefix if "t" in needed else None, record.timestamps if needed != {"t"} else None
        found.append(n if None in made_of else first.setdefault(prompt, n))
    return found
