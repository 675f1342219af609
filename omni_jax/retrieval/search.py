"""Exact search: the rows of a table nearest to a query, by cosine.

Letters: Q queries, N rows of the table, D width, k results.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from omni_jax.config.made_with import HELD, ROUNDING, held_otherwise, listed
from omni_jax.retrieval.embedding_file import check_alike, read_embeddings, whole_set
from omni_jax.retrieval.norms import read_norms, write_norms
from omni_jax.retrieval.npz import PathLike
from omni_jax.retrieval.rows import TRUNCATE_DIM, as_rows, lengths, parts
from omni_jax.retrieval.stored_rows import StoredRows
from omni_jax.types import InputError

BLOCK = 16384  # rows scored together: memory stays O(block), however large the table
QUERIES = 256  # queries scored together, likewise
FEW = 4  # queries for which a product of a matrix and a vector each is faster than one of two matrices
MARGIN = 2e-5  # beyond the rounding of a cosine in float32
TINY, HUGE = 1e-15, 1e15  # lengths whose squares float32 holds to full precision

FREE = (*ROUNDING, *HELD, "normalize", TRUNCATE_DIM, "preset.prefix")
"""Fields of `made_with` in which an index and its query may differ: a cosine has no length, a query is cut as the index was and may have
another prefix.

