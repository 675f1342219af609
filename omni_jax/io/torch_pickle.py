"""torch `.pt` and `.bin` files read without torch and without executing anything.

A torch file is a zip archive of a pickle (`data.pkl`) and of storages, flat blocks of values; before torch 1.6 pickles and storages
follow one another. `pickle_machine` interprets the pickle. Tensors are read whole (`read_torch_file`), or placed and read when they
are wanted (`open_torch_weights`), in memory bounded by one tensor.
"""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from omni_jax.io import safetensors_io
from omni_jax.io.messages import some, stands_for
from omni_jax.io.pickle_machine import STORAGES, Name, Refused, Storage, Tensors, interpret, short
from omni_jax.io.safetensors_io import TensorInfo
from omni_jax.types import InputError

_MAX_PICKLE = 256 * 1024 * 1024  # bytes of a pickle: it holds names and shapes, not weights
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of files before torch 1.6
_STATE = ("state_dict", "model", "module", "model_state_dict")
"""What training programs call the weights among the other things of their file."""
_RESAVE = "open it with torch and write it again with torch.save(obj, path)"
_AGAIN = "copy or download it again"
_BLOCK = 4 * 2**20


def read_torch_file(path: epath.PathLike) -> Any:
    """Returns what a torch file holds: dicts, lists and plain values, with a read-only NumPy array for each tensor.

    Tensors that share a storage in the file share memory here; strides and offsets are kept and checked against the storage.

    Raises:
      InputError: one line: not a torch file, TorchScript, damaged, or a pickle that asks to run code.
    """
    whole: dict[tuple[int, int], np.ndarray] = {}

    def array(storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> np.ndarray:
        if 0 in size:
            return np.empty(size, storage.dtype)
        place = storage.start, storage.nbytes  # both: a part of a storage may begin where the whole does
        if place not in whole:
            _check(storage)
            whole[place] = TensorInfo(storage.key, "U8", (storage.nbytes,), storage.path, storage.start).read()
        flat, width = whole[place].view(storage.dtype), storage.dtype.itemsize
        return np.lib.stride_tricks.as_strided(flat[offset:], size, tuple(step * width for step in stride), writeable=False)

    return _load(epath.Path(path), array)


def open_torch_weights(path: epath.PathLike) -> dict[str, TensorInfo]:
    """Returns name -> place of every tensor of a file that holds a dict of tensors (a state dict), in its order; no values are read.

    Raises:
      InputError: as `read_torch_file`, or a file that holds something else.
    """
    path = epath.Path(path)
    checked: set[int] = set()

    def place(storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> TensorInfo:
        start = storage.start + offset * storage.dtype.itemsize

        def check() -> None:
            if storage.start not in checked:
                _check(storage)
                checked.add(storage.start)

        kind = safetensors_io.dtype_name(storage.dtype)
        return TensorInfo(storage.key, kind, size, path, start, None if _dense(size, stride) else stride, check)

    content = _load(path, place)
    tensors = content if isinstance(content, dict) else {}
    if not _are_tensors(tensors):
        # A training program's own file: its weights are taken where no other dict of tensors could be meant (averaged ones, say).
        inner = [name for name, value in tensors.items() if _are_tensors(value)]
        if len(inner) != 1 or inner[0] not in _STATE:
            found = f"it holds {len(inner)} ({some(inner)}): save one of them alone" if len(inner) > 1 else "save a state_dict()"
            raise InputError(f"{path}: does not hold a dict of tensors; {found} with torch.save")
        tensors = tensors[inner[0]]
    return {name: dataclasses.replace(info, name=name) for name, info in tensors.items()}


def _are_tensors(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(name, str) and isinstance(info, TensorInfo) for name, info in value.items())
    )


def read_pickle(path: epath.PathLike) -> Any:
    """Returns the dicts, lists and plain values of a bare pickle file, without executing anything.

    Raises:
      InputError: one line: not a pickle, damaged, or one that asks to run code.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder, expected a pickle file' if path.is_dir() else 'no such file'}")
    try:
        data = path.read_bytes()
        if len(data) > _MAX_PICKLE:
            raise Refused(f"has {len(data)} bytes, at most {_MAX_PICKLE} expected")
        return interpret(data, _no_storage, _no_tensor)
    except Refused as e:
        raise InputError(f"{path}: {e}") from None
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror or e}") from e


def _load(path: epath.Path, tensor: Tensors) -> Any:
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a torch file (.pt)")
    with path.open("rb") as file:
        head = file.read(64)
        file.seek(0)
        if not head:
            raise InputError(f"{path}: is empty; {_AGAIN}")
        if head[:4] != b"PK\x03\x04" and head[:1] != b"\x80":
            safe = b'{"' in head and int.from_bytes(head[:8], "little") < 1 << 32
            what = "not a torch file; name a file written by torch.save"
            what = "holds safetensors by its content; name it so (model.safetensors)" if safe else what
            raise InputError(f"{path}: {stands_for(head) or what}")
        try:
            if head[:1] == b"\x80":
                return _load_legacy(path, file, tensor)  # type: ignore[arg-type]
            with zipfile.ZipFile(file) as archive:  # type: ignore[arg-type]
                return _Archive(path, archive).load(tensor)
        except Refused as e:
            raise InputError(f"{path}: {e}") from None
        except (zipfile.BadZipFile, EOFError, NotImplementedError, OSError) as e:
            raise InputError(f"{path}: damaged or truncated torch file ({e}); {_AGAIN}") from None


def _check(storage: Storage) -> None:
    """Compares the bytes of a storage with the sum that its file records, a few MiB at a time."""
    if storage.crc is None:
        return
    found, left = 0, storage.nbytes
    with storage.path.open("rb") as file:
        file.seek(storage.start)
        while left and (block := file.read(min(left, _BLOCK))):
            found, left = zlib.crc32(block, found), left - len(block)
    if found != storage.crc:
        why = "if torch wrote it without sums (set_crc32_options), write it again; else copy or download it again" if not left else _AGAIN
        raise InputError(f"{storage.path}: damaged or truncated torch file (Bad CRC-32 of storage {storage.key}); {why}")


def _dense(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether a tensor is stored in NumPy's C order."""
    step = 1
    for n, jump in zip(reversed(size), reversed(stride), strict=True):
        if n != 1 and jump != step:
            return 0 in size
        step *= n
    return True


def _no_storage(pid: Any) -> Any:
    raise Refused(f"refers to {short(pid)} outside the file")


def _no_tensor(*_: Any) -> Any:
    raise Refused("holds a tensor, expected plain values")


def _named(pid: Any) -> tuple[np.dtype, str, int]:
    """Returns (type, key, number of values) of a persistent id ("storage", type, key, location, numel, ...)."""
    if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], Name)):
        raise Refused(f"refers to something that is not a storage: {short(pid)}")
    kind, key, numel = pid[1], pid[2], pid[4]
    dtype = STORAGES.get(kind.name) if kind.module in ("torch", "torch.storage") else None
    if dtype is None:
        raise Refused(f"storage type {kind} is not supported")
    if not isinstance(key, str) or type(numel) is not int or numel < 0:
        raise Refused(f"storage {short(key)} has no usable name or length")
    return dtype, key, numel


