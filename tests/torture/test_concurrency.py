"""The short form of part `concurrency`: the lock alone, taken by many; processes are raced by `make torture`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.torture import concurrency
from tools.torture.outcome import Outcome

pytestmark = pytest.mark.jit


def test_one_journal_is_held_by_one_run_at_a_time(tmp_path: Path) -> None:
    outcome = Outcome("concurrency", 0)
    concurrency.hammer(outcome, tmp_path / "journal", 1200)
    assert outcome.lost == []
