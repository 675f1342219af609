"""safetensors files read one tensor at a time and written in place, in memory bounded by one tensor.

Files are read with plain seeks rather than memory maps: mapped pages count as resident memory, and object stores cannot be mapped.
The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data, C order, little-endian.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from omni_jax.io.messages import stands_for
from omni_jax.types import InputError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
FLOATS = ("F64", "F32", "F16", "BF16")
"""Element types a weight may have."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes, the limit of the reference implementation
_AGAIN = "download it again"


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where one tensor is: `start` is its first byte in the file `path`, `dtype` its safetensors name.

    Attributes:
      stride: values between neighbours on each axis; None where they lie in C order, as they always do in safetensors files.
      check: called before values are read; raises where the file does not hold what it says.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: epath.Path
    start: int
    stride: tuple[int, ...] | None = None
    check: Callable[[], None] | None = dataclasses.field(default=None, compare=False)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * DTYPES[self.dtype].itemsize

    def read(self) -> np.ndarray:
        """Returns the tensor in its own dtype; raises InputError where the file ends early."""
        if self.stride is None or not self.size:
            return self._read(self.start, self.shape)
        flat = self._read(self.start, (sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True)) + 1,))
        strides = [step * flat.itemsize for step in self.stride]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False))

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Returns rows `start` to `stop` of the first axis of a tensor in C order."""
        width = self.nbytes // max(self.shape[0], 1)
        return self._read(self.start + start * width, (stop - start, *self.shape[1:]))

    def _read(self, position: int, shape: tuple[int, ...]) -> np.ndarray:
        if self.check is not None:
            self.check()
        # Filled through a byte view, so that no second copy of the tensor exists; bfloat16 does not offer a buffer of its own.
        array = np.empty(shape, DTYPES[self.dtype])
        view = array.reshape(-1).view(np.uint8).data
        with self.path.open("rb") as file:
            file.seek(position)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])  # type: ignore[attr-defined]
                if not count:
                    raise InputError(f"{self.path}: ends inside tensor {self.name}; the file is truncated: {_AGAIN}")
                done += count
        return array


def dtype_name(dtype: Any) -> str:
    """Returns the safetensors name of a NumPy dtype; raises KeyError for one that has none."""
    return _NAMES[np.dtype(dtype)]


def read_header(path: epath.Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Returns (tensors in the order of their data, file metadata) after checking every offset against the file's length.

    Raises:
      InputError: not a safetensors file, truncated, or with offsets that overlap, leave gaps or contradict a shape.
    """
    size = path.stat().length
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or not 2 <= length <= _MAX_HEADER:
            what = "is empty" if not head else "is not a safetensors file"
            raise InputError(f"{path}: {stands_for(head + file.read(56)) or f'{what}; {_AGAIN}'}")
        if 8 + length > size:
            raise InputError(f"{path}: {size} bytes, but its header alone needs {8 + length}; the file is truncated: {_AGAIN}")
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        infos = [_info(name, entry, path, 8 + length) for name, entry in header.items()]
    except _Unread as e:
        raise InputError(f"{path}: {e}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise InputError(f"{path}: its safetensors header cannot be read ({e}); {_AGAIN}") from None
    infos.sort(key=lambda info: (info.start, info.nbytes))
    end = 8 + length
    for info in infos:
        if info.start != end:
            raise InputError(f"{path}: tensor {info.name} starts at byte {info.start}, expected {end}; the file is damaged: {_AGAIN}")
        end += info.nbytes
    if end != size:
        state = "truncated" if size < end else "damaged"
        raise InputError(f"{path}: {size} bytes, but its header describes {end}; the file is {state}: {_AGAIN}")
    return {info.name: info for info in infos}, metadata


class _Unread(Exception):
    """A tensor whose element type is not read."""


def _info(name: str, entry: Mapping[str, Any], path: epath.Path, base: int) -> TensorInfo:
    dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPES:
        kind = str(dtype)[:20]
        raise _Unread(f"tensor {name} has element type {kind}, which is not read; take the checkpoint that is not quantised")
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(f"tensor {name} has shape {shape} and offsets {start}, {stop}")
    info = TensorInfo(name, dtype, tuple(shape), path, base + start)
    if stop - start != info.nbytes:
        raise ValueError(f"tensor {name} of shape {shape} and type {dtype} cannot have {stop - start} bytes")
    return info


class Writer:
    """A safetensors file whose tensors may be written in any order, each once.

    The header and so every offset are known before the first tensor comes. Use as a context manager; leaving it without an error while a
    tensor is missing raises RuntimeError.
    """

    def __init__(
        self, path: epath.Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Starts the file: `tensors` gives (name, safetensors dtype, shape) in the order of the data."""
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self._at: dict[str, TensorInfo] = {}
        end = 0
        for name, dtype, shape in tensors:
            info = TensorInfo(name, dtype, tuple(shape), path, end)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + info.nbytes]}
            self._at[name] = info
            end += info.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._base = 8 + len(text)
        self._missing = set(self._at)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one tensor at its place; ValueError where dtype or shape differ from what was announced."""
        info = self._at[name]
        if array.shape != info.shape or dtype_name(array.dtype) != info.dtype:
            raise ValueError(f"{name}: {array.shape} {array.dtype}, announced {info.shape} {info.dtype}")
        self._file.seek(self._base + info.start)
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)  # type: ignore[arg-type]
        self._missing.discard(name)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._file.close()
        if kind is None and self._missing:
            raise RuntimeError(f"{len(self._missing)} tensors were announced and never written: {sorted(self._missing)[:3]}")
