"""torch `.bin` files written without torch, in the interface of `safetensors_io.Writer`: tensors in any order, each once."""

from __future__ import annotations

import contextlib
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

from omni_jax.io.pickle_machine import STORAGES
from omni_jax.io.safetensors_io import DTYPES

_KINDS = {dtype: name for name, dtype in STORAGES.items()}
_ALIGN = 64  # bytes, as torch does, so that the file can be mapped
_DATE = (1980, 1, 1, 0, 0, 0)


class TorchWriter:
    """A file as torch.save writes a state dict, in the zip format of torch 1.6 and later.

    Use as a context manager; leaving it without an error while a tensor is missing raises RuntimeError.
    """

    def __init__(
        self, path: epath.Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]], same: Mapping[str, str] | None = None
    ) -> None:
        """Starts the file.

        Args:
          tensors: (name, safetensors dtype, shape) in the order of the state dict.
          same: name -> name of the tensor whose storage it shares; of these one is written.
        """
        tensors, same = list(tensors), same or {}
        self._root = path.name.rsplit(".", 1)[0]
        roots = [name for name, _, _ in tensors if same.get(name, name) == name]
        self._keys = {name: str(number) for number, name in enumerate(roots)}
        self._shared = {name: same[name] for name, _, _ in tensors if same.get(name, name) != name}
        self._missing = set(roots)
        self._file = path.open("wb")
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED, allowZip64=True)  # type: ignore[arg-type]
        pairs = [_text(name) + _tensor(self._keys[same.get(name, name)], DTYPES[kind], shape) for name, kind, shape in tensors]
        self._add("data.pkl", b"\x80\x02" + _ORDERED + b"(" + b"".join(pairs) + b"u.")
        self._add("byteorder", b"little")
        self._add("version", b"3\n")

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one tensor in its announced type and shape; of several that share a storage the first counts."""
        if name in self._shared:
            return
        self._add(f"data/{self._keys[name]}", np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._missing.discard(name)

    def _add(self, member: str, data: Any) -> None:
        info = zipfile.ZipInfo(f"{self._root}/{member}", _DATE)
        info.file_size = len(data)
        begin = self._archive.fp.tell() + 30 + len(info.filename.encode()) + 4  # type: ignore[union-attr]
        padding = -begin % _ALIGN
        info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
        with self._archive.open(info, "w") as file:
            file.write(data)

    def __enter__(self) -> TorchWriter:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self._archive.close()
        finally:
            self._file.close()
        if kind is not None:
            with contextlib.suppress(ValueError):  # of the closed file; left open, the archive would write to it when it is collected
                self._archive.close()
        if kind is None and self._missing:
            raise RuntimeError(f"{len(self._missing)} tensors were announced and never written: {sorted(self._missing)[:3]}")


_ORDERED = b"ccollections\nOrderedDict\n)R"


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _number(value: int) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]


def _tensor(key: str, dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The opcodes that rebuild a tensor in C order from a storage of its own size."""
    strides, size = [], 1
    for n in reversed(shape):
        strides.insert(0, size)
        size *= n
    storage = b"(" + _text("storage") + f"ctorch\n{_KINDS[dtype]}\n".encode() + _text(key) + _text("cpu") + _number(size) + b"tQ"
    numbers = _number(0) + b"".join(b"(" + b"".join(map(_number, values)) + b"t" for values in (shape, strides))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + numbers + b"\x89" + _ORDERED + b"tR"
