"""Random tables with ties, duplicates and several relevant items, whose ranks float64 decides beyond doubt."""

from __future__ import annotations

import dataclasses

import numpy as np

from omni_jax.retrieval.ranks import Ranks
from tests.retrieval import naive

WIDTH = 8
DECIDED = 1e-6  # float32 cosines cannot tell smaller differences apart; cases that hold one are not drawn


@dataclasses.dataclass(frozen=True)
class Case:
    """Two tables, the labels of their rows, and the cosines in float64; `relevance` is None where row i belongs to row i."""

    a: np.ndarray
    b: np.ndarray
    left: list[int]
    right: list[int]
    relevance: tuple[list[int], list[int]] | None
    scores: np.ndarray


def random_case(rng: np.random.Generator, n: int, m: int, kind: str, many: bool) -> Case | None:
    """Returns tables of n and m rows of a kind, "gaussian" or "signs"; None where float32 could not decide a rank."""
    if kind == "gaussian":
        pool = rng.normal(size=(int(rng.integers(1, 40)), WIDTH)).astype(np.float32)
        a, b = gaussian(rng, n, pool), gaussian(rng, m, pool)
    else:
        a, b = signs(rng, n), signs(rng, m)
    scores = naive.cosines(a, b)
    if kind == "gaussian" and naive.smallest_gap(scores) <= DECIDED:
        return None
    if not many:
        return Case(a, b, list(range(n)), list(range(m)), None, scores)
    labels = max(n, m)
    left, right = rng.integers(labels, size=n).tolist(), rng.integers(labels, size=m).tolist()
    right[0] = left[-1]  # one pair at least
    return Case(a, b, left, right, (left, right), scores)


def gaussian(rng: np.random.Generator, n: int, pool: np.ndarray) -> np.ndarray:
    """Rows of a pool, so that many are bit-equal; some are doubled in length, which leaves their direction bit-equal too."""
    rows = pool[rng.integers(len(pool), size=n)]
    return rows * rng.choice([1, 2], size=(n, 1)).astype(np.float32)


def signs(rng: np.random.Generator, n: int) -> np.ndarray:
    """Rows with four entries of +-1: every cosine is an exact multiple of 1/4, so unlike rows tie as well."""
    rows = np.zeros((n, WIDTH), np.float32)
    for row in rows:
        row[rng.permutation(WIDTH)[:4]] = rng.choice([-1, 1], size=4)
    return rows


def as_dict(ranks: Ranks) -> dict[tuple[int, int], tuple[int, int]]:
    """Returns (query, relevant item) -> (better candidates, equal candidates), as `naive.ranks` does."""
    keys = zip(ranks.query.tolist(), ranks.item.tolist(), strict=True)
    return dict(zip(keys, zip(ranks.better.tolist(), ranks.equal.tolist(), strict=True), strict=True))
