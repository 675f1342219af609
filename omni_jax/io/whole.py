"""Files that appear under their names only when they are whole, on local disks and object stores."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from omni_jax.io.remote import reaching
from omni_jax.types import InputError

if TYPE_CHECKING:
    from etils import epath

HINT = "check that the folder exists and has space"


class WholeFile:
    """A file that is written under a temporary name beside its place.

    Attributes:
      path: the temporary name, hidden, ending in ".unfinished".
    """

    def __init__(self, target: Path | epath.Path, *, flush: bool = True):
        """Takes the place, and whether the disk must have the file before its name: a loss of power then leaves none that is cut."""
        self._target, self._flush = target, flush
        self.path: Path = cast(Path, target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.unfinished"))
        self._finished = False

    def finish(self) -> None:
        """Gives the file its name. Raises OSError."""
        if self._flush and "://" not in os.fspath(self.path):
            with open(self.path, "rb+") as file:
                os.fsync(file.fileno())
        self.path.replace(self._target)
        self._finished = True

    def discard(self) -> None:
        """Removes what was written and not finished."""
        if not self._finished:
            with contextlib.suppress(OSError, InputError), reaching(self.path):
                self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(target: Path | epath.Path, hint: str = HINT, *, flush: bool = True) -> Iterator[Path]:
    """Yields the name under which to write what takes the place of `target` when the block ends well; otherwise nothing stays.

    Args:
      flush: whether the disk must have the file first. Thousands of small ones that can be made again need not wait for that.

    Raises:
      InputError: when it cannot be written; `hint` says what to do.
    """
    file = WholeFile(target, flush=flush)
    try:
        with reaching(target):
            yield file.path
            file.finish()
    except OSError as e:
        raise InputError(f"{target}: cannot be written ({e.strerror or e}); {hint}") from None
    finally:
        file.discard()


def atomic_write_text(target: Path | epath.Path, text: str) -> None:
    """Writes a text file (UTF-8), which appears whole or not at all. Raises InputError when it cannot be written."""
    with atomic_write(target) as path:
        path.write_text(text, encoding="utf-8")
