"""How the tests share the cores of a machine: the number of pytest-xdist workers, and the threads of each."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

WORKER_BYTES = 3 << 30  # what a worker holds near the end of the run, its jitted programs included


def bound_threads() -> None:
    """Gives this process, where it is a worker, its share of the cores; call it before NumPy, JAX or torch is imported.

    XLA reads NPROC. Commands that a test starts inherit the bounds. Values set by the user stay.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0"))
    if workers > 1:
        share = str(max(1, _cores() // workers))
        for name in ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, share)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Returns the workers of `-n auto`: one a core as far as memory allows; 0, for none, where they would not pay.

    That is on one core, and where only files or single tests are named: a worker starts in seconds and a file stays on one worker.
    """
    named = [Path(argument.partition("::")[0]) for argument in config.args]
    if not any((config.invocation_params.dir / path).is_dir() for path in named):
        return 0
    workers = min(_cores(), psutil.virtual_memory().total // WORKER_BYTES)
    return workers if workers > 1 else 0


def is_controller(config: pytest.Config) -> bool:
    """Whether this process only hands tests to workers."""
    return not hasattr(config, "workerinput") and config.getoption("dist", "no") != "no"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
