"""Conversion in bounded memory: the peak of a process that converts 3 GB, and 6 GB."""

import pytest

from tools.benchmarks import conversion_memory

LIMIT = 1.5e9  # bytes


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "file_format"), [((3.0, 6.0), "safetensors"), ((3.0,), "bin")])
def test_peak_memory_does_not_grow_with_the_checkpoint(sizes, file_format):
    results = conversion_memory.run(sizes, file_format=file_format)
    assert [round(result["bytes"] / 1e9) for result in results.values()] == [round(size) for size in sizes]
    for size, result in results.items():
        assert result["peak_bytes"] < LIMIT, size
