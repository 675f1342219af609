"""torch `.pt` and `.bin` files read without torch and without executing anything.

A torch file is a zip archive whose `data.pkl` is a pickle, a small program: the stock unpickler imports and calls whatever the file
names. Here `pickletools` only splits the program into opcodes, and a small stack machine interprets those that build plain values. The few
constructors that describe tensors are recognised by name and answered with NumPy arrays; any other name, and any opcode that would create
or alter an object, is refused, named in the error.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import math
import pickletools
import reprlib
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from omni_jax.types import InputError

STORAGES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}

_MAX_PICKLE = 256 * 1024 * 1024  # bytes of data.pkl: it holds names and shapes, not weights
_RESAVE = "open it with torch and write it again with torch.save(obj, path)"


class Refused(Exception):
    """The pickle asks for something other than plain values and tensors; the message says what."""


@dataclasses.dataclass(frozen=True)
class _Name:
    """A global that the pickle names. It is never imported; `_CALLS` says what a call of it means."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(frozen=True)
class _Storage:
    """One flat block of values, read when a tensor first needs it."""

    read: Callable[[], np.ndarray]
    numel: int


def read_torch_file(path: epath.PathLike) -> Any:
    """Returns what a torch file holds: dicts, lists and plain values, with a read-only NumPy array for each tensor.

    Tensors that share a storage in the file share memory here; strides and offsets are kept and checked against the storage.

    Raises:
      InputError: one line: not a torch file, the format before torch 1.6, TorchScript, damaged, or a pickle that asks to run code.
    """
    path = epath.Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, a torch file (.pt) is wanted")
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(0)
        if not head:
            raise InputError(f"{path}: is empty; copy or download it again")
        if head != b"PK\x03\x04":
            if head[:1] == b"\x80":
                raise InputError(f"{path}: written in the torch format before 1.6, which is not read here; {_RESAVE}")
            raise InputError(f"{path}: not a torch file; name a file written by torch.save")
        try:
            with zipfile.ZipFile(file) as archive:  # type: ignore[arg-type]
                return _Archive(archive).load()
        except Refused as e:
            raise InputError(f"{path}: {e}") from None
        except (zipfile.BadZipFile, EOFError, NotImplementedError, OSError) as e:
            raise InputError(f"{path}: damaged or truncated torch file ({e}); copy or download it again") from None


def read_pickle(path: epath.PathLike) -> Any:
    """Returns the dicts, lists and plain values of a bare pickle file, without executing anything.

    Raises:
      InputError: one line: not a pickle, damaged, or one that asks to run code.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder, a pickle file is wanted' if path.is_dir() else 'no such file'}")
    try:
        data = path.read_bytes()
        if len(data) > _MAX_PICKLE:
            raise Refused(f"has {len(data)} bytes, at most {_MAX_PICKLE} expected")
        return interpret(data, _no_storage)
    except Refused as e:
        raise InputError(f"{path}: {e}") from None
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror or e}") from e


def _no_storage(pid: Any) -> Any:
    raise Refused(f"refers to {_short(pid)} outside the file")


class _Archive:
    """The zip side: finds the pickle and the storages."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
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
        self._storages: dict[str, _Storage] = {}
        self._arrays: dict[str, np.ndarray] = {}

    def load(self) -> Any:
        return interpret(self._bytes("data.pkl", _MAX_PICKLE), self._storage)

    def _bytes(self, member: str, limit: int) -> bytes:
        try:
            info = self._archive.getinfo(self._root + member)
        except KeyError:
            raise Refused(f"member {member} is missing; the file is damaged, copy or download it again") from None
        if info.compress_type != zipfile.ZIP_STORED:
            raise Refused(f"member {member} is compressed, which torch.save never does; {_RESAVE}")
        if info.file_size > limit:
            raise Refused(f"member {member} has {info.file_size} bytes, at most {limit} expected")
        return self._archive.read(info)

    def _storage(self, pid: Any) -> _Storage:
        """Answers a persistent id ("storage", type, key, location, numel)."""
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], _Name)):
            raise Refused(f"refers to something that is not a storage: {_short(pid)}")
        kind, key, numel = pid[1], pid[2], pid[4]
        dtype = STORAGES.get(kind.name) if kind.module in ("torch", "torch.storage") else None
        if dtype is None:
            raise Refused(f"storage type {kind} is not supported")
        if not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise Refused(f"storage {_short(key)} has no usable name or length")

        def read() -> np.ndarray:
            if key not in self._arrays:
                data = self._bytes(f"data/{key}", numel * dtype.itemsize)
                self._arrays[key] = np.frombuffer(data, np.uint8)
            # Checked on every use: a second reference may claim another length, and the views below trust `numel`.
            if self._arrays[key].size != numel * dtype.itemsize:
                raise Refused(f"storage {key} has {self._arrays[key].size} bytes, {numel * dtype.itemsize} expected; the file is damaged")
            return self._arrays[key].view(dtype)

        return _Storage(read, numel)


