"""The short form of part `numbers`."""

from __future__ import annotations

import pytest

from tools.torture import numbers

pytestmark = pytest.mark.jit


def test_edges_of_the_numbers() -> None:
    outcome = numbers.run(5, 5, clips=0, rows=50_000, draws=12)
    assert outcome.lost == []
    assert len(outcome.tried) == 4
