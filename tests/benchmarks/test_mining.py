"""The mining benchmark at a small size: every figure is there. No time is asserted."""

from __future__ import annotations

import pytest

from tools.benchmarks import mining


@pytest.mark.parametrize("search", ["exact", "faiss"])
def test_a_case_finds_the_planted_negatives_and_its_row_has_every_column(search: str) -> None:
    found = mining.measure(search, 300, 32)
    assert found["found"] >= 0.99 and found["twins"] <= 0.01
    rows = mining.table([found]).splitlines()
    assert len(rows) == 3 and {row.count("|") for row in rows} == {len(mining.HEAD) + 1}
