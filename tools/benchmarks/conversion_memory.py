"""Peak memory and speed of `convert to-jax` on checkpoints of 3 and 6 GB: memory must not grow with the checkpoint.

Run alone: python -m tools.benchmarks.conversion_memory [GIGABYTES ...]
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# VmHWM is this process's own peak; ru_maxrss, on Linux, starts at that of the process that started it.
_CHILD = """
import json, resource, sys
from omni_jax import conversion
made = conversion.to_jax(sys.argv[1], sys.argv[2])
try:
    lines = open("/proc/self/status").read().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
except OSError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps({"peak_bytes": peak, "seconds": made.seconds, "bytes": made.nbytes, "tensors": made.tensors}))
"""


def measure(folder: Path, out: Path) -> dict[str, float]:
    """Converts a checkpoint in a process of its own; returns its peak resident memory in bytes, seconds, bytes and tensors."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _CHILD, str(folder), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"the conversion ended with status {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


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
            made = measure(scratch / "source", scratch / "out")
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
