"""Nearest rows of a large gallery by FAISS: exact for a small one, in the nearest cells of an inverted file for a large one.

Letters: N rows of the gallery, Q queries of a block, D width, k candidates.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np

from omni_jax.retrieval.rows import as_rows, lengths
from omni_jax.types import InputError

SMALL = 20_000  # rows up to which every row is compared
BLOCK = 16_384  # rows added together
TRAIN = 64  # rows of each cell that its center is learned from
PROBED = 32  # of so many cells one is looked at, of the nearest ones
FEWEST = 16  # cells looked at, at least


class FaissIndex:
    """A gallery in a FAISS index, called as `mining.Nearest`.

    It holds the rows once more: 4 N D bytes, and 8 N for the numbers of rows in cells.

    Attributes:
      cells: of the inverted file; 0 where every row is compared.
      probed: cells looked at for each query.
    """

    def __init__(self, gallery: np.ndarray, *, probed: int | None = None, name: str = "gallery", seed: int = 0) -> None:
        """Makes the index.

        Args:
          gallery: (N, D), any length.
          probed: cells looked at for each query; None: one in PROBED. More find more, and take longer.
          seed: of the rows that the centers of cells are learned from.

        Raises:
          InputError: where faiss is not installed, or for rows with NaN, infinity or only zeros.
        """
        faiss = faiss_module("search exactly (--search exact)")
        rows = as_rows(gallery, name)
        count, width = rows.shape
        self.cells = 0 if count <= SMALL else round(4 * math.sqrt(count))
        self.probed = min(self.cells, probed or max(FEWEST, self.cells // PROBED))
        kind = f"IVF{self.cells},Flat" if self.cells else "Flat"
        self._index = faiss.index_factory(width, kind, faiss.METRIC_INNER_PRODUCT)
        if self.cells:
            self._index.nprobe = self.probed
            sample = np.sort(np.random.default_rng(seed).permutation(count)[: TRAIN * self.cells])
            self._index.train(_unit(rows[sample], name))
        for start in range(0, count, BLOCK):
            self._index.add(_unit(rows[start : start + BLOCK], name))

    def __call__(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns cosines (Q, k) and rows (Q, k), nearest first; row -1 where the cells that were looked at hold fewer."""
        return self._index.search(_unit(as_rows(queries, "query"), "query"), k)


def _unit(rows: np.ndarray, name: str) -> np.ndarray:
    return np.ascontiguousarray(rows / lengths(rows, name)[:, None], np.float32)


def faiss_module(otherwise: str) -> Any:
    """Returns FAISS. Raises InputError where it is not installed; `otherwise` says what needs none."""
    try:
        return importlib.import_module("faiss")
    except ImportError as e:
        raise InputError(f"faiss is not installed; run pip install 'omni-jax[faiss]', or {otherwise}") from e
