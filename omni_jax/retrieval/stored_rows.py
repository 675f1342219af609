"""A table whose rows stay in their files and are read where they are asked for: memory is that of a block, however many rows there are.

Letters: N rows, D width.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from omni_jax.retrieval.npz import aligned_empty
from omni_jax.types import InputError

KINDS = ("<f4", "<f2", "|i1")
"""Types that rows may have in a file; they come out as float32."""

CONVERTED = 1 << 18  # values converted to float32 together: they stay in a core's cache until they are multiplied


@dataclasses.dataclass(frozen=True)
class _Piece:
    """The rows of one file: (count, D) of a type, from a byte on; int8 rows with their scales (count,) float32; `view`: the rows mapped."""

    path: str
    offset: int
    count: int
    kind: str
    scale: np.ndarray | None
    view: np.ndarray | None = None


class StoredRows:
    """N rows in one file or several, indexed as an array is: by a number, a slice, or an array of numbers or booleans.

    Attributes:
      shape, dtype, ndim: those of the array (N, D) float32 that `table[:]` reads.
    """

    ndim = 2
    dtype = np.dtype(np.float32)

    def __init__(self, pieces: Sequence[_Piece], width: int, same: Mapping[int, int] | None = None) -> None:
        """Takes the files' rows, and row -> the row that stands in its place."""
        self._pieces = tuple(pieces)
        self._starts = np.concatenate([[0], np.cumsum([piece.count for piece in pieces])]).astype(np.int64)
        self.shape = (int(self._starts[-1]), width)
        pairs = sorted((same or {}).items())
        self._replaced, self._by = (np.array([pair[n] for pair in pairs], np.int64) for n in range(2))

    @classmethod
    def of(cls, mapped: np.memmap, scale: np.ndarray | None = None) -> StoredRows | None:
        """Returns the rows that a mapping shows; None where they are of a type, or in an order, that is not read here."""
        scaled = scale is not None
        if mapped.ndim != 2 or mapped.dtype.str not in KINDS or not mapped.flags.c_contiguous or (mapped.dtype.kind == "i") != scaled:
            return None
        assert mapped.filename is not None
        return cls([_Piece(str(mapped.filename), mapped.offset, len(mapped), mapped.dtype.str, scale)], mapped.shape[1])

    @classmethod
    def joined(cls, tables: Sequence[StoredRows], same: Mapping[int, int] | None = None) -> StoredRows:
        """Returns the rows of tables of one width, one after the other; `same`: row -> the row that is read in its place."""
        return cls([piece for table in tables for piece in table._pieces], tables[0].shape[1], same)

    def mapped(self) -> StoredRows:
        """Returns the rows mapped into memory, for those who read them again and again; a file that is replaced meanwhile is still read."""
        found, width = copy.copy(self), self.shape[1]
        found._pieces = tuple(
            dataclasses.replace(piece, view=np.memmap(piece.path, piece.kind, "r", piece.offset, (piece.count, width)))
            if piece.count
            else piece
            for piece in self._pieces
        )
        return found

    def products(self, start: int, stop: int, queries: np.ndarray) -> np.ndarray:
        """Returns the products (Q, stop - start) float32 of queries (Q, D) and rows. Rows that are `mapped` are not copied."""
        out = np.empty((len(queries), stop - start), np.float32)
        for piece, begin, end, place in self._within(start, stop):
            if piece.view is None:
                out[:, place : place + end - begin] = queries @ self._block(start + place, start + place + end - begin).T
                continue
            step = end - begin if piece.kind == "<f4" else max(1, CONVERTED // self.shape[1])
            for row in range(begin, end, step):
                rows = np.asarray(piece.view[row : min(row + step, end)], np.float32)
                for scores, query in zip(out, queries, strict=True):
                    np.matmul(rows, query, out=scores[place + row - begin :][: len(rows)])
            if piece.scale is not None:
                out[:, place : place + end - begin] *= piece.scale[begin:end].astype(np.float32)
        odd = self._replaced_within(start, stop)
        if len(odd):
            out[:, odd - start] = queries @ self._rows(self._redirected(odd)).T
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of the rows as float32."""
        return 4 * self.shape[0] * self.shape[1]

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[number] for number in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def __getitem__(self, key: Any) -> np.ndarray:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1:
                return self._block(start, max(start, stop))
            key = np.arange(start, stop, step)
        numbers = np.asarray(key)
        numbers = np.flatnonzero(numbers) if numbers.dtype == bool else numbers.astype(np.int64)
        if numbers.ndim == 0:
            return self[numbers[None]][0]
        numbers = np.where(numbers < 0, numbers + len(self), numbers)
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < len(self)):
            raise IndexError(f"row {int(numbers.max())} of {len(self)}")
        if len(numbers) and (np.diff(numbers) == 1).all():
            return self._block(int(numbers[0]), int(numbers[-1]) + 1)
        return self._rows(self._redirected(numbers))

    def _block(self, start: int, stop: int) -> np.ndarray:
        out = aligned_empty((stop - start, self.shape[1]))
        for piece, begin, end, place in self._within(start, stop):
            with _opened(piece) as file:
                self._read(file, piece, begin, out[place : place + end - begin])
        odd = self._replaced_within(start, stop)
        if len(odd):
            out[odd - start] = self._rows(self._redirected(odd))
        return out

    def _within(self, start: int, stop: int) -> Iterator[tuple[_Piece, int, int, int]]:
        """Yields the pieces that hold rows from start to stop: which of their own rows, and the place of these among those asked for."""
        for piece, first in zip(self._pieces, self._starts.tolist(), strict=False):
            begin, end = max(first, start), min(first + piece.count, stop)
            if begin < end:
                yield piece, begin - first, end - first, begin - start

    def _replaced_within(self, start: int, stop: int) -> np.ndarray:
        return self._replaced[slice(*np.searchsorted(self._replaced, [start, stop]))]

    def _redirected(self, numbers: np.ndarray) -> np.ndarray:
        if not len(self._replaced):
            return numbers
        place = np.minimum(np.searchsorted(self._replaced, numbers), len(self._replaced) - 1)
        return np.where(self._replaced[place] == numbers, self._by[place], numbers)

    def _rows(self, numbers: np.ndarray) -> np.ndarray:
        out = aligned_empty((len(numbers), self.shape[1]))
        which = np.searchsorted(self._starts, numbers, side="right") - 1
        for number in np.unique(which).tolist():
            piece = self._pieces[number]
            with _opened(piece) as file:
                for place in np.flatnonzero(which == number).tolist():
                    self._read(file, piece, int(numbers[place] - self._starts[number]), out[place : place + 1])
        return out

    def _read(self, file: Any, piece: _Piece, row: int, out: np.ndarray) -> None:
        """Fills `out` (n, D) with rows of a piece."""
        kind = np.dtype(piece.kind)
        if piece.view is not None:
            raw = piece.view[row : row + len(out)]
        else:
            raw = out if kind == np.float32 else np.empty(out.shape, kind)
            file.seek(piece.offset + row * self.shape[1] * kind.itemsize)
            view, done = raw.reshape(-1).view(np.uint8), 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise InputError(f"{piece.path}: ends early: it was changed while it was read; write it again")
                done += count
        if raw is not out:
            scale = np.float32(1) if piece.scale is None else piece.scale[row : row + len(out), None].astype(np.float32)
            np.multiply(raw, scale, out=out)


def _opened(piece: _Piece) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if piece.view is not None else open(piece.path, "rb", buffering=0)
