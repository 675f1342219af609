"""Weights on disk as Orbax checkpoints, in parts small enough to be written and read in bounded memory.

    weights/index.json       {"parts": N, "arrays": {name: {"part": n, "dtype": "bfloat16", "shape": [..]}}}
    weights/part-00000/      an Orbax PyTree checkpoint of a flat dict name -> array
    weights/part-00001/      ...

One Orbax save of a whole model needs twice its size in memory; one save per part needs about twice the part. Layer stacks are stored
per layer.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from omni_jax.types import InputError

PART_BYTES = 256 * 2**20
CHUNK_BYTES = 32 * 2**20  # unit of reading: a sharded restore reads the chunks that touch its shard
_INDEX = "index.json"
_CONVERT = "convert the checkpoint again"


@dataclasses.dataclass(frozen=True)
class Stored:
    """One array: its part, dtype and shape."""

    part: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class StoreWriter:
    """Writes arrays one after another; a part is saved whenever the next array would make it larger than `part_bytes`."""

    def __init__(self, folder: epath.Path, part_bytes: int = PART_BYTES) -> None:
        self._folder = folder
        self._part_bytes = part_bytes
        self._pending: dict[str, np.ndarray] = {}
        self._index: dict[str, dict[str, Any]] = {}
        self._parts = 0
        self._checkpointer = _checkpointer()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, array: np.ndarray) -> None:
        """Takes one array; it may be written now or with a later one."""
        if name in self._index:
            raise ValueError(f"{name} is added twice")
        if self._pending and sum(a.nbytes for a in self._pending.values()) + array.nbytes > self._part_bytes:
            self._flush()
        self._index[name] = {"part": self._parts, "dtype": array.dtype.name, "shape": list(array.shape)}
        self._pending[name] = array

    def _flush(self) -> None:
        arguments = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in self._pending}
        self._checkpointer.save(_part(self._folder, self._parts), ocp.args.PyTreeSave(self._pending, save_args=arguments))
        self._pending.clear()
        self._parts += 1

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            if self._pending:
                self._flush()
            (self._folder / _INDEX).write_text(json.dumps({"parts": self._parts, "arrays": self._index}, indent=1))
        self._checkpointer.close()


class Store:
    """Arrays written by `StoreWriter`, read by name."""

    def __init__(self, folder: epath.Path) -> None:
        """Opens a store; InputError where the folder holds none."""
        self._folder = folder
        self._checkpointer = _checkpointer()
        try:
            arrays = json.loads((folder / _INDEX).read_text())["arrays"]
            self.arrays = {name: Stored(at["part"], jnp.dtype(at["dtype"]), tuple(at["shape"])) for name, at in arrays.items()}
        except FileNotFoundError:
            raise InputError(f"{folder / _INDEX}: no such file; the folder is not a finished conversion: {_CONVERT}") from None
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"{folder / _INDEX}: cannot be read ({e}); {_CONVERT}") from None

    def batches(self, names: Iterable[str], limit: int = PART_BYTES) -> Iterator[list[str]]:
        """Yields runs of `names`, in order, of at most `limit` bytes each (or one array): what to ask `read` for at a time.

        Raises:
          InputError: a name that is not stored.
        """
        batch: list[str] = []
        size = 0
        for name in names:
            if name not in self.arrays:
                raise InputError(f"{self._folder}: array {name} is missing; {_CONVERT}")
            if batch and size + self.arrays[name].nbytes > limit:
                yield batch
                batch, size = [], 0
            batch.append(name)
            size += self.arrays[name].nbytes
        if batch:
            yield batch

    def read(
        self, names: Iterable[str], shardings: Mapping[str, jax.sharding.Sharding] | None = None, dtype: Any = None
    ) -> dict[str, np.ndarray | jax.Array]:
        """Returns arrays by name: on the host as stored, or placed where `shardings` gives a sharding for the name.

        `dtype` is the type of placed arrays; None keeps the stored one.

        Raises:
          InputError: a part is damaged.
        """
        groups: dict[int, list[str]] = {}
        for name in names:
            groups.setdefault(self.arrays[name].part, []).append(name)
        found: dict[str, np.ndarray | jax.Array] = {}
        for part, members in groups.items():
            found |= self._read_part(part, members, shardings or {}, dtype)
        return found

    def _read_part(
        self, part: int, names: list[str], shardings: Mapping[str, jax.sharding.Sharding], dtype: Any
    ) -> dict[str, np.ndarray | jax.Array]:
        arguments = {
            name: ocp.ArrayRestoreArgs(sharding=shardings[name], dtype=dtype, global_shape=self.arrays[name].shape)
            if name in shardings
            else ocp.RestoreArgs(restore_type=np.ndarray)
            for name in names
        }
        item = {name: jax.ShapeDtypeStruct(self.arrays[name].shape, self.arrays[name].dtype) for name in names}
        path = _part(self._folder, part)
        try:
            found = self._checkpointer.restore(path, ocp.args.PyTreeRestore(item, restore_args=arguments, partial_restore=True))
        except (ValueError, KeyError, OSError) as e:
            raise InputError(f"{path}: cannot be read ({' '.join(str(e).split())[:200]}); {_CONVERT}") from None
        wrong = [name for name in names if tuple(found[name].shape) != self.arrays[name].shape]
        if wrong:
            raise InputError(f"{path}: array {wrong[0]} has shape {found[wrong[0]].shape}, not that of the index; {_CONVERT}")
        return found


def _part(folder: epath.Path, part: int) -> epath.Path:
    return (folder / f"part-{part:05d}").absolute()


def _checkpointer() -> ocp.Checkpointer:
    # One file per array and chunk instead of one database per part: faster, and half the memory. Weights hardly compress.
    logging.getLogger("absl").addFilter(_quiet)
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False, use_compression=False))


def _quiet(record: logging.LogRecord) -> bool:
    return record.levelno > logging.WARNING or "orbax" not in record.pathname
