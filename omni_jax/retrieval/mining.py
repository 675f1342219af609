"""Hard negatives of each record: what a query ranks high and is not its answer, without what is an answer in all but name.

Names and meanings of the options are those of sentence-transformers' `mine_hard_negatives`, where it has them.

Letters: Q queries of a block, N rows of the gallery, k candidates.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

import numpy as np

from omni_jax.retrieval.directions import DIRECTIONS, possible
from omni_jax.retrieval.rows import paired_cosines
from omni_jax.retrieval.search import Index
from omni_jax.types import EmbeddingTable, InputError

BLOCK = 1024  # queries searched together
MOST_EQUAL = 4096  # candidates looked at beyond range_max, in place of those that share a caption or source
SAMPLING = ("top", "random")

Nearest = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""(queries (Q, D), k) -> cosines (Q, k) and rows (Q, k), nearest first; row -1 where there are fewer."""


@dataclasses.dataclass(frozen=True)
class MiningConfig:
    """Which candidates become negatives.

    Attributes:
      num_negatives: at most so many for each record and direction.
      range_min, range_max: ranks considered, from 0; range_min = 10 leaves the ten hardest out. What a guard removes has no rank.
      min_score, max_score: bounds of a candidate's cosine; None: none.
      absolute_margin: a candidate's cosine must lie so far below the relevant item's. 0 leaves out what scores above it, a likely false
        negative; None: no such guard.
      relative_margin: a candidate's cosine must be at most (1 - margin) times the relevant item's; None: no such guard.
      sampling: "top" takes the hardest, "random" draws among those that are left (seed `seed`); either way the hardest comes first.
    """

    num_negatives: int = 5
    range_min: int = 0
    range_max: int = 100
    min_score: float | None = None
    max_score: float | None = None
    absolute_margin: float | None = 0.0
    relative_margin: float | None = None
    sampling: str = "top"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_negatives < 1:
            raise InputError(f"num_negatives {self.num_negatives}: must be at least 1")
        if not 0 <= self.range_min < self.range_max:
            raise InputError(f"range_min {self.range_min} and range_max {self.range_max}: ranks from 0, range_min below range_max")
        if self.sampling not in SAMPLING:
            raise InputError(f"sampling {self.sampling!r}: choose one of {', '.join(SAMPLING)}")


@dataclasses.dataclass
class Mined:
    """What mining found.

    Attributes:
      negatives: record id -> direction -> ids of its hard negatives, hardest first; a direction without any is left out.
      queries: direction -> queries that have a relevant item.
      without: direction -> those of them for which no candidate is left.
      removed: direction -> reason -> candidates removed by it, among those that were looked at.
    """

    negatives: dict[str, dict[str, list[str]]] = dataclasses.field(default_factory=dict)
    queries: Counter[str] = dataclasses.field(default_factory=Counter)
    without: Counter[str] = dataclasses.field(default_factory=Counter)
    removed: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)