# ---------------------------------------------------------------------------------------------------- what a call of a name means


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray:
    """`torch._utils._rebuild_tensor_v2`: a strided view of a storage."""
    if not isinstance(storage, _Storage):
        raise Refused("a tensor without a storage")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
        raise Refused(f"a tensor of size {_short(size)}, stride {_short(stride)}, offset {_short(offset)}")
    empty = 0 in size
    last = offset if empty else offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    if last > storage.numel or math.prod(size) > max(storage.numel, 1):
        raise Refused(f"a tensor of size {_short(size)}, stride {_short(stride)}, offset {offset} is past its storage of {storage.numel}")
    flat = storage.read()
    if empty:
        return np.empty(size, flat.dtype)
    width = flat.dtype.itemsize
    return np.lib.stride_tricks.as_strided(flat[offset:], tuple(size), tuple(step * width for step in stride), writeable=False)


def _parameter(data: Any, *_: Any) -> Any:
    """`torch._utils._rebuild_parameter`: the tensor itself."""
    return data


def _ordered(pairs: Any = ()) -> dict[Any, Any]:
    return collections.OrderedDict((key, value) for key, value in pairs)


def _size(values: Any = ()) -> tuple[Any, ...]:
    return tuple(values)


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "collections.OrderedDict": _ordered,
    "torch.Size": _size,
}


def _global(module: Any, name: Any) -> _Name:
    """Returns the inert name, or refuses it: nothing outside the table is worth naming in a file of weights."""
    found = _Name(str(module), str(name))
    storage = found.module in ("torch", "torch.storage") and found.name in STORAGES
    if not storage and str(found) not in _CALLS:
        raise Refused(f"its pickle asks for {_short(str(found))}, which no file of weights needs; refused, nothing was run")
    return found


# ------------------------------------------------------------------------------------------------------------- the stack machine

_MARK = object()

_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_ARGUMENTS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 "
    "BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 STRING BINSTRING SHORT_BINSTRING".split()
)
_PUTS = frozenset("PUT BINPUT LONG_BINPUT".split())
_GETS = frozenset("GET BINGET LONG_BINGET".split())


def interpret(program: bytes, storage: Callable[[Any], _Storage]) -> Any:
    """Returns the value a pickle describes; `storage` answers its persistent ids.

    Raises:
      Refused: an unknown name, an opcode that would create or alter an object, or a malformed program.
    """
    machine = _Machine(storage)
    try:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(program)):
            if opcode.name == "STOP":
                break
            machine.step(opcode.name, argument)
        (value,) = machine.stack
    except Refused:
        raise
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, MemoryError) as e:
        raise Refused(f"its pickle is malformed ({type(e).__name__}: {_short(e)}); copy or download the file again") from None
    _refuse_leftovers(value)
    return value


