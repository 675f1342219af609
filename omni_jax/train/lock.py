"""One run at a time in a workdir: a lock that the operating system frees however the process ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from etils import epath

from omni_jax.io import lock
from omni_jax.io.messages import as_input_error
from omni_jax.types import InputError

LOCK = "run.lock"


@contextlib.contextmanager
def run_lock(workdir: epath.PathLike) -> Iterator[None]:
    """Holds the workdir, made where it is not there, while the block runs. Object stores have no locks: there it only makes the folder.

    Raises:
      InputError: when another process holds it, or it cannot be written.
    """
    folder = epath.Path(workdir)
    with as_input_error(f"{folder}: cannot be written", "choose another --workdir"):
        folder.mkdir(parents=True, exist_ok=True)
        if "://" in os.fspath(folder):
            yield
            return
        held = lock(folder / LOCK)
    if held is None:
        raise InputError(f"{folder}: another run is training here; wait for it, or choose another --workdir")
    with held:
        yield
