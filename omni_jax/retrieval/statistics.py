"""How sure a figure is: bootstrap intervals of R@1, and paired tests of two results over the same records. Seeded, so a run repeats itself.

The record is what is drawn, not the query: the twelve directions ask about the same clips, and the captions of one clip are correlated.
Everything works on sums of hits per record, so that a resample is one product of counts with a small matrix.

Letters: U records, K directions, E estimates (K directions and the averages they allow), B resamples.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from omni_jax.retrieval.directions import AVERAGES
from omni_jax.types import InputError

RESAMPLES = 2000  # the ends of a 95 % interval then move by about a tenth of its length from seed to seed
PERMUTATIONS = 10_000  # the smallest p-value that can come out is 1 in this number
LEVEL = 0.95
EXACT_RECORDS = 13  # up to here all sign patterns are fewer than PERMUTATIONS, and are all tried
BLOCK_ENTRIES = 1 << 22  # counts held at once: 32 MB
LEVEL_WITH = 1e-10  # sums of the same hits in another order; two different sums are further apart

Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class HitCounts:
    """What each record's queries found at place 1.

    Attributes:
      records: U names, no two equal.
      directions: K names.
      hits: (U, K) float64, queries of the record answered with a relevant item at place 1.
      asked: (U, K) float64, queries of the record; 0 where it has none in that direction.
    """

    records: tuple
    directions: tuple[str, ...]
    hits: np.ndarray
    asked: np.ndarray

    def estimates(self) -> tuple[str, ...]:
        """The names of what is estimated: the directions, then the averages whose directions are all there."""
        return (*self.directions, *(name for name, needed in AVERAGES.items() if set(needed) <= set(self.directions)))


@dataclasses.dataclass(frozen=True)
class Difference:
    """One figure of a result less that of another, in percentage points.

    Attributes:
      difference: first less second.
      interval: 95 % interval of it (paired bootstrap).
      p: two-sided p-value of the sign-flip test: how often results that are interchangeable record by record differ as much.
      p_holm: p corrected for the number of directions tested (Holm); None for an average, which is one test.
    """

    difference: float
    interval: Interval
    p: float
    p_holm: float | None

    def row(self) -> dict[str, Any]:
        """The difference, ready for JSON."""
        return {"difference": self.difference, "interval": list(self.interval), "p": self.p, "p_holm": self.p_holm}


def intervals(hit_counts: HitCounts, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Interval]:
    """Returns the 95 % percentile-bootstrap interval of every R@1 and average, in percent, from `resamples` draws of U records.

    Where nothing varies (every query found, or none) the interval has no width: a bootstrap cannot see what never happened.
    """
    rates = np.concatenate(
        [_rates(counts @ hit_counts.hits, counts @ hit_counts.asked) for counts in _draws(len(hit_counts.records), resamples, seed)]
    )
    return _percentiles(_with_averages(rates, hit_counts), hit_counts.estimates())


def compare(
    first: HitCounts, second: HitCounts, *, resamples: int = RESAMPLES, permutations: int = PERMUTATIONS, seed: int = 0
) -> dict[str, Difference]:
    """Returns the differences between two results over the same records, for the directions both have and the averages.

    The test swaps the two results of a record, all its directions together, and asks how often the swapped difference is as large: over
    every pattern of swaps where few records differ, otherwise over `permutations` random ones (the observed one counted in). For one
    direction with one query per record this is McNemar's test.

    Raises:
      InputError: when the records or their queries differ, or no direction is shared.
    """
    first, second = _paired(first, second)
    names = first.estimates()
    total = first.asked.sum(axis=0)
    effect = _with_averages((first.hits - second.hits) / total, first)  # (U, E), sums to the differences
    observed = _with_averages(((first.hits - second.hits).sum(axis=0) / total)[None], first)[0]
    p = _sign_flip(effect[np.any(effect != 0, axis=1)], observed, permutations, seed)
    rates = np.concatenate(
        [_rates(counts @ (first.hits - second.hits), counts @ first.asked) for counts in _draws(len(first.records), resamples, seed)]
    )
    spread = _percentiles(_with_averages(rates, first), names)
    holm = dict(zip(first.directions, _holm(p[: len(first.directions)]), strict=True))
    return {
        name: Difference(100 * float(value), spread[name], float(chance), holm.get(name))
        for name, value, chance in zip(names, observed, p, strict=True)
    }


def _draws(records: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yields (b, U) float64: how often each record is drawn; the b sum to `resamples`."""
    rng = np.random.default_rng(seed)
    block = max(1, BLOCK_ENTRIES // records)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = rng.integers(records, size=(rows, records)) + records * np.arange(rows)[:, None]
        yield np.bincount(drawn.reshape(-1), minlength=rows * records).reshape(rows, records).astype(np.float64)


def _rates(hits: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """(b, K); NaN where a draw holds no query of a direction."""
    return np.divide(hits, asked, out=np.full(hits.shape, np.nan), where=asked > 0)


def _with_averages(values: np.ndarray, hit_counts: HitCounts) -> np.ndarray:
    """(rows, K) -> (rows, E)."""
    column = {name: i for i, name in enumerate(hit_counts.directions)}
    means = [values[:, [column[d] for d in AVERAGES[name]]].mean(axis=1) for name in hit_counts.estimates()[len(column) :]]
    return np.column_stack([values, *means])


def _percentiles(rates: np.ndarray, names: Sequence[str]) -> dict[str, Interval]:
    low, high = np.nanquantile(100 * rates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return {name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)}


def _sign_flip(effect: np.ndarray, observed: np.ndarray, permutations: int, seed: int) -> np.ndarray:
    """Two-sided p-values (E,) of the sums of `effect` (records that differ, E) under random signs."""
    records = len(effect)
    limit = np.abs(observed) - LEVEL_WITH
    if records <= EXACT_RECORDS:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=records))).reshape(2**records, records)
        return np.mean(np.abs(signs @ effect) >= limit, axis=0)
    rng = np.random.default_rng(seed)
    beyond = np.zeros(len(observed))
    block = max(1, BLOCK_ENTRIES // records)
    for start in range(0, permutations, block):
        rows = min(block, permutations - start)
        signs = 2.0 * rng.integers(2, size=(rows, records), dtype=np.int8) - 1
        beyond += (np.abs(signs @ effect) >= limit).sum(axis=0)
    return (1 + beyond) / (1 + permutations)


def _holm(p: np.ndarray) -> list[float]:
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return corrected.tolist()


def _paired(first: HitCounts, second: HitCounts) -> tuple[HitCounts, HitCounts]:
    """The two over their shared directions, the second's records in the first's order."""
    lacking = [name for name in first.records if name not in set(second.records)]
    if lacking or len(first.records) != len(second.records):
        count = f"{len(first.records)} and {len(second.records)} records"
        named = f", {lacking[0]!r} is in the first only" if lacking else ""
        raise InputError(f"a paired test needs the same records on both sides: {count}{named}; score the records both have")
    shared = tuple(name for name in first.directions if name in second.directions)
    if not shared:
        raise InputError("a paired test needs a direction that both sides have; embed the same tables")
    place = {name: i for i, name in enumerate(second.records)}
    order = [place[name] for name in first.records]
    a, b = ([hit_counts.directions.index(name) for name in shared] for hit_counts in (first, second))
    left = HitCounts(first.records, shared, first.hits[:, a], first.asked[:, a])
    right = HitCounts(first.records, shared, second.hits[order][:, b], second.asked[order][:, b])
    if not np.array_equal(left.asked, right.asked):
        raise InputError("a paired test needs the same queries on both sides; score both with the same relevance")
    return left, right
