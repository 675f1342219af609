"""The few opcodes of a torch file's pickle that build plain values, interpreted; everything else is refused.

A pickle is a program: the stock unpickler imports and calls whatever it names. Here `pickletools` only splits the program into opcodes, and
a small stack machine interprets those that build plain values. The few constructors that describe tensors are recognised by name and
answered by the caller; any other name, and any opcode that would create or alter an object, is refused, named in the error.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import math
import pickletools
import reprlib
from collections.abc import Callable
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from etils import epath

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


class Refused(Exception):
    """The pickle asks for something other than plain values and tensors; the message says what."""


@dataclasses.dataclass(frozen=True)
class Name:
    """A global that the pickle names. It is never imported; `_CALLS` says what a call of it means."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(frozen=True)
class Storage:
    """One flat block of values: `numel` of them from byte `start` of the file; `crc` of its bytes where the file records it."""

    key: str
    path: epath.Path
    dtype: np.dtype
    numel: int
    start: int
    crc: int | None = None

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


Tensors = Callable[[Storage, int, tuple[int, ...], tuple[int, ...]], Any]
"""What stands for a tensor of this storage, offset, size and stride (both in values), which lie inside the storage."""


# ---------------------------------------------------------------------------------------------------- what a call of a name means


def _placed(storage: Any, offset: Any, size: Any, stride: Any) -> tuple[Storage, int, tuple[int, ...], tuple[int, ...]]:
    """Returns the arguments of `torch._utils._rebuild_tensor` after checking them against the storage."""
    if not isinstance(storage, Storage):
        raise Refused("a tensor without a storage")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
        raise Refused(f"a tensor of size {short(size)}, stride {short(stride)}, offset {short(offset)}")
    last = offset if 0 in size else offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    if last <= storage.numel and math.prod(size) > max(storage.numel, 1):
        raise Refused(f"a tensor of size {short(size)} repeats the {storage.numel} values of its storage; write it with .contiguous()")
    if last > storage.numel:
        raise Refused(f"a tensor of size {short(size)}, stride {short(stride)}, offset {offset} is past its storage of {storage.numel}")
    return storage, offset, tuple(size), tuple(stride)


def _size(values: Any = ()) -> tuple[Any, ...]:
    return tuple(values)


_TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
"""Constructors of a strided view of a storage; what follows the stride is of gradients and hooks."""

_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_parameter": lambda data, *_: data,  # the tensor itself
    "collections.OrderedDict": lambda pairs=(): collections.OrderedDict((key, value) for key, value in pairs),
    "torch.Size": _size,
}


def _global(module: Any, name: Any) -> Name:
    """Returns the inert name, or refuses it: nothing outside the table is worth naming in a file of weights."""
    found = Name(str(module), str(name))
    storage = found.module in ("torch", "torch.storage") and found.name in STORAGES
    if not storage and str(found) not in (*_CALLS, *_TENSORS):
        raise Refused(f"its pickle asks for {short(str(found))}, which no file of weights needs; refused, nothing was run")
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


def interpret(program: bytes | BinaryIO, storage: Callable[[Any], Storage], tensor: Tensors) -> Any:
    """Returns the value a pickle describes, and of an open file leaves the position behind it.

    `storage` answers its persistent ids, `tensor` makes what stands for a tensor.

    Raises:
      Refused: an unknown name, an opcode that would create or alter an object, or a malformed program.
    """
    machine = _Machine(storage, tensor)
    try:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(program) if isinstance(program, bytes) else program):
            if opcode.name == "STOP":
                break
            machine.step(opcode.name, argument)
        (value,) = machine.stack
    except Refused:
        raise
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, MemoryError) as e:
        raise Refused(f"its pickle is malformed ({type(e).__name__}: {short(e)}); copy or download the file again") from None
    _refuse_leftovers(value)
    return value


def _refuse_leftovers(value: Any) -> None:
    """Raises Refused where a value holds what only the machine knows: its mark, the name of a constructor, a storage without a tensor."""
    todo, seen = [value], set()
    while todo:
        item = todo.pop()
        if item is _MARK or isinstance(item, Name | Storage):
            raise Refused("its pickle gives no value, but a part of one; copy or download the file again")
        if isinstance(item, dict | list | tuple | set | frozenset) and id(item) not in seen:
            seen.add(id(item))
            todo += [*item.keys(), *item.values()] if isinstance(item, dict) else item


class _Machine:
    """Stack and memo of the pickle program; values are built from literals and `_CALLS` only."""

    def __init__(self, storage: Callable[[Any], Storage], tensor: Tensors) -> None:
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._storage = storage
        self._tensor = tensor

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
        """Opcodes that gather what is above the last mark, or the top values."""
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

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Name) or not isinstance(arguments, tuple) or str(function) not in (*_CALLS, *_TENSORS):
            raise Refused(f"its pickle calls {short(function)}; refused, nothing was run")
        if str(function) in _TENSORS:
            if len(arguments) > 6 and arguments[6]:  # of a view that negates or conjugates what is stored
                raise Refused(f"a tensor that is not as stored ({short(arguments[6])}); write it with .resolve_neg().resolve_conj()")
            return self._tensor(*_placed(*arguments[:4]))
        return _CALLS[str(function)](*arguments)

    def _build(self, state: Any) -> None:
        # torch.save of a state_dict sets `_metadata` on its OrderedDict; nothing else has a reason to set state.
        if not (isinstance(self.stack[-1], dict) and isinstance(state, dict)):
            raise Refused(f"its pickle sets the state of a {type(self.stack[-1]).__name__}; refused, nothing was run")


def _pairs(values: list[Any]) -> dict[Any, Any]:
    return dict(zip(values[::2], values[1::2], strict=True))


def short(value: Any) -> str:
    # reprlib, because a few hundred bytes of pickle can describe a value whose full repr never ends.
    text = value if isinstance(value, str) else str(value) if isinstance(value, Name | Exception) else reprlib.repr(value)
    return json.dumps(text[:80], ensure_ascii=True)[1:-1]
