"""Matrices between float and int8 on the way out of a converted folder, and into one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from omni_jax.config import ModelConfig
from omni_jax.conversion.engine import Entry, stored_name
from omni_jax.conversion.rules import TreePath
from omni_jax.conversion.store import Store
from omni_jax.model import rounded_maps
from omni_jax.model.int8 import SCALE, restored, rounded
from omni_jax.types import InputError


def scale_name(entry: Entry) -> str:
    """Returns the name under which a converted folder stores the scales of an int8 matrix."""
    return stored_name((*entry.path[:-1], SCALE), entry.layer)


def round_matrix(entry: Entry, array: np.ndarray, where: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns a matrix (I, O) in int8 and its scales (O,) float32.

    Raises:
      InputError: for values that are not finite, naming the matrix and `where` it is from.
    """
    try:
        return rounded(array)
    except ValueError as e:
        raise InputError(f"{where}: {entry.stored} {e}, and has no int8 form; get the weights again, or omit --weights") from None


class Matrices:
    """What becomes of the arrays of one folder in the model that is loaded.

    Attributes:
      scale_bytes: of the scales that the folder holds.
    """

    def __init__(self, source: epath.Path, config: ModelConfig, stores: Sequence[Store]) -> None:
        """Reads the scales, a few values for each thousand of the matrices, at once."""
        self._source, self._rounded, self._scales = source, rounded_maps(config), dict[str, np.ndarray]()
        for store in stores:
            names = [name for name in store.arrays if SCALE in name.split(".")]
            self._scales |= dict(store.read(names))
        self.scale_bytes = sum(scale.nbytes for scale in self._scales.values())

    def is_rounded(self, path: TreePath) -> bool:
        """Whether the model holds a leaf in int8."""
        return path[-1] == "kernel" and path[:-1] in self._rounded

    def as_loaded(self, entry: Entry, array: np.ndarray, kind: Any) -> dict[TreePath, np.ndarray]:
        """Returns the leaves that a stored array (of one layer) becomes: itself in type `kind`, or an int8 matrix and its scales."""
        if self.is_rounded(entry.path):
            q, scale = (array, self._scale(entry)) if array.dtype == np.int8 else round_matrix(entry, array, self._source)
            return {entry.path: q, (*entry.path[:-1], SCALE): scale}
        if array.dtype == np.int8:
            array = restored(array, self._scale(entry))
        return {entry.path: array.astype(kind, copy=False)}

    def restored_part(self, entry: Entry, part: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        """Returns a part `array[index]` of a stored array in a float type."""
        return restored(part, self._scale(entry)[index[-1]]) if part.dtype == np.int8 else part

    def rounded_part(self, entry: Entry, store: Store, index: tuple[slice, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Returns a part `array[index]` of a stored matrix in int8, and the scales of the whole."""
        if store.arrays[entry.stored].dtype == np.int8:
            return store.read_part(entry.stored, index), self._scale(entry)
        whole = store.read_part(entry.stored, tuple(slice(0, length) for length in entry.tree_shape))
        q, scale = round_matrix(entry, whole, self._source)
        return q[index], scale

    def _scale(self, entry: Entry) -> np.ndarray:
        if scale_name(entry) not in self._scales:
            raise InputError(f"{self._source}: {scale_name(entry)} is missing; convert the checkpoint again")
        return self._scales[scale_name(entry)]
