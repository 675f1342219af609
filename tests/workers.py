"""How the tests share the cores of a machine: the number of pytest-xdist workers, and the threads of each."""

from __future__ import annotations

import collections
import os
from pathlib import Path
from typing import Any

import psutil
import pytest

WORKER_BYTES = 4 << 30  # what a worker holds near the end of the run, its jitted programs included
# Several processes that wait for each other: one test after the other, so that none waits for another one's processes.
PROCESSES = (
    "tests/launch/test_end_to_end.py",
    "tests/retrieval/test_processes.py",
    "tests/train/test_hosts.py",
    "tests/train/test_processes.py",
)
# Files of about a minute and more, begun after those, so that the last ones are short. What is out of date here costs time alone.
LONG = (
    "tests/train/test_interruptions.py",
    "tests/ablation/test_runs.py",
    "tests/engines/test_ray_runs.py",
    "tests/conversion/test_memory.py",
    "tests/documentation/test_tutorials.py",
    "tests/train/test_golden_run.py",
    "tests/train/test_gradients.py",
    "tests/train/test_step.py",
    "tests/train/test_int8.py",
    "tests/model/test_sharding.py",
    "tests/cli/test_embed.py",
    "tests/cli/test_encode.py",
    "tests/cli/test_nemotron.py",
    "tests/cli/test_demo.py",
)


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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Returns the scheduler of `--dist loadfile`: files, PROCESSES as one; a test that brought its worker down is not tried again."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "processes" if file in PROCESSES else file

        def remove_node(self, node: Any) -> str | None:
            # xdist would hand the test to the next worker, and a test that hangs would cost its time limit again and again.
            units = self.assigned_work[node]
            lost = next((test for unit in units.values() for test, done in unit.items() if not done), None)
            # It would hand on the files that are done, too, and a worker that gets one of them waits for ever.
            rest = {file: unit | ({lost: True} if lost in unit else {}) for file, unit in units.items()}
            self.assigned_work[node] = {file: unit for file, unit in rest.items() if not all(unit.values())}
            super().remove_node(node)
            return lost

        def _reschedule(self, node: Any) -> None:
            # A worker needs to know the test after the one that it runs. xdist hands out the next file a test earlier than that, and
            # where tests take minutes one worker would keep it waiting while another has nothing to do.
            if self.workqueue and self._pending_of(self.assigned_work[node]) > 1:
                return
            super()._reschedule(node)
            # A worker keeps its last test back until it gets another one. One that replaces a lost worker may never get one.
            if not self.workqueue and not node.shutting_down:
                node.shutdown()

    return Files(config, log)


def put_long_files_first(items: list[pytest.Item]) -> None:
    """Sorts the files of a worker's tests: PROCESSES, LONG, the others by what they compile. The last ones are short."""
    compiling = collections.Counter(item.path for item in items if item.get_closest_marker("jit") or item.get_closest_marker("slow"))
    places = {name: place for place, name in enumerate((*PROCESSES, *LONG))}
    items.sort(key=lambda item: (places.get(item.nodeid.partition("::")[0], len(places)), -compiling[item.path]))


def is_controller(config: pytest.Config) -> bool:
    """Whether this process only hands tests to workers."""
    return not hasattr(config, "workerinput") and config.getoption("dist", "no") != "no"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
