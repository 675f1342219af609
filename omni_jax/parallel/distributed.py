"""Several processes as one: their start, and the few things they must agree on outside compiled programs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

COORDINATOR, PROCESSES, PROCESS = "OMNI_JAX_COORDINATOR", "OMNI_JAX_PROCESSES", "OMNI_JAX_PROCESS"
"""Environment variables: host:port of process 0 (or "auto"), how many processes there are, the number of this one from 0."""

AUTO = "auto"
START_SECONDS = 300


def start(
    coordinator: str | None = None, count: int | None = None, index: int | None = None, environment: Mapping[str, str] = os.environ
) -> bool:
    """Joins the other processes, before any other use of jax; returns whether there are others.

    Arguments that are None are read from the environment; without a coordinator the process stands alone. "auto" asks the platform (a TPU
    pod, Slurm), which knows the rest.

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
    if coordinator == AUTO:
        jax.distributed.initialize()
        return jax.process_count() > 1
    count = _number(PROCESSES, count, environment)
    index = _number(PROCESS, index, environment)
    if not 0 <= index < count:
        raise ValueError(f"process {index} of {count}: numbers start at 0 and end below the count; set {PROCESS} and {PROCESSES}")
    if count == 1:
        return False
    jax.distributed.initialize(coordinator, count, index, initialization_timeout=START_SECONDS)
    return True


def any_process(here: bool) -> bool:
    """Returns whether `here` is true in some process. All of them must call it, in the same order."""
    if jax.process_count() == 1:
        return here
    return bool(np.any(multihost_utils.process_allgather(np.asarray(here))))


def total_over_processes(here: Sequence[int]) -> list[int]:
    """Returns the sums of these counts over all processes, which all must call it, in the same order."""
    if jax.process_count() == 1:
        return list(here)
    return np.sum(multihost_utils.process_allgather(np.asarray(here, np.int64)), axis=0).tolist()


def barrier(name: str) -> None:
    """Waits until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def first_does(work: Callable[[], Any]) -> Exception | None:
    """Runs `work` in process 0 while the others wait; returns None, or its exception in process 0 and a RuntimeError in the others."""
    error: Exception | None = None
    if jax.process_index() == 0:
        try:
            work()
        except Exception as e:
            error = e
    if any_process(error is not None) and error is None:
        error = RuntimeError("process 0 could not go on; its own message says why")
    return error


def _number(name: str, given: int | None, environment: Mapping[str, str]) -> int:
    if given is not None:
        return given
    text = environment.get(name, "")
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r}: with {COORDINATOR} set to an address it must be a whole number")
    return int(text)
