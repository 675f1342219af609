"""Several processes as one: their start, and the few things they must agree on outside compiled programs."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

COORDINATOR, PROCESSES, PROCESS = "OMNI_JAX_COORDINATOR", "OMNI_JAX_PROCESSES", "OMNI_JAX_PROCESS"
"""Environment variables: host:port of process 0 (or "auto"), how many processes there are, the number of this one from 0."""

T = TypeVar("T")

START = "OMNI_JAX_START_SECONDS"
"""Environment variable: seconds within which the processes must connect; START_SECONDS where it is not set."""

AUTO = "auto"
START_SECONDS = 300
LOST = "OMNI_JAX_LOST_SECONDS"
"""Environment variable: seconds without a sign of life after which a process counts as lost, and all end; LOST_SECONDS if not set."""

LOST_SECONDS = 100
LATE = 2  # exit status of a process that waited in vain


def start(
    coordinator: str | None = None, count: int | None = None, index: int | None = None, environment: Mapping[str, str] = os.environ
) -> bool:
    """Joins the other processes, before any other use of jax; returns whether there are others.

    Arguments that are None are read from the environment; without a coordinator the process is alone. "auto" asks the platform (a TPU
    pod, Slurm), which knows the rest. Where they do not connect in time, the process says so and ends with status 2.

    Raises:
      ValueError: when an address comes without a number, or the numbers make no sense.
    """
    coordinator = environment.get(COORDINATOR) if coordinator is None else coordinator
    if not coordinator:
        return False
    if getattr(jax.config, "jax_platforms", None) == "cpu" or environment.get("JAX_PLATFORMS") == "cpu":
        # Between processes on CPU: the only collectives there that need no other program.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Otherwise jax takes SIGTERM for itself, and a run would not hear that it is to save and leave.
    jax.config.update("jax_enable_preemption_service", False)
    seconds = _number(START, None if START in environment else START_SECONDS, environment)
    lost = _number(LOST, None if LOST in environment else LOST_SECONDS, environment)
    initialize = functools.partial(jax.distributed.initialize, initialization_timeout=2 * seconds + 60, heartbeat_timeout_seconds=lost)
    if coordinator == AUTO:
        with _within(seconds, coordinator, "all processes"):
            initialize()
        return jax.process_count() > 1
    count = _number(PROCESSES, count, environment)
    index = _number(PROCESS, index, environment)
    if not 0 <= index < count:
        raise ValueError(f"process {index} of {count}: numbers start at 0 and end below the count; set {PROCESS} and {PROCESSES}")
    if count == 1:
        return False
    with _within(seconds, coordinator, f"all {count} processes"):
        initialize(coordinator, count, index)
    return True


@contextlib.contextmanager
def _within(seconds: int, coordinator: str, who: str) -> Iterator[None]:
    """Ends the process with one line where the block takes longer: jax itself aborts then, with a stack of C++ functions."""

    def late() -> None:
        host, _, port = coordinator.rpartition(":")
        why = f"not {who} have started; see the messages of the others"
        if coordinator != AUTO:
            try:
                socket.create_connection((host, int(port)), timeout=5).close()
            except (OSError, ValueError) as e:
                why = f"no coordinator at {coordinator} ({e}); start process 0 there, or correct {COORDINATOR}"
        os.write(2, f"omni-jax: timed out after {seconds} s waiting for all processes: {why}\n".encode())
        os._exit(LATE)

    timer = threading.Timer(seconds, late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def any_process(here: bool) -> bool:
    """Returns whether `here` is true in some process. All of them must call it, in the same order."""
    return bool(np.any(process_allgather(np.asarray(here))))


def process_allgather(here: np.ndarray) -> np.ndarray:
    """Returns the arrays of all processes, which all must call it with equal shapes, stacked in the order of their numbers.

    Types of 64 bits would lose half of them on the way.
    """
    return here[None] if jax.process_count() == 1 else np.asarray(multihost_utils.process_allgather(here))


def process_sum(here: Sequence[int]) -> list[int]:
    """Returns the sums of these counts over all processes, which all must call it, in the same order."""
    if jax.process_count() == 1:
        return list(here)
    return np.sum(multihost_utils.process_allgather(np.asarray(here, np.int64)), axis=0).tolist()


def process_allgather_str(here: str) -> list[str]:
    """Returns the texts of all processes, which all must call it, in the order of their numbers."""
    data = np.frombuffer(here.encode(), np.uint8)
    lengths = process_allgather(np.array(data.size, np.int32))
    rows = process_allgather(np.pad(data, (0, int(lengths.max()) - data.size)))
    return [row[:length].tobytes().decode() for row, length in zip(rows, lengths, strict=True)]


def barrier(name: str) -> None:
    """Waits until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def run_on_process_0(work: Callable[[], Any]) -> Exception | None:
    """Runs `work` in process 0 while the others wait; returns None, or its exception in process 0 and a RuntimeError in the others."""
    error: Exception | None = None
    if jax.process_index() == 0:
        try:
            work()
        except Exception as e:
            error = e
    if any_process(error is not None) and error is None:
        error = RuntimeError("process 0 failed; see its own message")
    return error


def run_on_all_processes(work: Callable[[], T]) -> T:
    """Returns what `work` gives in this process, once all processes have done theirs.

    Raises:
      Exception: its own where it failed here, a RuntimeError where it failed in another process alone.
    """
    error: Exception | None = None
    result: T | None = None
    try:
        result = work()
    except Exception as e:
        error = e
    if any_process(error is not None):
        raise error or RuntimeError("another process failed; see its own message")
    return cast(T, result)


def _number(name: str, given: int | None, environment: Mapping[str, str]) -> int:
    if given is not None:
        return given
    text = environment.get(name, "")
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r}: with {COORDINATOR} set to an address it must be a whole number")
    return int(text)
