"""Weights on disk as Orbax checkpoints, in parts small enough to be written and read in bounded memory.

    weights/index.json       {"parts": N, "arrays": {name: {"dtype", "shape", "pieces": [[part, first row, row after the last], ..],
                             "rows": rows to a digest, "digests": [..]}}}
    weights/part-00000/      an Orbax PyTree checkpoint of a flat dict name -> array
    weights/part-00001/      ...

One Orbax save of a whole model needs twice its size in memory; one save per part needs about twice the part. Layer stacks are stored
per layer, and a large array as pieces along its first axis: Orbax takes ten times as long for one array in many chunks.

Every few MiB of rows have a digest, and whatever is read is compared with it: values that the storage changed are never given out. The
digest of the whole is that of its arrays' names, types, shapes and digests, so that it can be compared with the index alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from omni_jax.conversion.folder import ADAPTER, EXTRA, WEIGHTS, Manifest
from omni_jax.io.messages import as_input_error
from omni_jax.io.remote import absolute
from omni_jax.types import InputError

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

_log = logging.getLogger(__name__)

PART_BYTES = 256 * 2**20
PIECE_BYTES = 64 * 2**20
DIGEST_BYTES = 4 * 2**20
"""Rows that share a digest: what is read at least of an array of which a part is wanted."""

_INDEX = "index.json"
_CONVERT = "convert the checkpoint again"


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of an array (all of it where the array has no axis), and the part they are in."""

    name: str
    part: int
    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def key(self) -> str:
        """Name within the part."""
        return f"{self.name}@{self.start}"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Stored:
    """One array.

    Attributes:
      rows: how many rows a digest covers; every piece begins with a multiple of it.
      digests: of rows [0, rows), [rows, 2 rows) ...; none in a folder that an earlier version wrote.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    rows: int
    digests: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class StoreWriter:
    """Writes arrays one after another; a part is saved whenever the next piece would make it larger than `part_bytes`."""

    def __init__(self, folder: epath.Path, part_bytes: int = PART_BYTES) -> None:
        self._folder = folder
        self._part_bytes = part_bytes
        self._pending: dict[str, np.ndarray] = {}
        self._index: dict[str, dict[str, Any]] = {}
        self._parts = 0
        self._checkpointer = _checkpointer()
        folder.mkdir(parents=True, exist_ok=True)

    def reserve(self, nbytes: int) -> None:
        """Saves what is pending if an array of this size would not fit beside it: called before the array is made, it lowers the peak."""
        if self._pending and sum(a.nbytes for a in self._pending.values()) + nbytes > self._part_bytes:
            self._flush()

    def add(self, name: str, array: np.ndarray) -> None:
        """Takes one array, which must not be changed afterwards; it may be written now or with a later one."""
        if name in self._index:
            raise ValueError(f"{name} is added twice")
        rows = array.shape[0] if array.ndim else 1
        step = max(1, rows * min(PIECE_BYTES, self._part_bytes) // max(array.nbytes, 1)) if array.ndim else 1
        covered = min(step, max(1, rows * DIGEST_BYTES // max(array.nbytes, 1)))
        step -= step % covered
        pieces, digests = [], []
        for start in range(0, max(rows, 1), step):
            piece = array[start : start + step] if array.ndim else array
            self.reserve(piece.nbytes)
            digests += digests_of(piece, covered)
            self._pending[f"{name}@{start}"] = piece
            pieces.append([self._parts, start, min(start + step, rows)])
        shape = list(array.shape)
        self._index[name] = {"dtype": array.dtype.name, "shape": shape, "pieces": pieces, "rows": covered, "digests": digests}

    @property
    def digest(self) -> str:
        """Digest of what was added so far, as `Store.digest` gives it."""
        return _digest_of_index(self._index)

    def _flush(self) -> None:
        import orbax.checkpoint as ocp

        self._checkpointer.save(_part(self._folder, self._parts), ocp.args.PyTreeSave(self._pending))
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
    """Arrays written by `StoreWriter`, read whole or in part.

    Attributes:
      arrays: name -> what is stored.
      bytes_read: of the values given out, so far; of an array read in part, the rows around it that share its digests are read too.
      digest: of names, types, shapes and values: equal ones mean equal weights. None in a folder that an earlier version wrote.
    """

    def __init__(self, folder: epath.Path) -> None:
        """Opens a store; InputError where the folder holds none."""
        self._folder = folder
        self._checkpointer = _checkpointer()
        self.bytes_read = 0
        try:
            arrays = json.loads((folder / _INDEX).read_text())["arrays"]
            self.arrays = {name: _stored(name, at) for name, at in arrays.items()}
            self.digest = _digest_of_index(arrays) if all(at.digests for at in self.arrays.values()) else None
        except FileNotFoundError:
            raise InputError(f"{folder / _INDEX}: no such file; the folder is not a finished conversion: {_CONVERT}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise InputError(f"{folder / _INDEX}: cannot be read ({e}); {_CONVERT}") from None

    def check(self, recorded: str | None) -> Store:
        """Returns itself where its index is the one whose digest was recorded; what is read is then checked piece by piece.

        Raises:
          InputError: it is another one, or of another conversion.
        """
        if self.digest is None:
            _log.warning("warning: %s: has no digests, its values are not checked; %s", self._folder, _CONVERT)
        elif self.digest != recorded:
            raise InputError(f"{self._folder / _INDEX}: does not belong to this folder, or is damaged (digest); {_CONVERT}")
        return self

    def read(self, names: Iterable[str], limit: int = PART_BYTES) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, array) in the order of `names`, reading at most `limit` bytes (or one array) ahead.

        Raises:
          InputError: a name that is not stored, or a damaged part.
        """
        whole: dict[str, np.ndarray] = {}
        left: dict[str, int] = {}
        for pieces in self._batches(names, limit):
            for piece, array in self._read(pieces):
                stored = self.arrays[piece.name]
                if len(stored.pieces) == 1:
                    yield piece.name, array
                    continue
                if piece.name not in whole:
                    whole[piece.name], left[piece.name] = np.empty(stored.shape, stored.dtype), len(stored.pieces)
                whole[piece.name][piece.start : piece.stop] = array
                left[piece.name] -= 1
                if not left[piece.name]:
                    yield piece.name, whole.pop(piece.name)

    def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Returns `array[index]`, reading no other rows than those that share a digest with it; slices have a start and a stop, no step.

        Raises:
          InputError: a name that is not stored, or a damaged part.
        """
        stored = self._stored(name)
        if not stored.shape:
            return next(self.read([name]))[1]
        rows, columns = index[0], index[1:]
        found = []
        for piece in stored.pieces:
            start, stop = max(rows.start, piece.start), min(rows.stop, piece.stop)
            if start >= stop:
                continue
            at = (slice(start - piece.start, stop - piece.start), *columns)
            raw = raw_file(_part(self._folder, piece.part) / piece.key, piece.shape, piece.dtype)
            if raw is None:
                found += [array[at] for _, array in self._read([piece])]
                continue
            # Whole rows, as many as share digests: what an object store or a page of a file gives anyway.
            first = at[0].start - at[0].start % stored.rows if stored.digests else at[0].start
            last = min(-(-at[0].stop // stored.rows) * stored.rows, piece.shape[0]) if stored.digests else at[0].stop
            with as_input_error(f"{raw}: cannot be read", _CONVERT, OSError, ValueError):
                whole = read_raw(raw, piece.shape, piece.dtype, (slice(first, last), *(slice(0, n) for n in piece.shape[1:])))
            self._verify(piece, whole, first)
            part = whole[(slice(at[0].start - first, at[0].stop - first), *columns)]
            self.bytes_read += part.nbytes
            found.append(part)
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _verify(self, piece: Piece, rows: np.ndarray, first: int) -> None:
        """Compares rows of a piece, from its `first` on, with their digests."""
        stored = self.arrays[piece.name]
        at = (piece.start + first) // stored.rows
        for number, digest in enumerate(digests_of(rows, stored.rows) if stored.digests else ()):
            if digest != stored.digests[at + number]:
                raise InputError(
                    f"{_part(self._folder, piece.part) / piece.key}: holds other values than were written "
                    f"(digest of {piece.name}, rows from {(at + number) * stored.rows}); the file is damaged: {_CONVERT}"
                )

    def _stored(self, name: str) -> Stored:
        if name not in self.arrays:
            raise InputError(f"{self._folder}: array {name} is missing; {_CONVERT}")
        return self.arrays[name]

    def _batches(self, names: Iterable[str], limit: int) -> Iterator[list[Piece]]:
        batch: list[Piece] = []
        for name in names:
            for piece in self._stored(name).pieces:
                if batch and sum(p.nbytes for p in batch) + piece.nbytes > limit:
                    yield batch
                    batch = []
                batch.append(piece)
        if batch:
            yield batch

    def _read(self, pieces: list[Piece]) -> Iterator[tuple[Piece, np.ndarray]]:
        """Yields the pieces' values in order, after one restore of each part they are in."""
        import orbax.checkpoint as ocp

        found: dict[str, np.ndarray] = {}
        for part in dict.fromkeys(piece.part for piece in pieces):
            members = [piece for piece in pieces if piece.part == part]
            arguments = {piece.key: ocp.RestoreArgs(restore_type=np.ndarray) for piece in members}
            item = {piece.key: jax.ShapeDtypeStruct(piece.shape, piece.dtype) for piece in members}
            path = _part(self._folder, part)
            with as_input_error(f"{path}: cannot be read", _CONVERT, ValueError, KeyError, OSError):
                found |= self._checkpointer.restore(path, ocp.args.PyTreeRestore(item, restore_args=arguments, partial_restore=True))
        for piece in pieces:
            array = found.pop(piece.key)
            if array.shape != piece.shape or array.dtype != piece.dtype:
                raise InputError(f"{_part(self._folder, piece.part)}: array {piece.name} differs from its entry in the index; {_CONVERT}")
            self._verify(piece, array, 0)
            self.bytes_read += piece.nbytes
            yield piece, array