def mine(
    table: EmbeddingTable,
    config: MiningConfig,
    *,
    same: Mapping[str, Mapping[str, Hashable]],
    directions: Sequence[str] = tuple(DIRECTIONS),
    nearest: Callable[[np.ndarray], Nearest] | None = None,
    progress: Callable[[int], None] = lambda queries: None,
) -> Mined:
    """Returns the hard negatives of every record whose table asks and whose relevant item is in the gallery.

    Memory beyond the tables is that of a block of queries and of the result.

    Args:
      same: reason -> record id -> label: records of equal labels are no negatives of each other ("caption", "source"); records that are
        not in it have no equal.
      directions: which of the 12; those whose tables are not there are left out.
      nearest: makes the search over a gallery (N, D); None: exact.
      progress: called with the number of queries done since the last call.

    Raises:
      InputError: when no direction can be mined, or no record has a valid negative.
    """
    chosen = {name: pair for name, pair in possible(table.tables).items() if name in directions}
    if not chosen:
        raise InputError(
            f"no direction of {', '.join(directions)} can be mined with the tables {', '.join(table.tables)}; embed its two tables"
        )
    mined = Mined()
    labels = {reason: _numbered(given) for reason, given in same.items()}
    for name, (asking, asked) in chosen.items():
        queries, gallery = table.ids_of(asking), table.ids_of(asked)
        place = {record: row for row, record in enumerate(gallery)}
        rows = np.array([row for row, record in enumerate(queries) if record in place], np.int64)
        mined.queries[name] += len(rows)
        removed = mined.removed.setdefault(name, Counter())
        search = (nearest or _exact)(table.tables[asked])
        equal = {reason: _Labels(known, queries, gallery) for reason, known in labels.items()}
        random = np.random.default_rng([config.seed, list(DIRECTIONS).index(name)])
        for start in range(0, len(rows), BLOCK):
            part = rows[start : start + BLOCK]
            relevant = np.array([place[queries[row]] for row in part])
            looked = config.range_max + 1 + min(sum(label.most(part) for label in equal.values()), MOST_EQUAL)
            cosines, found = search(table.tables[asking][part], min(looked, len(gallery)))
            positive = paired_cosines(table.tables[asking][part], table.tables[asked][relevant])
            for i, kept in enumerate(_kept(cosines, found, part, relevant, positive, equal, config, removed)):
                if not len(kept):
                    mined.without[name] += 1
                    continue
                if config.sampling == "random" and len(kept) > config.num_negatives:
                    kept = kept[np.sort(random.choice(len(kept), config.num_negatives, replace=False))]
                ids = [gallery[row] for row in kept[: config.num_negatives]]
                mined.negatives.setdefault(queries[part[i]], {})[name] = ids
            progress(len(part))
    if not mined.negatives:
        raise InputError(
            "no record has a valid negative: all candidates share its caption or source, or score outside the bounds; "
            "check the manifest for duplicates, or widen range_max, the scores or the margins"
        )
    return mined


class _Labels:
    """Labels of queries and gallery rows by one reason; -1 equals nothing."""

    def __init__(self, known: Mapping[str, int], queries: Sequence[str], gallery: Sequence[str]) -> None:
        self.queries, self.gallery = (np.array([known.get(record, -1) for record in ids], np.int64) for ids in (queries, gallery))
        self._counts = np.bincount(self.gallery[self.gallery >= 0], minlength=1 + max(known.values(), default=0))

    def most(self, part: np.ndarray) -> int:
        """Returns the largest number of gallery rows that one of these queries shares its label with."""
        labels = self.queries[part]
        return int(self._counts[labels[labels >= 0]].max(initial=0))


def _kept(
    cosines: np.ndarray,
    found: np.ndarray,
    part: np.ndarray,
    relevant: np.ndarray,
    positive: np.ndarray,
    equal: Mapping[str, _Labels],
    config: MiningConfig,
    removed: Counter[str],
) -> Iterator[np.ndarray]:
    """Yields the gallery rows left for each query, hardest first."""
    other = (found >= 0) & (found != relevant[:, None])
    for reason, label in equal.items():
        mine, theirs = label.queries[part][:, None], label.gallery[found]
        twin = other & (mine >= 0) & (mine == theirs)
        removed[reason] += int(np.count_nonzero(twin))
        other &= ~twin
    rank = np.cumsum(other, axis=1) - 1
    good = other & (rank >= config.range_min) & (rank < config.range_max)
    limits = {
        "below min_score": None if config.min_score is None else cosines < config.min_score,
        "above max_score": None if config.max_score is None else cosines > config.max_score,
        "absolute_margin": None if config.absolute_margin is None else cosines > (positive - config.absolute_margin)[:, None],
        "relative_margin": None if config.relative_margin is None else cosines > (positive * (1 - config.relative_margin))[:, None],
    }
    for reason, outside in limits.items():
        if outside is not None:
            removed[reason] += int(np.count_nonzero(good & outside))
            good &= ~outside
    for row, chosen in zip(found, good, strict=True):
        yield row[chosen]


def _exact(gallery: np.ndarray) -> Nearest:
    return Index(gallery, "gallery").search


def _numbered(labels: Mapping[str, Hashable]) -> dict[str, int]:
    numbers: dict[Hashable, int] = {}
    return {record: numbers.setdefault(label, len(numbers)) for record, label in labels.items()}
