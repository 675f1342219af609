"""CPU seconds of a start: the package, the command's help and the Python API, beside a bare interpreter and `import jax`.

Each start is a process of its own, the cases take turns, and medians are compared. Compiled bytecode is there, as after an installation.

Run alone: python -m tools.benchmarks --only starts
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import numpy as np

from tools.benchmarks.timing import PAIRS

BARE, JAX = "bare python", "import jax"
STARTS = {
    BARE: ("-c", "pass"),
    JAX: ("-c", "import jax"),
    "import omni_jax": ("-c", "import omni_jax"),
    "omni-jax --help": ("-m", "omni_jax", "--help"),
    "omni-jax eval --help": ("-m", "omni_jax", "eval", "--help"),
    "from omni_jax import OmniRetriever": ("-c", "from omni_jax import OmniRetriever"),
}
LIMITS = {
    "import omni_jax": 0.1,
    "omni-jax --help": 0.5,
    "omni-jax eval --help": 1.0,
    "from omni_jax import OmniRetriever": 2.0,
}
"""CPU seconds of an idle machine, interpreter included."""


def cpu_seconds(arguments: tuple[str, ...]) -> float:
    """Returns the CPU seconds of an interpreter with these arguments, its children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def run(pairs: int = PAIRS) -> dict[str, dict[str, float]]:
    """Returns CPU seconds of every start, and their ratios to a bare interpreter and to `import jax`; prints a line for each."""
    for arguments in STARTS.values():
        cpu_seconds(arguments)  # writes bytecode
    taken = np.median([[cpu_seconds(arguments) for arguments in STARTS.values()] for _ in range(pairs)], axis=0)
    seconds = dict(zip(STARTS, map(float, taken), strict=True))
    found = {}
    for name, value in seconds.items():
        found[name] = {"cpu_seconds": value, "over_bare": value / seconds[BARE], "over_jax": value / seconds[JAX]}
        limit = f"; limit {LIMITS[name]:g} s{'' if value <= LIMITS[name] else ', EXCEEDED'}" if name in LIMITS else ""
        print(
            f"{name}: {value:.2f} CPU s, {value / seconds[BARE]:.1f} x bare python, {value / seconds[JAX]:.2f} x import jax{limit}",
            flush=True,
        )
    return found
