"""Peak memory and speed of `convert to-jax` on checkpoints of 3 and 6 GB: memory must not grow with the checkpoint.

Run alone: python -m tools.benchmarks.conversion_memory [GIGABYTES ...]
"""

from __future__ import annotations

import resource
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools.benchmarks.process_memory import alone, status


def converted(folder: str, out: str) -> dict[str, float]:
    """Converts a checkpoint; returns the peak resident memory of this process in bytes, seconds, bytes and tensors."""
    from omni_jax import conversion

    made = conversion.to_jax(folder, out)
    try:
        peak = status("VmHWM")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"peak_bytes": peak, "seconds": made.seconds, "bytes": made.nbytes, "tensors": made.tensors}


def run(
    gigabytes: Sequence[float] = (3.0, 6.0), shards: int = 6, vocab: int = 151936, file_format: str = "safetensors"
) -> dict[str, dict[str, float]]:
    """Returns size -> {peak_bytes, seconds, bytes, tensors, mb_per_s}, and prints a line for each."""
    from tools.benchmarks import synthetic_checkpoint

    results = {}
    for size in gigabytes:
        scratch = Path(tempfile.mkdtemp(prefix="omni_jax-conversion-"))
        try:
            synthetic_checkpoint.write(scratch / "source", size, shards, vocab, file_format=file_format)
            made = alone("conversion_memory.converted", str(scratch / "source"), str(scratch / "out"))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        made["mb_per_s"] = made["bytes"] / made["seconds"] / 1e6
        results[f"{size:g} GB"] = made
        print(
            f"convert {made['bytes'] / 1e9:.2f} GB in {shards} {file_format} shards: peak memory {made['peak_bytes'] / 1e9:.2f} GB, "
            f"{made['mb_per_s']:.0f} MB/s, {made['seconds']:.1f} s"
        )
    return results


if __name__ == "__main__":
    run([float(size) for size in sys.argv[1:]] or (3.0, 6.0))
