"""Conversion in bounded memory: the peak of a process that converts 3 GB, and 6 GB."""

import pytest

from tests.benchmarks import conversion_memory

LIMIT = 1.5e9  # bytes


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_checkpoint():
    results = conversion_memory.run((3.0, 6.0))
    assert [round(result["bytes"] / 1e9) for result in results.values()] == [3, 6]
    for size, result in results.items():
        assert result["peak_bytes"] < LIMIT, size