def _refuse_leftovers(value: Any) -> None:
    """Raises Refused where a value holds what only the machine knows: its mark, the name of a constructor, a storage without a tensor."""
    todo, seen = [value], set()
    while todo:
        item = todo.pop()
        if item is _MARK or isinstance(item, _Name | _Storage):
            raise Refused("its pickle gives no value, but a part of one; copy or download the file again")
        if isinstance(item, dict | list | tuple | set | frozenset) and id(item) not in seen:
            seen.add(id(item))
            todo += [*item.keys(), *item.values()] if isinstance(item, dict) else item


class _Machine:
    """Stack and memo of the pickle program; values are built from literals and `_CALLS` only."""

    def __init__(self, storage: Callable[[Any], _Storage]) -> None:
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._storage = storage

    def step(self, op: str, argument: Any) -> None:
        stack = self.stack
        if op in ("PROTO", "FRAME"):
            return
        if op in _CONSTANTS:
            stack.append(_CONSTANTS[op]())
        elif op in _ARGUMENTS:
            stack.append(argument)
        elif op in _PUTS:
            self._memo[int(argument)] = stack[-1]
        elif op == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif op in _GETS:
            stack.append(self._memo[int(argument)])
        elif op == "MARK":
            stack.append(_MARK)
        elif op == "POP":
            stack.pop()
        elif op == "DUP":
            stack.append(stack[-1])
        elif op == "GLOBAL":
            stack.append(_global(*argument.split(" ", 1)))
        elif op == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(_global(module, name))
        elif op == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif op == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._call(function, arguments))
        elif op == "BUILD":
            self._build(stack.pop())
        else:
            self._collect(op)

    def _collect(self, op: str) -> None:
        """Opcodes that gather what stands above the last mark, or the top values."""
        stack = self.stack
        if op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(op[-1])
            if len(stack) < count:
                raise IndexError(op)
            stack[-count:] = [tuple(stack[-count:])]
        elif op == "TUPLE":
            stack.append(tuple(self._above_mark()))
        elif op == "LIST":
            stack.append(self._above_mark())
        elif op == "DICT":
            stack.append(_pairs(self._above_mark()))
        elif op == "FROZENSET":
            stack.append(frozenset(self._above_mark()))
        elif op == "POP_MARK":
            self._above_mark()
        elif op == "APPEND":
            value = stack.pop()
            self._top(list).append(value)
        elif op == "APPENDS":
            values = self._above_mark()
            self._top(list).extend(values)
        elif op == "ADDITEMS":
            values = self._above_mark()
            self._top(set).update(values)
        elif op == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self._top(dict)[key] = value
        elif op == "SETITEMS":
            values = self._above_mark()
            self._top(dict).update(_pairs(values))
        else:
            raise Refused(f"its pickle uses opcode {op}, which creates objects; refused, nothing was run")

    def _above_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise IndexError("no mark on the stack")
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def _top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise TypeError(f"{type(self.stack[-1]).__name__} where a {kind.__name__} should be")
        return self.stack[-1]

    @staticmethod
    def _call(function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Name) or not isinstance(arguments, tuple) or str(function) not in _CALLS:
            raise Refused(f"its pickle calls {_short(function)}; refused, nothing was run")
        return _CALLS[str(function)](*arguments)

    def _build(self, state: Any) -> None:
        # torch.save of a state_dict sets `_metadata` on its OrderedDict; nothing else has a reason to set state.
        if not (isinstance(self.stack[-1], dict) and isinstance(state, dict)):
            raise Refused(f"its pickle sets the state of a {type(self.stack[-1]).__name__}; refused, nothing was run")


def _pairs(values: list[Any]) -> dict[Any, Any]:
    return dict(zip(values[::2], values[1::2], strict=True))


def _short(value: Any) -> str:
    # reprlib, because a few hundred bytes of pickle can describe a value whose full repr never ends.
    text = value if isinstance(value, str) else str(value) if isinstance(value, _Name | Exception) else reprlib.repr(value)
    return json.dumps(text[:80], ensure_ascii=True)[1:-1]
