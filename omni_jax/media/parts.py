"""Media files that lie inside other files, read there: members of a tar and cells of a Parquet column. Nothing is unpacked.

A member is a byte range of its tar. A cell is in a page, which is compressed and often shared by all rows of a row group. So a row group
is read in order; a process keeps its place in the last two columns, and the next row costs that row alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import math
import os
import tarfile
import threading
import weakref
from typing import IO, Any, TypeAlias, cast

from omni_jax.io.messages import line_of
from omni_jax.io.remote import is_remote
from omni_jax.media.workers import goes_on
from omni_jax.types import ClipError, FilePart, InputError

PathLike: TypeAlias = "os.PathLike[str] | str"
_BLOCK = 512  # bytes: a tar's unit; the header of a member is in the block before its bytes
_LARGEST = 8 << 30  # bytes: the header of a larger member may state its size elsewhere
_BUFFER = 1 << 20  # bytes of a file that are read at a time, not a whole column of a row group


def reason(error: BaseException) -> str:
    """One line of an exception's message, without the path that our own messages already name."""
    return line_of(getattr(error, "strerror", None) or str(error) or type(error).__name__)


def open_binary(path: PathLike) -> IO[bytes]:
    """Returns a file opened for reading, of this machine or of an object store. Raises ClipError where it cannot be opened."""
    try:
        if not is_remote(path):
            return open(path, "rb")
        from etils import epath  # reading gs:// alone needs it

        return cast("IO[bytes]", epath.Path(os.fspath(path)).open("rb"))
    except Exception as error:  # every store has its own exceptions
        raise ClipError(f"{path}: cannot be opened ({reason(error)}); check the path and your access to it") from None


def parquet_module() -> Any:
    """Returns `pyarrow.parquet`. Raises InputError where pyarrow is not installed."""
    try:
        return importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise InputError("pyarrow is not installed, which reads Parquet; run pip install 'omni-jax[parquet]'") from error


class Window:
    """Bytes of an open file from `start` on, as a file of its own for PyAV. FFmpeg goes by its name, too."""

    def __init__(self, file: IO[bytes], start: int, size: int, name: str) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0
        self.name = name

    def __enter__(self) -> Window:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        self._file.seek(self._start + self._at)
        data = self._file.read(left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data


def open_bytes(path: PathLike, start: int = 0) -> IO[bytes] | Window:
    """Opens a file of this machine or of a remote store, or a part of a file, from a byte on. Raises ClipError where it cannot."""
    if not isinstance(path, FilePart):
        file = open_binary(path)
        return Window(file, start, file.seek(0, os.SEEK_END) - start, os.fspath(path)) if start else file
    if not path.column:
        return Window(open_binary(path.file), path.start + start, path.size - start, path.name)
    data = _cell(path)
    # FFmpeg knows WAV by its name, and cells may have none.
    is_wav = data[:4] == b"RIFF" and data[8:12] == b"WAVE" and not os.path.splitext(path.name)[1]
    return Window(io.BytesIO(data), start, len(data) - start, path.name + ".wav" * is_wav)


def check_part(part: FilePart) -> None:
    """Raises ClipError where a tar's member is empty, is cut off, or is not where it was when the tar was listed."""
    if part.column:
        if not _cell(part):
            raise ClipError(f"{part}: the cell is empty; remove the row, or fill it")
        return
    if not part.size:
        raise ClipError(f"{part}: the member is empty; make the tar again")
    with open_binary(part.file) as file:
        if file.seek(0, os.SEEK_END) < part.start + part.size:
            raise ClipError(f"{part}: truncated: the tar ends within the member; fetch the tar again")
        file.seek(max(0, part.start - _BLOCK))
        try:
            found = tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "surrogateescape").size
        except tarfile.HeaderError:
            found = -1
        if found != part.size and (found < 0 or part.size < _LARGEST):
            raise ClipError(f"{part}: the tar has no such member at byte {part.start} any more; list it again with 'omni-jax manifest'")


class _Column:
    """Cells of one column of one row group, which are read in their order."""

    def __init__(self, part: FilePart) -> None:
        self._part, self._file, self._row, self._data = part, open_binary(part.file), math.inf, b""
        self._lock = threading.Lock()  # threads that decode in this process share the place
        weakref.finalize(self, self._file.close)

    def cell(self, row: int) -> bytes:
        """Returns the bytes of a cell; b"" for null."""
        with self._lock:
            return self._read(row)

    def _read(self, row: int) -> bytes:
        at, self._row = self._row, math.inf  # begins again where this fails
        if at > row:
            parquet = parquet_module().ParquetFile(self._file, buffer_size=_BUFFER, pre_buffer=False)
            part, at = self._part, -1
            self._batches = parquet.iter_batches(batch_size=1, row_groups=[part.group], columns=[part.column], use_threads=False)
        while at < row:
            goes_on()
            value: Any = next(self._batches).column(0)
            while value.type.num_fields:  # a struct of the one leaf
                value = value.flatten()[0]
            self._data, at = value[0].as_py() or b"", at + 1
        self._row = row
        return self._data


@functools.lru_cache(maxsize=2)  # a record has two media files at most; each holds the pages that it reads, twice its bytes of a row group
def _column(*key: Any) -> _Column:
    return _Column(FilePart(key[0], "", column=key[1], group=key[2]))


def _cell(part: FilePart) -> bytes:
    key: list[Any] = [part.file, part.column, part.group]
    with contextlib.suppress(OSError):  # of a store, or one that is missing
        status = os.stat(part.file)  # another file may have taken its place
        key += status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    try:
        return _column(*key).cell(part.row)
    except StopIteration:
        raise ClipError(f"{part}: the file has no such row any more; list it again with 'omni-jax manifest'") from None
    except (InputError, ImportError):
        raise
    except Exception as error:  # pyarrow's errors have no class of their own
        why = line_of(error)
        raise ClipError(f"{part}: cannot be read ({why}); fetch the file again, or list it again with 'omni-jax manifest'") from None
