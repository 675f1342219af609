"""Which rows of a gallery answer which queries, in an order that brings them together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from omni_jax.types import InputError


def relevant_pairs(n: int, m: int, relevance: tuple[Sequence, Sequence] | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns row orders that bring relevant pairs together (N,), (M,), and the pairs (P,), (P,) as positions in these orders.

    Args:
      relevance: one label per row of both tables; a pair is relevant where they are equal. None: the same row is.

    Raises:
      InputError: for labels of another length, or no relevant pair at all.
    """
    if relevance is None:
        pairs = np.arange(min(n, m))
        return np.arange(n), np.arange(m), pairs, pairs
    left, right = (np.asarray(labels) for labels in relevance)
    if left.shape != (n,) or right.shape != (m,):
        raise InputError(f"relevance labels are {left.shape} and {right.shape}, the tables have {n} and {m} rows: one label per row")
    _, codes = np.unique(np.concatenate([left, right]), return_inverse=True)
    order_a, order_b = np.argsort(codes[:n], kind="stable"), np.argsort(codes[n:], kind="stable")
    sorted_a, sorted_b = codes[:n][order_a], codes[n:][order_b]
    first = np.searchsorted(sorted_b, sorted_a, "left")
    number = np.searchsorted(sorted_b, sorted_a, "right") - first
    if not number.sum():
        raise InputError("no query has a relevant item: no relevance label appears in both tables")
    rows = np.repeat(np.arange(n), number)
    return order_a, order_b, rows, np.repeat(first, number) + count_up(rows)


def count_up(labels: np.ndarray) -> np.ndarray:
    """Returns for each entry how many entries before it carry the same label."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    start = np.flatnonzero(np.diff(ordered, prepend=-1))
    result = np.empty(len(labels), np.int64)
    result[order] = np.arange(len(labels)) - np.repeat(start, np.diff(start, append=len(labels)))
    return result
