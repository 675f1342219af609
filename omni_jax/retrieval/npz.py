"""The container of embedding files: `.npz` members written whole or not at all, and read without ever unpickling."""

from __future__ import annotations

import collections
import contextlib
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import IO, Any

import numpy as np
from etils import epath

from omni_jax.io import atomic_write
from omni_jax.io.messages import as_input_error
from omni_jax.io.remote import is_remote
from omni_jax.types import InputError

ALIGNMENT = 64  # bytes; a CPU backend reads an array that starts so without copying it
BLOCK = 1 << 20  # bytes read together
ROWS = 8192  # rows written together
LOCAL_HEAD, ZIP64_FIELD = 30, 20  # bytes of a zip member's header: its fixed part, and the field of 64-bit sizes
PADDING_FIELD = 0xD935  # the extra field that other tools pad members with
ENCRYPTED = 1  # of a zip member's flags

PICKLED = "pickled content is never loaded"

PathLike = str | os.PathLike[str]


def check_place(path: PathLike) -> epath.Path:
    """Returns the path, once it is clear that a file can be put there: to be asked before hours of work, not after.

    Raises:
      InputError: when the folder is missing or not writable, or the name is that of a folder.
    """
    target = epath.Path(path)
    remote = is_remote(path)  # where folders are parts of names, and writing shows what is missing
    if not remote and not target.parent.is_dir():
        raise InputError(f"{path}: folder {target.parent} does not exist; create it or choose another output")
    if target.is_dir():
        raise InputError(f"{path} is a folder; name a file")
    if not remote and not os.access(target.parent, os.W_OK):
        raise InputError(f"{path}: folder {target.parent} cannot be written to; choose another output")
    return target


@contextlib.contextmanager
def output_file(path: PathLike) -> Iterator[IO[bytes]]:
    """Yields a binary file that takes the place of `path` when the block ends well, and leaves nothing behind when it does not.

    Raises:
      InputError: when the folder is missing or cannot be written.
    """
    with atomic_write(check_place(path), "free some space or choose another output") as partial, partial.open("wb") as file:
        yield file


def write_members(path: PathLike, arrays: Mapping[str, Any], comment: str = "") -> None:
    """Writes an `.npz` of arrays, or of tables that stay on disk, atomically, each of them where it can be mapped into memory.

    Args:
      comment: of the archive.

    Raises:
      InputError: for a place that cannot be written.
    """
    # np.savez takes names as keywords and would refuse a record called "file".
    with output_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.comment = comment.encode()
        for name, array in arrays.items():
            with archive.open(_aligned(f"{name}.npy", file.tell()), "w", force_zip64=True) as member:
                write_array(member, array)


def write_array(file: IO[bytes], rows: Any) -> None:
    """Writes an array, or a table that stays on disk a block at a time, as an `.npy` file."""
    if isinstance(rows, np.ndarray):
        np.lib.format.write_array(file, rows, allow_pickle=False)
        return
    shape = tuple(map(int, rows.shape))
    np.lib.format.write_array_header_1_0(file, {"descr": np.dtype(rows.dtype).str, "fortran_order": False, "shape": shape})
    for start in range(0, len(rows), ROWS):
        file.write(np.ascontiguousarray(rows[start : start + ROWS]).data)


def _aligned(name: str, start: int) -> zipfile.ZipInfo:
    """The entry of a member whose header begins at `start`, padded so that its content begins at a multiple of ALIGNMENT."""
    entry = zipfile.ZipInfo(name)
    head = start + LOCAL_HEAD + len(name.encode()) + ZIP64_FIELD + 4
    entry.extra = struct.pack("<HH", PADDING_FIELD, -head % ALIGNMENT) + bytes(-head % ALIGNMENT)
    return entry


def load_arrays(
    path: PathLike, wanted: Callable[[list[str]], Collection[str]] | None = None, mapped: bool = False
) -> tuple[dict[str, np.ndarray], str]:
    """Returns the arrays of an `.npz` file by name, none of them unpickled, and the comment of the archive.

    Args:
      wanted: chooses the names to read; None: all of them.
      mapped: maps arrays into memory where that is possible, so that only what is used is read; the sums of the archive are not checked.

    Raises:
      InputError: for a file that is missing, truncated, no `.npz`, or pickled, or holds a name twice.
    """
    file = epath.Path(path)
    if file.is_dir():
        raise InputError(f"{path} is a folder; name an .npz file")
    if not file.exists():
        raise InputError(f"{path}: no such file")
    damaged = as_input_error(f"{path}: truncated or not an .npz file", "write it again", zipfile.BadZipFile)
    others = as_input_error(f"{path}: cannot be read as arrays", PICKLED, ValueError, EOFError, MemoryError, RuntimeError, zlib.error)
    with as_input_error(f"{path}: cannot be read"), others, damaged, file.open("rb") as stream, zipfile.ZipFile(stream) as archive:
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        doubled = [name for name, times in collections.Counter(archive.namelist()).items() if times > 1]
        if doubled:
            raise InputError(f"{path}: {', '.join(doubled[:3])} appears more than once; write the file again")
        chosen = entries if wanted is None else wanted(list(entries))
        arrays = {}
        for name in (n for n in entries if n in chosen):
            array = _mapped(file, stream, entries[name]) if mapped else None
            if array is None:
                with archive.open(entries[name]) as member:
                    array = read_array(member)
            arrays[name] = array
        return arrays, archive.comment.decode(errors="replace")


def _mapped(path: epath.Path, stream: IO[bytes], entry: zipfile.ZipInfo) -> np.ndarray | None:
    """The array of a member in place; None where it is compressed, empty, not aligned, or not on a local disk."""
    if "://" in os.fspath(path) or entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & ENCRYPTED:
        return None
    stream.seek(entry.header_offset)
    head = stream.read(LOCAL_HEAD)
    if head[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no member where {entry.filename} should begin")
    begin = entry.header_offset + LOCAL_HEAD + sum(struct.unpack("<HH", head[26:30]))
    stream.seek(begin)
    shape, by_column, dtype = _header(stream)
    offset, size = stream.tell(), math.prod(shape) * dtype.itemsize
    if offset + size != begin + entry.file_size:
        raise ValueError("the array is not as long as its header says")
    if not size or offset % dtype.alignment:
        return None
    return np.memmap(path, dtype, "r", offset, shape, "F" if by_column else "C")


def read_array(file: IO[bytes]) -> np.ndarray:
    """Returns the array of an open `.npy` file, its rows aligned for the CPU backend.

    Raises:
      ValueError, EOFError: for a file that holds no plain array, or not all of it.
    """
    shape, by_column, dtype = _header(file)
    size = math.prod(shape) * dtype.itemsize
    flat = aligned_empty((size,), np.uint8)
    for start in range(0, size, BLOCK):
        block = flat[start : start + BLOCK]
        data = file.read(len(block))
        if len(data) < len(block):
            raise EOFError("the array ends early")
        block[:] = np.frombuffer(data, np.uint8)
    if file.read(1):  # also makes a zip member check its sum
        raise ValueError("more values than the header says")
    return flat.view(dtype).reshape(shape, order="F" if by_column else "C")


def aligned_empty(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Returns an array that the CPU backend reads without copying it; its values are any."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    return buffer[-buffer.ctypes.data % ALIGNMENT :][:size].view(dtype).reshape(shape)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns lie together, and type of the array that an `.npy` file holds."""
    version = np.lib.format.read_magic(file)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if header is None:
        raise ValueError(f"array format {version[0]}.{version[1]}")
    shape, by_column, dtype = header(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return shape, by_column, dtype
