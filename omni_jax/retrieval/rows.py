"""What a table must be before its rows can be compared by cosine: numbers in rows, and a direction in each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from omni_jax.io.messages import some
from omni_jax.retrieval.stored_rows import StoredRows
from omni_jax.types import ArgumentError, EmbeddingTable, InputError

NORMS = (1e-30, 1e30)  # outside, the reciprocal of a norm or a product of two rows leaves float32
INT8 = 127  # largest value of an int8 row
TOGETHER = 32  # rows handled together in float64
BLOCK = 16_384  # rows cut together
PRECISIONS = ("float32", "float16", "int8", "binary")
TRUNCATE_DIM = "truncate_dim"
"""Field of `EmbeddingTable.made_with`: dimensions that vectors were cut to; without it they have all."""


def as_rows(rows: np.ndarray | StoredRows, name: str) -> Any:
    """Returns (N, D) float32, or bfloat16 as it was given; rows that stay on disk stay there.

    Raises:
      InputError: for an array that is not (N, D) with N, D >= 1, or holds no numbers.
    """
    if not isinstance(rows, StoredRows):
        rows = np.asarray(rows)
    if rows.ndim != 2 or 0 in rows.shape:
        raise InputError(f"table {name!r} has shape {rows.shape}; expected (records, width), both at least 1")
    if rows.dtype.kind not in "fiu" and rows.dtype.name != "bfloat16":
        raise InputError(f"table {name!r} holds {rows.dtype}; expected floating point numbers")
    if isinstance(rows, StoredRows):
        return rows
    return np.ascontiguousarray(rows, dtype=rows.dtype if rows.dtype.name == "bfloat16" else np.float32)


def lengths(rows: np.ndarray | StoredRows, name: str, ids: Sequence[str] | None = None, numbers: np.ndarray | None = None) -> np.ndarray:
    """Returns the norms of rows (N, D), float64.

    Args:
      ids: of all records of the table, for the message.
      numbers: (N,), the rows' places in the table; None: from 0.

    Raises:
      InputError: for rows with NaN, infinity, or no usable norm, naming them.
    """
    norms = np.empty(len(rows))
    for part in parts(len(rows)):
        wide = rows[part].astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            norms[part] = np.sqrt(np.vecdot(wide, wide))
    for bad, what in (
        (~np.isfinite(norms), "NaN or infinity"),
        (norms == 0, "only zeros"),
        ((norms < NORMS[0]) | (norms > NORMS[1]), f"vectors whose norm is outside {NORMS}"),
    ):
        found = np.flatnonzero(bad)
        if len(found):
            places = (found if numbers is None else numbers[found])[:6].tolist()
            shown = some((i if ids is None else f"{i} ({ids[i]})" for i in places), 5)
            raise InputError(f"table {name!r}: {len(found)} rows hold {what}: {shown}; embed these records again or drop them")
    return norms


def l2_normalize(rows: np.ndarray) -> np.ndarray:
    """Returns rows of length 1, (N, D) float32. They must not be zero."""
    rows = np.asarray(rows, dtype=np.float32)
    return rows / np.linalg.norm(rows.astype(np.float64), axis=-1, keepdims=True).astype(np.float32)


def truncated_rows(rows: np.ndarray, dim: int, normalize: bool = True) -> np.ndarray:
    """Returns the first `dim` columns of rows (N, D), scaled to length 1 where `normalize` says so; zeros stay zeros."""
    return unit_rows(rows[:, :dim]) if normalize else rows[:, :dim]


def truncated(table: EmbeddingTable, dim: int | None) -> EmbeddingTable:
    """Returns tables of the first `dim` dimensions, scaled to length 1 again unless the vectors were made otherwise; None: all as they are.

    `made_with` records the number under TRUNCATE_DIM.

    Raises:
      InputError: for more dimensions than a table has.
    """
    if dim is None:
        return table
    for name, rows in table.tables.items():
        if dim > rows.shape[1]:
            raise InputError(f"truncate_dim {dim}: table {name!r} has {rows.shape[1]} dimensions; keep so many at most")
    normalize = table.made_with is None or table.made_with.get("normalize") is not False
    made_with = None if table.made_with is None else {**table.made_with, TRUNCATE_DIM: dim}
    tables = {}
    for name, rows in table.tables.items():
        tables[name] = np.empty((len(rows), dim), np.float32)
        for start in range(0, len(rows), BLOCK):  # rows that stay on disk are read in blocks
            part = slice(start, start + BLOCK)
            tables[name][part] = truncated_rows(rows[part], dim, normalize)
    return dataclasses.replace(table, tables=tables, made_with=made_with)


def parts(n: int) -> Iterator[slice]:
    """Yields slices of TOGETHER rows."""
    return (slice(start, start + TOGETHER) for start in range(0, n, TOGETHER))


def quantized(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns int8 (N, D) and scales (N,) float32 whose product is near the rows: every row's largest value becomes 127."""
    scale = np.abs(rows).max(axis=1).astype(np.float32) / INT8
    return np.rint(rows / np.where(scale > 0, scale, 1)[:, None]).astype(np.int8), scale


def finished(rows: np.ndarray, truncate_dim: int | None, normalize: bool, precision: str) -> np.ndarray:
    """Returns rows (N, D) float32 cut to their first columns, scaled again where they are to have length 1, in a precision of `PRECISIONS`.

    int8 scales each row so that its largest value is 127, which leaves cosines as they are but for rounding; binary is a bit a column, 1
    where the value is positive, eight to a byte, less 128, as sentence-transformers packs them: (N, ceil(D / 8)) int8.
    """
    if truncate_dim is not None:
        rows = truncated_rows(rows, truncate_dim, normalize)
    if precision == "float16":
        return rows.astype(np.float16)
    if precision == "int8":
        return quantized(rows)[0]
    if precision == "binary":
        return (np.packbits(rows > 0, axis=-1).astype(np.int16) - 128).astype(np.int8)
    return np.ascontiguousarray(rows, np.float32)


def similarity(a: Any, b: Any, *, pairwise: bool = False) -> np.ndarray:
    """Returns cosines of rows: (N, M) float32 of every pair, or (N,) of equal places.

    Raises:
      ArgumentError: for what is no array of vectors, other widths, or with `pairwise` other lengths.
    """
    one, other = (np.atleast_2d(np.asarray(x)) for x in (a, b))
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1] or {one.dtype.kind, other.dtype.kind} - set("fiu"):
        raise ArgumentError(
            f"similarity: arrays of {one.dtype} {one.shape} and {other.dtype} {other.shape}; give (N, D) and (M, D) of one D"
        )
    one, other = (unit_rows(x.astype(np.float32)) for x in (one, other))
    if not pairwise:
        return one @ other.T
    if len(one) != len(other):
        raise ArgumentError(f"similarity_pairwise: {len(one)} and {len(other)} embeddings; give as many of both")
    return np.vecdot(one, other)


def paired_cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Returns the cosine (N,) float64 of each row of one table with that of the other. They must not be zero."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    return np.vecdot(a, b) / np.sqrt(np.vecdot(a, a) * np.vecdot(b, b))


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Returns rows scaled to length 1; zeros stay zeros."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-12))
