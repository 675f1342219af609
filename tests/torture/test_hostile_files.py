"""The short form of part `files`."""

from __future__ import annotations

import pytest

from tools.torture import hostile_files

pytestmark = pytest.mark.jit


def test_golden_hostile_files_are_refused_and_nothing_runs() -> None:
    outcome = hostile_files.run(3, 5, rounds=20)
    assert outcome.lost == []
    assert min(count for _, count in outcome.tried) > 0
