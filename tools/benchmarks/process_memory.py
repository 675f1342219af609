"""Memory of this process, as Linux states it, and measurements in processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_CHILD = """
import importlib, json, sys
module, name, arguments = sys.argv[1:]
print(json.dumps(getattr(importlib.import_module(module), name)(*json.loads(arguments))))
"""


def alone(name: str, *arguments: Any) -> Any:
    """Returns what a function of this package gives in a process of its own on the CPU; what goes in and out is written as JSON.

    Args:
      name: as in "ranking.measured".

    Raises:
      RuntimeError: where the process fails.
    """
    module, _, function = f"tools.benchmarks.{name}".rpartition(".")
    command = [sys.executable, "-c", _CHILD, module, function, json.dumps(arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{name} ended with status {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def status(key: str) -> int:
    """Returns a field of `/proc/self/status` in bytes: "VmRSS", what is resident now, or "VmHWM", the most that was."""
    with Path("/proc/self/status").open() as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{key}:"))


def forget_peak() -> None:
    """Makes "VmHWM" begin again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def own_peak() -> Iterator[list[int]]:
    """Yields a list that holds, at the end, the most bytes that were the process's own, without pages of mapped files."""
    most, ended = [status("RssAnon")], threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            most[0] = max(most[0], status("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()
