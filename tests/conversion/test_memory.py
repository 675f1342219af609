"""Conversion in bounded memory: the peak of a process that converts 6 GB of safetensors, and 3 GB of torch's own files."""

import pytest

from tools.benchmarks import conversion_memory

LIMIT = 1.5e9  # bytes


@pytest.mark.slow
@pytest.mark.parametrize(("size", "file_format"), [(6.0, "safetensors"), (3.0, "bin")])
def test_peak_memory_does_not_grow_with_the_checkpoint(size, file_format):
    (result,) = conversion_memory.run((size,), file_format=file_format).values()
    assert round(result["bytes"] / 1e9) == round(size)
    assert result["peak_bytes"] < LIMIT
