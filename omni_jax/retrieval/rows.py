"""What a table must be before its rows can be compared by cosine: numbers in rows, and a direction in each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from omni_jax.retrieval.stored_rows import StoredRows
from omni_jax.types import InputError

NORMS = (1e-30, 1e30)  # outside, the reciprocal of a norm or a product of two rows leaves float32
INT8 = 127  # largest value of an int8 row
TOGETHER = 32  # rows handled together in float64


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
      numbers: (N,), where the rows stand in the table; None: from 0.

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
            places = found[:5] if numbers is None else numbers[found[:5]]
            shown = ", ".join(str(i) if ids is None else f"{i} ({ids[i]})" for i in places)
            more = ", ..." if len(found) > 5 else ""
            raise InputError(f"table {name!r}: {len(found)} rows hold {what}: {shown}{more}; embed these records again or drop them")
    return norms


def unit(rows: np.ndarray) -> np.ndarray:
    """Returns rows of length 1, (N, D) float32. They must not be zero."""
    rows = np.asarray(rows, dtype=np.float32)
    return rows / np.linalg.norm(rows.astype(np.float64), axis=-1, keepdims=True).astype(np.float32)


def parts(n: int) -> Iterator[slice]:
    """Yields slices of TOGETHER rows."""
    return (slice(start, start + TOGETHER) for start in range(0, n, TOGETHER))


def quantized(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns int8 (N, D) and scales (N,) float32 whose product is near the rows: every row's largest value becomes 127."""
    scale = np.abs(rows).max(axis=1).astype(np.float32) / INT8
    return np.rint(rows / np.where(scale > 0, scale, 1)[:, None]).astype(np.int8), scale