# ------------------------------------------------------------------------------------------------------------------ zip archives


class _Archive:
    """The zip side: finds the pickle and the storages."""

    def __init__(self, path: epath.Path, archive: zipfile.ZipFile) -> None:
        self._path = path
        self._archive = archive
        names = archive.namelist()
        pickles = [name for name in names if name.split("/")[1:] == ["data.pkl"] or name == "data.pkl"]
        if len(pickles) != 1:
            raise Refused(f"holds {len(pickles)} data.pkl; not a file written by torch.save")
        self._root = pickles[0][: -len("data.pkl")]
        if f"{self._root}constants.pkl" in names:
            raise Refused(f"is a TorchScript program, not a file of weights; {_RESAVE} of its state_dict()")
        if f"{self._root}byteorder" in names and self._bytes("byteorder", 16).strip() != b"little":
            raise Refused(f"was written big-endian, which is not read here; on a little-endian machine {_RESAVE}")

    def load(self, tensor: Tensors) -> Any:
        return interpret(self._bytes("data.pkl", _MAX_PICKLE), self._storage, tensor)

    def _member(self, member: str, limit: int) -> zipfile.ZipInfo:
        try:
            info = self._archive.getinfo(self._root + member)
        except KeyError:
            what = f"storage {member.removeprefix('data/')}: {member}" if member.startswith("data/") else f"member {member}"
            raise Refused(f"{what} is missing; the file is damaged, {_AGAIN}") from None
        if info.flag_bits & 1:
            raise Refused(f"member {member} is encrypted, which torch.save never does; {_AGAIN}")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise Refused(f"member {member} is compressed, which torch.save never does; {_RESAVE}")
        if info.file_size > limit:
            raise Refused(f"member {member} has {info.file_size} bytes, at most {limit} expected")
        return info

    def _bytes(self, member: str, limit: int) -> bytes:
        return self._archive.read(self._member(member, limit))

    def _storage(self, pid: Any) -> Storage:
        dtype, key, numel = _named(pid)
        info = self._member(f"data/{key}", max(numel * dtype.itemsize, 2**62))
        if info.file_size != numel * dtype.itemsize:
            raise Refused(f"storage {key} has {info.file_size} bytes, {numel * dtype.itemsize} expected; the file is damaged")
        file = self._archive.fp
        assert file is not None
        file.seek(info.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise Refused(f"member data/{key} is not where the file says; {_AGAIN}")
        # The header's own name and padding: torch aligns the values, which its directory does not say.
        start = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return Storage(key, self._path, dtype, numel, start, info.CRC)


# ------------------------------------------------------------------------------------------------------ files before torch 1.6


class _Bounded:
    """As much of an open file as pickles may have, for `pickletools`, which reads what a length in the file says."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = _MAX_PICKLE

    def read(self, count: int) -> bytes:
        return self._counted(self._file.read(min(count, self._left + 1)))

    def readline(self) -> bytes:
        return self._counted(self._file.readline(self._left + 1))

    def tell(self) -> int:
        return self._file.tell()

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise Refused(f"its pickles have more than {_MAX_PICKLE} bytes")
        return data


def _load_legacy(path: epath.Path, file: BinaryIO, tensor: Tensors) -> Any:
    """Magic number, version, machine, value and storage keys as five pickles, then each storage with its length before it.

    The place of a storage follows from the keys, which come after the value: so that is interpreted twice.
    """
    pickles: Any = _Bounded(file)
    if interpret(pickles, _no_storage, _no_tensor) != _MAGIC or interpret(pickles, _no_storage, _no_tensor) != _PROTOCOL:
        raise Refused("not a torch file; name a file written by torch.save")
    machine = interpret(pickles, _no_storage, _no_tensor)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise Refused(f"was written big-endian, which is not read here; on a little-endian machine {_RESAVE}")
    begin, roots = file.tell(), {}

    def found(pid: Any) -> Storage:
        dtype, key, numel = _named(pid)
        if roots.setdefault(key, (dtype, numel)) != (dtype, numel):
            raise Refused(f"storage {key} has two types or lengths; the file is damaged")
        return _view(Storage(key, path, dtype, numel, -1), pid)

    interpret(pickles, found, lambda *_: None)
    keys = interpret(pickles, _no_storage, _no_tensor)
    size, places = path.stat().length, {}
    for key in keys if isinstance(keys, list) else ():
        dtype, numel = roots.get(key, (np.dtype("u1"), -1)) if isinstance(key, str) else (np.dtype("u1"), -1)
        if numel < 0 or int.from_bytes(file.read(8), "little", signed=True) != numel:
            raise Refused(f"storage {short(key)} is not as its pickle says; the file is damaged, {_AGAIN}")
        places[key] = Storage(key, path, dtype, numel, file.tell())
        if file.tell() + places[key].nbytes > size:
            raise Refused(f"ends inside storage {key}; the file is truncated, {_AGAIN}")
        file.seek(places[key].nbytes, 1)
    if absent := roots.keys() - places.keys():
        raise Refused(f"storage {min(absent)} is missing; the file is damaged, {_AGAIN}")
    file.seek(begin)
    again: Callable[[Any], Storage] = lambda pid: _view(places[_named(pid)[1]], pid)  # noqa: E731
    return interpret(pickles, again, tensor)


def _view(root: Storage, pid: Any) -> Storage:
    """A storage that is a part of another, which the sixth part of a persistent id says: (key, first value, number of values)."""
    part = pid[5] if len(pid) > 5 else None
    if part is None:
        return root
    if not (isinstance(part, tuple) and len(part) == 3 and all(type(n) is int and n >= 0 for n in part[1:])) or sum(part[1:]) > root.numel:
        raise Refused(f"storage {root.key} has a part {short(part)} outside it")
    return dataclasses.replace(root, numel=part[2], start=root.start + part[1] * root.dtype.itemsize)
