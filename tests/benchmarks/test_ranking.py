"""The ranking benchmark at a small size: both sides agree, and every figure is there. No time is asserted."""

from __future__ import annotations

import numpy as np
import pytest

from tools.benchmarks import ranking


@pytest.mark.jit
def test_both_sides_find_the_same_places() -> None:
    tables = ranking.random_tables(75, 16)
    found, want = ranking.ours(tables), ranking.published(tables)
    assert set(found) == set(want) and len(found) == 12
    for pair, places in want.items():
        np.testing.assert_array_equal(found[pair], places)


def test_tables_start_where_the_backend_reads_them_in_place() -> None:
    for rows in ranking.random_tables(5, 16).values():
        assert rows.ctypes.data % 64 == 0 and rows.dtype == np.float32


@pytest.mark.slow
def test_run_prints_ratio_memory_and_growth(capsys: pytest.CaptureFixture[str]) -> None:
    result = ranking.run(pairs=1, records=70, width=16, sizes=(64, 128))
    assert set(result) == {"ratio", "seconds", "memory_mb", "places_apart", "growth"} and result["places_apart"] == 0
    out = capsys.readouterr().out.splitlines()
    assert (
        len(out) == 4
        and "12 directions of 70 x 16" in out[0]
        and "memory above the tables" in out[1]
        and "both directions of 128" in out[3]
        and "of the rate of its products alone" in out[3]
    )