Int8 weights on one side turn a cosine by little, which is said (`held_otherwise`)."""

# Query -> tables to search in, best first: what is least like what is already at hand.
TARGETS = {
    "text": ("av", "video", "audio", "tva", "tv", "at", "text"),
    "audio": ("video", "tv", "text", "av", "audio", "tva", "at"),
    "video": ("audio", "at", "text", "av", "video", "tva", "tv"),
    "av": ("text", "av", "tva", "video", "audio", "tv", "at"),
}


def target_table(query: str, tables: Collection[str], chosen: str | None = None) -> str:
    """Returns the table to search in: the chosen one, or the first of TARGETS that is there.

    Raises:
      InputError: when the chosen table is not there.
    """
    if chosen is not None:
        if chosen not in tables:
            raise InputError(f"the index has no table {chosen!r}; it holds {', '.join(tables)}")
        return chosen
    return next(name for name in TARGETS[query] if name in tables)


class Index:
    """A table checked once, for any number of searches.

    Attributes:
      rows: (N, D) float32, any length; may be mapped into memory, or `StoredRows`.
      norms: (N,) float32, their lengths.
    """

    def __init__(
        self,
        table: np.ndarray,
        name: str = "index",
        ids: Sequence[str] | None = None,
        *,
        norms: np.ndarray | None = None,
        made_with: Mapping[str, Any] | None = None,
    ):
        """Takes a table (N, D).

        Args:
          name, ids: of the table and its rows; the ids are for messages and for the caller.
          norms: (N,) float32, the lengths of the rows where they are known; the rows are then not read before they are searched.
          made_with: as `EmbeddingTable.made_with`.

        Raises:
          InputError: for rows with NaN, infinity or no usable length, naming them.
        """
        self.name, self.ids, self.made_with = name, ids, made_with
        self.rows = as_rows(table, name)
        if norms is not None:
            self.norms = norms
            return
        self.norms = np.empty(len(self.rows), np.float32)
        for part in self._blocks():
            with np.errstate(invalid="ignore", over="ignore"):
                self.norms[part] = np.sqrt(np.vecdot(self.rows[part], self.rows[part]))
        # Lengths that float32 cannot square are measured again, and refused where they are none.
        odd = np.flatnonzero(~((self.norms > TINY) & (self.norms < HUGE)))
        if len(odd):
            self.norms[odd] = lengths(self.rows[odd], name, ids, odd)

    @classmethod
    def open(cls, path: PathLike | Sequence[PathLike], table: str | None = None, *, made_with: Mapping[str, Any] | None = None) -> Index:
        """Opens a table of an embedding file: mapped into memory where it is one file of float32, or large (`read_embeddings`).

        The lengths of its rows are kept beside the (first) file (`FILE.TABLE.norms.npz`), where that may be written: later openings read
        no row.

        Args:
          path: embedding file, or the parts of one set.
          table: its name; None: the first of those that a text is searched in (`TARGETS`).
          made_with: of the model that embeds the queries (`OmniRetriever.made_with()`): refuses a file that another model or preset made.

        Raises:
          InputError: for a file that cannot be read, has no such table or no records, or was made otherwise.

        Warns:
          UserWarning: where the two were made with weights of different precision.
        """
        paths = whole_set(path)
        found = read_embeddings(paths, functools.partial(target_table, "text", chosen=table))
        if not found.ids:
            raise InputError(f"{paths[0]}: holds no records")
        check_alike("the query", made_with, paths[0], found.made_with, FREE)
        if made_with is not None and found.made_with is not None and (held := held_otherwise(found.made_with, made_with)):
            warnings.warn(f"{paths[0]}: was made with weights of another precision: {listed(held)}", stacklevel=2)
        (name,) = found.tables
        norms = read_norms(paths, name, len(found.ids_of(name)))
        index = cls(found.tables[name], name, found.ids_of(name), norms=norms, made_with=found.made_with)
        if norms is None:
            write_norms(paths, name, index.norms)
        if isinstance(index.rows, StoredRows):
            index.rows = index.rows.mapped()  # every query reads all of them
        return index

    def search(self, queries: np.ndarray, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
        """Returns cosines (Q, k) float32 and rows (Q, k) int64 of the k nearest rows, nearest first; level ones in the order of the table.

        For one query (D,) both are (k,). k is cut to the number of rows; `ids` names them. Where the table is recorded to have been cut to
        its first dimensions, a wider query is cut likewise.

        Raises:
          InputError: for queries with NaN, infinity or only zeros, of another width than the table, or k below 1.
        """
        if k < 1:
            raise InputError(f"{k} results were asked for; ask for at least 1")
        if np.ndim(queries) == 1:
            cosines, rows = self.search(np.asarray(queries)[None], k)
            return cosines[0], rows[0]
        asked = as_rows(queries, "query")
        if (self.made_with or {}).get(TRUNCATE_DIM) == self.rows.shape[1] < asked.shape[1]:
            asked = asked[:, : self.rows.shape[1]]
        if asked.shape[1] != self.rows.shape[1]:
            widths = f"the query is {asked.shape[1]} wide, table {self.name!r} is {self.rows.shape[1]}"
            raise InputError(f"{widths}; embed the index with the model that searches")
        asked = (asked / lengths(asked, "query")[:, None]).astype(np.float32)
        k = min(k, len(self.rows))
        cosines, rows = np.empty((len(asked), k), np.float32), np.empty((len(asked), k), np.int64)
        for start in range(0, len(asked), QUERIES):
            part = slice(start, start + QUERIES)
            for i, near in enumerate(self._near(asked[part], k), start):
                cosines[i], rows[i] = self._exact(asked[i], near, k)
        return cosines, rows

    def _near(self, queries: np.ndarray, k: int) -> list[np.ndarray]:
        """For each query the rows that may be among its k nearest: all within MARGIN of the k-th best as products of blocks give it."""
        best = np.full((len(queries), k), -np.inf, np.float32)
        near: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in queries]
        for part in self._blocks():
            if len(queries) >= FEW:
                found = queries @ self.rows[part].T
            elif isinstance(self.rows, StoredRows):
                found = self.rows.products(part.start, part.stop, queries)
            else:
                found = np.stack([self.rows[part] @ query for query in queries])
            found /= self.norms[part]
            for i, (row, so_far) in enumerate(zip(found, best, strict=True)):
                good = np.flatnonzero(row >= so_far[0] - MARGIN)
                if len(good):
                    near[i].append((part.start + good, row[good]))
                    best[i] = np.sort(np.concatenate([so_far, np.partition(row[good], max(len(good) - k, 0))[-k:]]))[-k:]
        return [
            np.concatenate([row[score >= so_far[0] - MARGIN] for row, score in parts]) for parts, so_far in zip(near, best, strict=True)
        ]

    def _exact(self, query: np.ndarray, near: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest of some rows. Equal rows have equal cosines here: each is a sum of its own, whatever block it was in."""
        cosines = np.empty(len(near), np.float32)
        for part in parts(len(near)):
            rows = self.rows[near[part]].astype(np.float64)
            cosines[part] = np.vecdot(rows, query.astype(np.float64)) / np.sqrt(np.vecdot(rows, rows))
        order = np.lexsort((near, -cosines))[:k]
        return cosines[order], near[order]

    def _blocks(self) -> Iterator[slice]:
        return (slice(start, min(start + BLOCK, len(self.rows))) for start in range(0, len(self.rows), BLOCK))


def search(
    queries: np.ndarray, table: np.ndarray, k: int = 10, *, name: str = "index", ids: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `Index(table, name, ids).search(queries, k)` does, which checks the table once for all its searches."""
    return Index(table, name, ids).search(queries, k)
