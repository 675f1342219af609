"""From a stream of clips to embedding tables: groups clips, encodes, keeps order, sets bad clips aside.

Planning (tokens) and encoding (model) are passed in as functions; this file knows neither.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from omni_jax.types import ClipError, EmbeddingTable, EncoderBatch, Record, TokenizedClip

Encode = Callable[[EncoderBatch], Iterator[tuple[int, str, np.ndarray]]]
Plan = Callable[[Sequence[TokenizedClip]], EncoderBatch]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A record that could not be embedded, and why."""

    record: Record
    reason: str


@dataclasses.dataclass
class Outcome:
    """What an embedding pass produced.

    Attributes:
      table: the embeddings of every good record, in the order the records came.
      problems: records set aside.
      warnings: (record id, line): what was mended so that the record could be used.
      used_tokens, total_tokens: tokens encoded without and with padding.
      truncated: captions that were cut.
    """

    table: EmbeddingTable
    problems: list[Problem] = dataclasses.field(default_factory=list)
    warnings: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    used_tokens: int = 0
    total_tokens: int = 0
    truncated: int = 0

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
    progress: Callable[[int], None] = lambda items: None,
) -> Outcome:
    """Embeds every record of a stream, `group` clips at a time.

    One group is prepared on the host while the devices work on the one before it.

    Args:
      clips: records with their features and prompts, or the error that took their place.
      tables: names of the tables to fill; each record must have the modalities they need.
      plan: clips of a group -> a batch of static shapes.
      encode: starts a batch and yields (clip of the group, table, vector (D,) float32).
      normalize: whether rows are scaled to length 1.
      progress: called with the number of records just embedded or set aside.
    """
    run = _Pass(tables, plan, encode, normalize, progress)
    waiting: list[TokenizedClip] = []
    for record, item in clips:
        if isinstance(item, ClipError):
            run.set_aside(record, str(item))
            continue
        run.outcome.warnings.extend((record.id, line) for line in item.features.warnings)
        waiting.append(item)
        if len(waiting) == group:
            run.start(waiting)
            waiting = []
    if waiting:
        run.start(waiting)
    return run.finish()


class _Pass:
    """The state of one embedding pass: rows found so far and the group that the devices work on."""

    def __init__(self, tables: Sequence[str], plan: Plan, encode: Encode, normalize: bool, progress: Callable[[int], None]):
        self.outcome = Outcome(EmbeddingTable((), {}))
        self._tables, self._plan, self._encode, self._normalize, self._progress = tables, plan, encode, normalize, progress
        self._ids: list[str] = []
        self._rows: dict[str, list[np.ndarray]] = {name: [] for name in tables}
        self._started: tuple[list[TokenizedClip], Iterator[tuple[int, str, np.ndarray]]] | None = None

    def start(self, clips: list[TokenizedClip]) -> None:
        """Starts a group on the devices, then collects the one before."""
        batch = self._plan(clips)
        self.outcome.used_tokens += batch.used_tokens
        self.outcome.total_tokens += batch.total_tokens
        self.outcome.truncated += batch.truncated
        before, self._started = self._started, (clips, self._encode(batch))
        self._collect(before)

    def finish(self) -> Outcome:
        self._collect(self._started)
        self._started = None
        self.outcome.table = EmbeddingTable(tuple(self._ids), {name: np.stack(rows) for name, rows in self._rows.items() if rows})
        return self.outcome

    def set_aside(self, record: Record, reason: str) -> None:
        self.outcome.problems.append(Problem(record, reason))
        self._progress(1)

    def _collect(self, group: tuple[list[TokenizedClip], Iterator[tuple[int, str, np.ndarray]]] | None) -> None:
        if group is None:
            return
        clips, vectors = group
        found: list[dict[str, np.ndarray]] = [{} for _ in clips]
        for clip, table, vector in vectors:
            found[clip][table] = vector
        for clip, by_table in zip(clips, found, strict=True):
            bad = [name for name in self._tables if not (np.isfinite(by_table[name]).all() and by_table[name].any())]
            if bad:
                self.set_aside(
                    clip.features.record, f"the embedding for {', '.join(bad)} is zero or not finite; check the weights and --dtype"
                )
                continue
            self._ids.append(clip.features.record.id)
            for name in self._tables:
                vector = by_table[name]
                self._rows[name].append(vector / np.linalg.norm(vector) if self._normalize else vector)
            self._progress(1)
