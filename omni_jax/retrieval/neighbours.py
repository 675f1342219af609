"""The nearest gallery rows of some queries, in blocks: for looking at results, not for ranking them (ranks.py does that).

Letters: Q queries, M gallery rows, D width, k neighbours.
"""

from __future__ import annotations

import numpy as np

QUERY_BLOCK, GALLERY_BLOCK = 512, 4096  # rows: a block of products is 8 MB


def unit(rows: np.ndarray) -> np.ndarray:
    """Returns rows of length 1, (N, D) float32. They must not be zero."""
    rows = np.asarray(rows, dtype=np.float32)
    return rows / np.linalg.norm(rows.astype(np.float64), axis=-1, keepdims=True).astype(np.float32)


def nearest(queries: np.ndarray, gallery: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k gallery rows of largest cosine for each query, best first: rows (Q, k) int64 and cosines (Q, k) float32.

    Candidates of the same cosine come in the order of the gallery. The memory needed beyond the tables is that of one block.

    Args:
      queries: (Q, D).
      gallery: (M, D), M >= k.
    """
    items = np.empty((len(queries), k), np.int64)
    cosines = np.empty((len(queries), k), np.float32)
    for start in range(0, len(queries), QUERY_BLOCK):
        part = slice(start, start + QUERY_BLOCK)
        q = unit(queries[part])
        best = np.empty((len(q), 0), np.float32)
        where = np.empty((len(q), 0), np.int64)
        for first in range(0, len(gallery), GALLERY_BLOCK):
            near, column = _keep(q @ unit(gallery[first : first + GALLERY_BLOCK]).T, k)
            best, kept = _keep(np.concatenate([best, near], axis=1), k)
            where = np.take_along_axis(np.concatenate([where, first + column], axis=1), kept, axis=1)
        items[part], cosines[part] = where, best
    return items, cosines


def _keep(cosines: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of each row, sorted, and the columns they stood in."""
    if cosines.shape[1] > k:
        limit = np.partition(cosines, -k, axis=1)[:, -k, None]
        chosen = cosines >= limit
        tied = np.flatnonzero(np.count_nonzero(chosen, axis=1) > k)
        if len(tied):  # ties at the k-th place fall to the earlier columns
            above, level = cosines[tied] > limit[tied], cosines[tied] == limit[tied]
            room = k - np.count_nonzero(above, axis=1)[:, None]
            chosen[tied] = above | level & (np.cumsum(level, axis=1) <= room)
        columns = np.flatnonzero(chosen).reshape(len(cosines), k) % cosines.shape[1]
        cosines = np.take_along_axis(cosines, columns, axis=1)
    else:
        columns = np.broadcast_to(np.arange(cosines.shape[1]), cosines.shape)
    order = np.argsort(-cosines, axis=1, kind="stable")
    return np.take_along_axis(cosines, order, axis=1), np.take_along_axis(columns, order, axis=1)
