"""Memory of this process, as Linux states it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path


def status(key: str) -> int:
    """Returns a field of `/proc/self/status` in bytes: "VmRSS", what is resident now, or "VmHWM", the most that was."""
    with Path("/proc/self/status").open() as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{key}:"))


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
