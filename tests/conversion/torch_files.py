"""torch `.pt` files made without torch: a pickle written opcode by opcode, in a zip beside its storages."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

STORAGE = {
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(np.int64): "LongStorage",
}


class Assembler:
    """Emits protocol-2 pickle opcodes for plain values and torch tensors; `storages` collects the data files.

    Arrays that share memory share a storage, as in torch; a transposed array is a view with its own strides. `legacy` names storages as
    torch before 1.6 did.
    """

    def __init__(self, legacy: bool = False) -> None:
        self.storages: dict[str, bytes] = {}
        self._legacy = legacy
        self._keys: dict[int, str] = {}
        self._kept: list[np.ndarray] = []

    def value(self, value: Any) -> bytes:
        if isinstance(value, np.ndarray):
            root = value
            while isinstance(root.base, np.ndarray) and root.base.dtype == value.dtype:
                root = root.base
            if not root.flags.c_contiguous:
                root = value = np.ascontiguousarray(value)
            self._kept.append(root)  # so that its address stays its own
            address = root.__array_interface__["data"][0]
            key = self._keys.setdefault(address, str(len(self._keys)))
            self.storages[key] = root.tobytes()
            strides = tuple(stride // value.itemsize for stride in value.strides)
            offset = (value.__array_interface__["data"][0] - address) // value.itemsize
            return self.tensor(key, STORAGE[value.dtype], root.size, offset, value.shape, strides)
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
        return (
            b"("
            + self.value("storage")
            + f"ctorch\n{kind}\n".encode()
            + self.value(key)
            + self.value("cpu")
            + self.value(numel)
            + (b"N" if self._legacy else b"")
            + b"tQ"
        )

    def tensor(self, key: str, kind: str, numel: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
        arguments = b"(" + self.storage(key, kind, numel) + b"".join(self.value(v) for v in (offset, size, stride)) + b"\x89"
        return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"ccollections\nOrderedDict\n)RtR"


def write_torch_file(path: Path, value: Any) -> None:
    """Writes what torch.save(value, path) writes, for dicts, lists, plain values and NumPy arrays."""
    assembler = Assembler()
    write_program(path, b"\x80\x02" + assembler.value(value) + b".", assembler.storages)


def write_legacy_file(path: Path, value: Any) -> None:
    """Writes what torch.save(value, path, _use_new_zipfile_serialization=False) writes: the format before torch 1.6."""
    assembler = Assembler(legacy=True)
    program = assembler.value(value)
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = [pickle.dumps(part, protocol=2) for part in (0x1950A86A20F9469CFC6C, 1001, machine)]
    sizes = {key: dtype.itemsize for key, dtype in _dtypes(value, Assembler(legacy=True)).items()}
    with path.open("wb") as file:
        file.write(b"".join(head) + b"\x80\x02" + program + b"." + pickle.dumps(list(assembler.storages), protocol=2))
        for key, data in assembler.storages.items():
            file.write(struct.pack("<q", len(data) // sizes[key]) + data)


def _dtypes(value: Any, assembler: Assembler) -> dict[str, np.dtype]:
    """Returns the type of each storage: every array adds at most one, in order."""
    found: dict[str, Any] = {}
    arrays = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
    for item in arrays:
        if isinstance(item, np.ndarray):
            before = set(assembler.storages)
            assembler.value(item)
            found |= dict.fromkeys(set(assembler.storages) - before, item.dtype)
        elif isinstance(item, dict | list | tuple):
            found |= _dtypes(item, assembler)
    return found


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
