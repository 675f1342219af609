"""Text files that grow, on local disks and in object stores."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from omni_jax.io.remote import is_remote, reaching

if TYPE_CHECKING:
    from etils import epath

PERIOD_S = 60.0  # between two writes of an object


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
