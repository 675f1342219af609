"""What the processes of a run must agree on before they train together: settings, data, a workdir that all of them see.

Without it they would wait for each other for ever, or train on with different numbers. Alone a process agrees with itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from etils import epath

from omni_jax.config.made_with import flat
from omni_jax.io.messages import as_input_error
from omni_jax.parallel import barrier, process_allgather_str, run_on_all_processes, run_on_process_0
from omni_jax.types import InputError

T = TypeVar("T")

LOCAL = ("data.train", "data.media_root", "data.workers", "data.timeout", "model.base", "evaluation.manifest", "evaluation.media_root")
"""Config fields that may differ between hosts, but for being empty or not: digests show whether the contents are the same."""

MARK = ".seen-by-"
PATIENCE_S = 10.0  # a network file system shows a new file to other hosts after a while


def on_all_processes(work: Callable[[], T]) -> T:
    """Returns what `work` gives here, done by every process; all fail where one does. Raises InputError in those where it did not."""
    with _one_line():
        return run_on_all_processes(work)


def on_process_0(work: Callable[[], Any]) -> None:
    """Does something in process 0 alone; all of them fail where it fails."""
    with _one_line():
        if error := run_on_process_0(work):
            raise error


def check_equal(what: str, values: Mapping[str, Any]) -> None:
    """Compares settings with those of process 0; every process must call it.

    Raises:
      InputError: in all of them, naming what differs first.
    """
    mine = {name: bool(value) if name in LOCAL else value for name, value in flat(values)}
    said = [json.loads(text) for text in process_allgather_str(json.dumps(mine, sort_keys=True, default=str))]
    for number, other in enumerate(said):
        for name in sorted({*said[0], *other}):
            here, there = (values.get(name, "absent") for values in (said[0], other))
            if here != there:
                raise InputError(
                    f"the processes disagree on {what}: {name} is {here!r} in process 0 and {there!r} in process {number}; "
                    f"start all of them with the same"
                )


def check_shared(folder: epath.Path) -> None:
    """Checks that every process sees the workdir of process 0 and can write there; every process must call it.

    Raises:
      InputError: in all of them.
    """
    count, me = jax.process_count(), jax.process_index()
    if count == 1:
        return
    run = process_allgather_str(f"{os.getpid()}-{time.time_ns()}")[0]
    marks = [folder / f"{MARK}{number}-{run}" for number in range(count)]

    def write() -> None:
        with as_input_error(f"{folder}: process {me} cannot write there", _MEND):
            marks[me].write_text("")

    def look() -> None:
        end = time.monotonic() + PATIENCE_S
        while not all(mark.exists() for mark in marks):
            if time.monotonic() > end:
                missing = next(number for number, mark in enumerate(marks) if not mark.exists())
                raise InputError(f"{folder}: process {me} does not see what process {missing} writes there; {_MEND}")
            time.sleep(0.1)

    try:
        on_all_processes(write)
        on_all_processes(look)
    finally:
        with contextlib.suppress(OSError):
            marks[me].unlink(missing_ok=True)
    barrier("the workdir is shared")


_MEND = "give all processes one --workdir on storage that they share"


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except RuntimeError as e:
        raise InputError(str(e)) from None
