"""torch `.pt` files made without torch: a pickle written opcode by opcode, in a zip beside its storages."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

STORAGE = {np.dtype(np.float32): "FloatStorage", np.dtype(np.float16): "HalfStorage", np.dtype(np.int64): "LongStorage"}


class Assembler:
    """Emits protocol-2 pickle opcodes for plain values and torch tensors; `storages` collects the data files."""

    def __init__(self) -> None:
        self.storages: dict[str, bytes] = {}

    def value(self, value: Any) -> bytes:
        if isinstance(value, np.ndarray):
            key = str(len(self.storages))
            value = np.asarray(value, order="C")
            self.storages[key] = value.tobytes()
            strides = tuple(stride // value.itemsize for stride in value.strides)
            return self.tensor(key, STORAGE[value.dtype], value.size, 0, value.shape, strides)
        if isinstance(value, dict):
            return b"}(" + b"".join(self.value(k) + self.value(v) for k, v in value.items()) + b"u"
        if isinstance(value, tuple):
            return b"(" + b"".join(self.value(v) for v in value) + b"t"
        if isinstance(value, list):
            return b"](" + b"".join(self.value(v) for v in value) + b"e"
        if isinstance(value, str):
            text = value.encode()
            return b"X" + struct.pack("<I", len(text)) + text
        return pickle.dumps(value, protocol=2)[2:-1]

    def storage(self, key: str, kind: str, numel: int) -> bytes:
        return b"(" + self.value("storage") + f"ctorch\n{kind}\n".encode() + self.value(key) + self.value("cpu") + self.value(numel) + b"tQ"

    def tensor(self, key: str, kind: str, numel: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
        arguments = b"(" + self.storage(key, kind, numel) + b"".join(self.value(v) for v in (offset, size, stride)) + b"\x89"
        return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"ccollections\nOrderedDict\n)RtR"


def write_torch_file(path: Path, value: Any) -> None:
    """Writes what torch.save(value, path) writes, for dicts, lists, plain values and NumPy arrays."""
    assembler = Assembler()
    write_program(path, b"\x80\x02" + assembler.value(value) + b".", assembler.storages)


def write_program(
    path: Path, program: bytes, storages: dict[str, bytes] | None = None, root: str = "archive", extra: dict[str, bytes] | None = None
) -> None:
    """Writes a torch zip around any pickle program."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{root}/data.pkl", program)
        archive.writestr(f"{root}/byteorder", b"little")
        for key, data in (storages or {}).items():
            archive.writestr(f"{root}/data/{key}", data)
        for name, data in (extra or {}).items():
            archive.writestr(f"{root}/{name}", data)