def open_stores(source: epath.Path, manifest: Manifest) -> list[Store]:
    """Returns the stores of a converted folder, checked against its manifest: the adapter's first, which overrides the base's.

    Raises:
      InputError: one is absent, damaged, or of another conversion.
    """
    base = Store(source / WEIGHTS).check(manifest.base_digest)
    return [base] if manifest.adapter is None else [Store(source / ADAPTER).check(manifest.adapter_digest), base]


def open_extra(source: epath.Path, manifest: Manifest) -> list[Store]:
    """Returns the store of what only an export has again, checked against the manifest; none where the folder has no such tensors.

    Raises:
      InputError: it is absent, damaged, or of another conversion.
    """
    return [] if manifest.extra_digest is None else [Store(source / EXTRA).check(manifest.extra_digest)]


def raw_file(folder: epath.Path, shape: tuple[int, ...], dtype: np.dtype) -> epath.Path | None:
    """Returns the file that holds the bare values of an array in a part; None where they are packed, in several files, or left out.

    A part is a zarr array for each piece, which as this module writes them has one chunk and no compression.
    """
    try:
        about = json.loads((folder / ".zarray").read_text())
        bare = about["compressor"] is None and about["filters"] is None and about["order"] == "C"
        kind = about["dtype"] in (dtype.name, np.dtype(dtype).newbyteorder("<").str)
        if not bare or not kind or tuple(about["shape"]) != shape or tuple(about["chunks"]) != shape:
            return None
        file = folder / about["dimension_separator"].join("0" for _ in shape)
        # Values that are all zero may have no file.
        return file if file.exists() and file.stat().length == math.prod(shape) * dtype.itemsize else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_raw(file: epath.Path, shape: tuple[int, ...], dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
    """Returns `array[index]` of an array whose bare values a file holds."""
    if "://" not in os.fspath(file):
        return np.array(np.memmap(file, dtype, mode="r", shape=shape)[index])
    return fetch_raw(file, shape, dtype, index)


def fetch_raw(file: epath.Path, shape: tuple[int, ...], dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
    """As `read_raw` for an object store: the whole rows are fetched in one piece, of which the columns are taken."""
    rows, row_bytes = index[0], math.prod(shape[1:]) * dtype.itemsize
    with file.open("rb") as opened:
        opened.seek(rows.start * row_bytes)
        data = opened.read((rows.stop - rows.start) * row_bytes)
    return np.frombuffer(data, dtype).reshape(-1, *shape[1:])[(slice(None), *index[1:])].copy()


def digests_of(array: np.ndarray, rows: int) -> list[str]:
    """Returns the BLAKE2b digests of the values of rows [0, rows), [rows, 2 rows) ... of an array; of one without axes the one of all."""
    values = np.ascontiguousarray(array)
    blocks = [values[start : start + rows] for start in range(0, max(len(values), 1), rows)] if values.ndim else [values]

    def digest(block: np.ndarray) -> str:
        return hashlib.blake2b(block.reshape(-1).view(np.uint8).data, digest_size=16).hexdigest()

    # hashlib works without the interpreter lock; small blocks are not worth a thread.
    return list(_THREADS.map(digest, blocks)) if len(blocks) > 1 and values.nbytes > 2**20 else [digest(block) for block in blocks]


_THREADS = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "digest")


def _digest_of_index(arrays: Mapping[str, Mapping[str, Any]]) -> str:
    whole = hashlib.blake2b(digest_size=16)
    for name, at in arrays.items():
        whole.update(f"{name} {at['dtype']} {at['shape']} {at['rows']} {' '.join(at['digests'])}\n".encode())
    return whole.hexdigest()


def _stored(name: str, at: Mapping[str, Any]) -> Stored:
    dtype, shape, rows, digests = jnp.dtype(at["dtype"]), tuple(at["shape"]), at.get("rows", 1), tuple(at.get("digests", ()))
    if type(rows) is not int or rows < 1:
        raise ValueError(f"{name} has a digest for each {rows!r} rows")
    pieces = [Piece(name, part, start, stop, (stop - start, *shape[1:]) if shape else (), dtype) for part, start, stop in at["pieces"]]
    wanted = -(-max(shape[0], 1) // rows) if shape else 1
    if digests and (len(digests) != wanted or any(piece.start % rows for piece in pieces)):
        raise ValueError(f"{name} has {len(digests)} digests, expected {wanted}")
    return Stored(dtype, shape, tuple(pieces), rows, digests)


def _part(folder: epath.Path, part: int) -> epath.Path:
    return absolute(folder / f"part-{part:05d}")


def _checkpointer() -> ocp.Checkpointer:
    import orbax.checkpoint as ocp  # slow: not before there is something to read or write

    # One file per array instead of one database per part: faster, and half the memory. Weights hardly compress.
    logging.getLogger("absl").addFilter(_quiet)
    # Each process reads and writes by itself: one of several may convert while the others wait elsewhere.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"store{me}")
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False, use_compression=False, multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _quiet(record: logging.LogRecord) -> bool:
    # Orbax warns at every restore that no sharding was given, which is what is wanted here.
    return record.levelno > logging.WARNING or "orbax" not in record.pathname
