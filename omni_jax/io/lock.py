"""One process at a time: a lock that the operating system frees however the process ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from etils import epath


def lock(path: Path | epath.Path, *, wait: bool = False) -> BinaryIO | None:
    """Returns an open file that holds `path` against other processes of this machine until it is closed; None where another one holds it.

    Args:
      path: of a local file, made where it is not there; its folder must be.
      wait: waits for the other process instead of returning None.

    Raises:
      OSError: when the file cannot be made.
    """
    while True:
        file = open(path, "ab")  # noqa: SIM115 - open as long as it is held
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()  # locked, but of a folder that was removed meanwhile: no other process would see the lock
