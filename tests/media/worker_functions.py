"""What the tests of the pool run in its processes. Imported by them under this name."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.media.workers import goes_on
from omni_jax.types import ClipError, InputError


def square(number: int) -> int:
    return number * number


def slow_first(number: int) -> int:
    """Later items are ready before earlier ones."""
    time.sleep(0.3 if number % 4 == 0 else 0.0)
    return number


def arrays(size: int) -> dict[str, Any]:
    return {"floats": np.arange(size, dtype=np.float32), "strided": np.arange(2 * size)[::2], "empty": np.zeros((0, 3)), "text": "x"}


def environment(_: int) -> dict[str, Any]:
    return {"jax": "jax" in sys.modules, "torch": "torch" in sys.modules, "main": sys.modules["__main__"].__name__, "pid": os.getpid()}


def misbehave(what: str) -> str:
    """Does what its item says."""
    if what == "hang":
        # A C call that keeps the interpreter's lock and sees no signal handler: no Python code of this process runs again.
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP})
        while True:
            ctypes.PyDLL(None).pause()
    if what.startswith("slow"):  # four seconds, or what is in the name, with a word every half of one
        for _ in range(2 * int(what[4:] or 4)):
            time.sleep(0.5)
            goes_on()
    if what.startswith("fifo:"):
        return Path(what[5:]).read_text()  # blocks for as long as nobody writes to it
    if what == "segfault":
        ctypes.string_at(0)
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what.startswith("killed once:") and not Path(what[12:]).exists():  # as by the kernel, for the memory that others took
        Path(what[12:]).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "exit":
        os._exit(3)
    if what == "clip error":
        raise ClipError("clip.mp4: truncated; fetch it again")
    if what == "input error":
        raise InputError("clip.mp4: no")
    if what == "memory":
        raise MemoryError
    if what == "bug":
        raise KeyError("lost\nkey")
    if what == "own bug":
        sorted([], no_such_argument=1)  # type: ignore[call-overload]
    if what == "unsendable":
        return lambda: "x"  # type: ignore[return-value]
    return what


def pages_taken(size: int) -> int:
    """How many pages the kernel gives for three arrays of so many bytes, that were there and freed before."""
    taken = 0
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        held = [np.ones(size, np.uint8) for _ in range(3)]
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        del held
    return taken


def note_and_wait(folder: str) -> None:
    """Leaves the process number in a folder, then waits for long."""
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)
