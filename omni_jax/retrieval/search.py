"""Exact search: the rows of a table nearest to a query, by cosine.

Letters: Q queries, N rows of the table, T rows of a block, D width, k results.
"""

from __future__ import annotations

import functools
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.retrieval.ranks import prepare
from omni_jax.types import InputError

BLOCK = 8192  # rows scored together: memory stays O(block), however large the table

# Query -> tables to search in, best first: what lies furthest from what is already at hand.
TARGETS = {
    "text": ("av", "video", "audio", "tva", "tv", "at", "text"),
    "audio": ("video", "tv", "text", "av", "audio", "tva", "at"),
    "video": ("audio", "at", "text", "av", "video", "tva", "tv"),
    "av": ("text", "av", "tva", "video", "audio", "tv", "at"),
}


def target_table(query: str, tables: Collection[str], chosen: str | None = None) -> str:
    """Returns the table to search in: the chosen one, or the first of TARGETS that is there.

    Raises:
      InputError: when the chosen table is not there.
    """
    if chosen is not None:
        if chosen not in tables:
            raise InputError(f"the index has no table {chosen!r}; it holds {', '.join(tables)}")
        return chosen
    return next(name for name in TARGETS[query] if name in tables)


def search(queries: np.ndarray, table: np.ndarray, k: int = 10, *, name: str = "index", ids: Collection[str] | None = None):
    """Returns cosines (Q, k) float32 and rows (Q, k) int64 of the k nearest rows, nearest first; level ones in the order of the table.

    k is cut to the number of rows.

    Args:
      queries: (Q, D), any length.
      table: (N, D), any length.
      name, ids: of the table and its rows, for messages.

    Raises:
      InputError: for vectors with NaN, infinity or only zeros, widths that differ, or k below 1.
    """
    if k < 1:
        raise InputError(f"{k} results were asked for; ask for at least 1")
    asked, held = prepare(queries, "query"), prepare(table, name, None if ids is None else tuple(ids))
    if asked.rows.shape[1] != held.rows.shape[1]:
        raise InputError(
            f"the query is {asked.rows.shape[1]} wide, table {name!r} is {held.rows.shape[1]}; embed the index with the model that searches"
        )
    k = min(k, len(held.rows))
    block = min(BLOCK, len(held.rows))
    unit = jnp.asarray(asked.rows.astype(np.float32) * asked.scale[:, None])
    best = jnp.full((len(unit), k), -jnp.inf, jnp.float32), jnp.zeros((len(unit), k), jnp.int32)
    for start in range(0, len(held.rows), block):
        rows, scale = held.rows[start : start + block], held.scale[start : start + block]
        if len(rows) < block:  # one program for all blocks
            rows, scale = np.pad(rows, ((0, block - len(rows)), (0, 0))), np.pad(scale, (0, block - len(scale)))
        best = _merge(unit, rows, scale, start, len(held.rows), *best, k=k)
    return np.asarray(best[0]), np.asarray(best[1]).astype(np.int64)


@functools.partial(jax.jit, static_argnames="k")
def _merge(unit, rows, scale, start, end, score, row, *, k: int):
    """The k best of those so far and of one block. `top_k` keeps the earlier of two level entries, and those so far stand earlier."""
    found = jax.lax.dot_general(
        unit, rows * scale[:, None], (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    number = start + jnp.arange(rows.shape[0], dtype=jnp.int32)
    found = jnp.where(number[None, :] < end, found, -jnp.inf)
    top, at = jax.lax.top_k(found, min(k, rows.shape[0]))
    score, row = jnp.concatenate([score, top], axis=1), jnp.concatenate([row, number[at]], axis=1)
    score, at = jax.lax.top_k(score, k)
    return score, jnp.take_along_axis(row, at, axis=1)
