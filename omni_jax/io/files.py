"""Files written whole or not at all, files that grow, folders for what goes elsewhere, and locks that the operating system frees."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from omni_jax.io.remote import is_remote, reaching
from omni_jax.types import InputError

if TYPE_CHECKING:
    from etils import epath

HINT = "check that the folder exists and has space"
PERIOD_S = 60.0  # between two writes of an object
LOCK = "lock"
TAG = 8  # hexadecimal digits that tell two writers of one file apart
FRESH_S = 60.0  # a folder so new may not be locked yet


class WholeFile:
    """A file that is written under a temporary name beside its place.

    Attributes:
      path: the temporary name, hidden, ending in ".unfinished".
    """

    def __init__(self, target: Path | epath.Path, *, flush: bool = True):
        """Takes the place, and whether the disk must have the file before its name: a loss of power then leaves none that is cut."""
        self._target, self._flush = target, flush
        self.path: Path = cast(Path, target.with_name(f".{target.name}.{uuid.uuid4().hex[:TAG]}.unfinished"))
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


def remove_leftovers(folder: Path | epath.Path, name: str = "*") -> None:
    """Removes what killed processes left of a `WholeFile` called `name` (a glob pattern) in a folder that no living process writes to."""
    for leftover in list(folder.glob(f".{name}.{'[0-9a-f]' * TAG}.unfinished")):
        leftover.unlink(missing_ok=True)


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


class GrowingText:
    """A text file (UTF-8) open for lines at its end.

    An object cannot grow, and a client that opens one to append replaces it or keeps everything until it is closed. So the text of an
    object is held in memory and written whole: once in PERIOD_S, and when `sync` or `close` says so.
    """

    def __init__(self, path: epath.Path, text: str | None = None):
        """Opens the file, made where it is not there; `text` is what is in it, where that has been read. Raises OSError; StoreError where
        an object store refuses."""
        self._path = path
        self._file = None if is_remote(path) else path.open("a", encoding="utf-8")
        self._text, self._written = text or "", time.monotonic()
        self._waiting = False
        if self._file is None and text is None:
            with reaching(path):
                self._text = path.read_text() if path.exists() else ""

    def write(self, text: str) -> None:
        """Adds text; on a disk a reader finds it at once. Raises as the class does."""
        if self._file is not None:
            self._file.write(text)
            self._file.flush()
            return
        self._text += text
        self._waiting = True
        if time.monotonic() - self._written >= PERIOD_S:
            self.sync()

    def sync(self) -> None:
        """Returns when all text is where a reader finds it. Raises as the class does."""
        if self._waiting:
            with reaching(self._path):
                self._path.write_text(self._text)
            self._waiting, self._written = False, time.monotonic()

    def close(self) -> None:
        """Writes what waits, and closes the file. Raises as the class does."""
        self.sync()
        if self._file is not None:
            self._file.close()


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


@contextlib.contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """Yields an empty folder, removed when the block ends. What killed processes left under the same name is removed first.

    Raises:
      OSError: when it cannot be made.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{name}-*"):
        with contextlib.suppress(OSError):  # another user's, or just removed
            if time.time() - left.stat().st_mtime > FRESH_S and (held := lock(left / LOCK)) is not None:
                with held:
                    shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as made:
        held = lock(Path(made) / LOCK)
        assert held is not None
        with held:
            folder = Path(made) / "files"
            folder.mkdir()
            yield folder
