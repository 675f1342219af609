"""Columns of Parquet whose cells are read in place: by threads that share them, and where they cannot be opened."""

from __future__ import annotations

import gc
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omni_jax.media import parts
from omni_jax.types import ClipError, FilePart


def read(path: Path, row: int) -> bytes:
    with parts.open_bytes(FilePart(path, f"{row}.wav", column="audio", group=0, row=row)) as file:
        return file.read()


def test_threads_that_share_a_column_get_their_own_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [f"cell {number}".encode() for number in range(12)]
    pq.write_table(pa.table({"audio": cells}), tmp_path / "x.parquet")
    monkeypatch.setattr(parts, "goes_on", lambda: time.sleep(1e-3))  # lets another thread in
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda row: read(tmp_path / "x.parquet", row), [*range(12), *range(12)]))
    assert found == [*cells, *cells]


def test_a_column_that_cannot_be_opened_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", others.append)
    with pytest.raises(ClipError, match=r"x\.parquet: cannot be opened \(No such file"):
        read(tmp_path / "x.parquet", 0)
    gc.collect()
    assert not others
