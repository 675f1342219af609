"""A bounded folder of bytes that were read from an object store, shared by the processes of a machine.

What was used longest ago goes first. Nothing depends on what it holds: what is not there is read again.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from omni_jax.io import WholeFile, lock
from omni_jax.io.messages import as_input_error

FULL = 7 / 8  # of the size that stays when space is freed; processes may write the rest until they look again


class RecordCache:
    """Byte strings by name.

    Attributes:
      folder: where they lie.
    """

    def __init__(self, folder: Path, size: int, writers: int = 1) -> None:
        """Opens the folder, or makes it.

        Args:
          size: bytes that all byte strings in it take together, at most.
          writers: processes that write to it at once.

        Raises:
          InputError: when it cannot be written.
        """
        self.folder, self._size, self._writers = folder, size, writers
        self._each = int(size * (1 - FULL) / max(1, writers))  # bytes that this process writes before it frees space
        self._written = self._each  # what earlier runs left counts, too
        self._guard = threading.Lock()
        with as_input_error(f"{folder}: cannot be written", "set data.cache to a folder on a local disk"):
            folder.mkdir(parents=True, exist_ok=True)

    def __reduce__(self) -> tuple[type[RecordCache], tuple[Path, int, int]]:
        return RecordCache, (self.folder, self._size, self._writers)

    def get(self, name: str) -> bytes | None:
        """Returns a byte string, or None where it is not there."""
        path = self.folder / name
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data

    def has(self, name: str) -> bool:
        """Returns whether a byte string is there."""
        return (self.folder / name).exists()

    def put(self, name: str, data: bytes) -> None:
        """Keeps a byte string; a disk that takes no more keeps none."""
        file = WholeFile(self.folder / name)
        try:
            file.path.parent.mkdir(exist_ok=True)
            file.path.write_bytes(data)
            file.path.replace(self.folder / name)  # without waiting for the disk: what a crash damages is read again
        except OSError:
            file.discard()
            return
        with self._guard:
            self._written += len(data)
            full = self._written > self._each
            if full:
                self._written = 0
        if full:
            self._make_room()

    def discard(self, name: str) -> None:
        """Forgets a byte string."""
        with contextlib.suppress(OSError):
            (self.folder / name).unlink()

    def _make_room(self) -> None:
        with contextlib.suppress(OSError):
            held = lock(self.folder / "lock")
            if held is None:  # another process is at it
                return
            with held:
                found = []
                for folder in os.scandir(self.folder):
                    if folder.is_dir():
                        for entry in os.scandir(folder.path):
                            with contextlib.suppress(FileNotFoundError):
                                at = entry.stat()
                                found.append((at.st_mtime_ns, at.st_size, entry.path))
                over = sum(size for _, size, _ in found) - FULL * self._size
                for _, size, path in sorted(found):
                    if over <= 0:
                        break
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
                    over -= size
