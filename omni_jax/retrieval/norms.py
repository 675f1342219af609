"""The lengths of a table's rows, kept beside its (first) file: a search that opens the file need not read every row for them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from omni_jax.retrieval.npz import PathLike, load_arrays, write_members
from omni_jax.types import InputError


def read_norms(paths: Sequence[PathLike], table: str, count: int) -> np.ndarray | None:
    """Returns the (N,) float32 lengths of a table's rows that `write_norms` kept; None where there are none for the file as it is now."""
    with contextlib.suppress(InputError, OSError, KeyError):
        found, _ = load_arrays(_beside(paths[0], table))
        norms = found["norms"]
        if found["file"].tolist() == _state(paths) and norms.dtype == np.float32 and norms.shape == (count,):
            return norms
    return None


def write_norms(paths: Sequence[PathLike], table: str, norms: np.ndarray) -> None:
    """Keeps the lengths of a table's rows beside its file; where that cannot be written, or is in a remote store, they are not kept."""
    with contextlib.suppress(InputError, OSError):
        write_members(_beside(paths[0], table), {"norms": norms, "file": np.array(_state(paths))})


def _state(paths: Sequence[PathLike]) -> list[int]:
    """What changes when a file is written again: its size, and when that was. OSError for one of a remote store."""
    return [number for found in map(os.stat, paths) for number in (found.st_size, found.st_mtime_ns)]


def _beside(path: PathLike, table: str) -> Path:
    return Path(f"{os.fspath(path)}.{table}.norms.npz")
