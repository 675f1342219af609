"""The ranker every chunked path answers to: float64, one pair at a time, nothing shared with the code under test."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, M) float64. Summed per pair, not as a matrix product, so that equal rows have equal cosines wherever they stand."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    a, b = a / np.sqrt((a * a).sum(1, keepdims=True)), b / np.sqrt((b * b).sum(1, keepdims=True))
    return np.array([[(x * y).sum() for y in b] for x in a])


def ranks(scores: np.ndarray, left: Sequence, right: Sequence) -> dict[tuple[int, int], tuple[int, int]]:
    """(query, relevant item) -> (strictly better candidates, other equal candidates)."""
    found = {}
    for i, row in enumerate(scores):
        for j, score in enumerate(row):
            if left[i] == right[j]:
                found[i, j] = (sum(x > score for x in row), sum(x == score for x in row) - 1)
    return found


def smallest_gap(scores: np.ndarray) -> float:
    """Smallest difference, other than none, between two cosines of a row or of a column."""
    gaps = [np.diff(np.sort(line)) for line in (*scores, *scores.T)]
    return min((gap for line in gaps for gap in line.tolist() if gap > 0), default=float("inf"))


def positions(scores: Sequence[float], relevant: Sequence[bool], ties: str) -> list[float]:
    """Places (from 1) of the relevant candidates of one query, by sorting; "average" is the mean over every order of the level ones."""
    places: list[float] = []
    place = 1
    for level in sorted(set(scores), reverse=True):
        block = [r for s, r in zip(scores, relevant, strict=True) if s == level]
        hits, size = sum(block), len(block)
        if ties == "optimistic":
            places += [float(place + k) for k in range(hits)]
        elif ties == "worst":
            places += [float(place + size - hits + k) for k in range(hits)]
        else:
            orders = list(combinations(range(size), hits))
            places += [place + sum(order[k] for order in orders) / len(orders) for k in range(hits)]
        place += size
    return places
