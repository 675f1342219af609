"""Layout changes between a torch tensor and a leaf of the parameter tree, each invertible bit for bit.

A transform is a small frozen record with four methods: `forward` (torch -> tree), `inverse` (tree -> torch) and the same two for shapes.
Axis letters: I inputs, O outputs, K kernel taps, C channels, E patch-embedding width, H heads, G groups.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

Shape = tuple[int, ...]

_TILE = 128  # rows and columns copied together: a plain transposed copy misses the cache on every element and is five times slower


class Transform(Protocol):
    """One invertible layout change; `inverse(forward(x))` equals x bit for bit.

    `row_axis` is the axis of the leaf along which the rows (first axis) of the torch tensor lie, so that a large tensor can be converted
    some rows at a time; None where it cannot.
    """

    @property
    def row_axis(self) -> int | None: ...

    def forward(self, array: np.ndarray) -> np.ndarray:
        """Returns the tree leaf of a torch tensor, C-contiguous."""
        ...

    def inverse(self, array: np.ndarray) -> np.ndarray:
        """Returns the torch tensor of a tree leaf, C-contiguous."""
        ...

    def torch_shape(self, tree_shape: Shape) -> Shape:
        """Returns the tensor's shape for a leaf's shape."""
        ...


@dataclasses.dataclass(frozen=True)
class Identity:
    """The same array: biases, norms, embeddings."""

    row_axis = 0

    def forward(self, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array)

    inverse = forward

    def torch_shape(self, tree_shape: Shape) -> Shape:
        return tuple(tree_shape)


@dataclasses.dataclass(frozen=True)
class ReverseAxes:
    """All axes in reverse order: a linear kernel (O, I) <-> (I, O), a convolution kernel (O, I, K) <-> (K, I, O)."""

    row_axis = -1

    def forward(self, array: np.ndarray) -> np.ndarray:
        return _reversed_copy(array)

    inverse = forward

    def torch_shape(self, tree_shape: Shape) -> Shape:
        return tuple(tree_shape[::-1])


@dataclasses.dataclass(frozen=True)
class PatchKernel:
    """A convolution whose stride equals its kernel, as a matrix: (E, *inner) <-> (prod(inner), E).

    The rows of the matrix follow the row-major order of `inner` (channel, frame, row, column for the vision tower).
    """

    inner: Shape
    row_axis = None

    def forward(self, array: np.ndarray) -> np.ndarray:
        return _reversed_copy(np.ascontiguousarray(array).reshape(array.shape[0], -1))

    def inverse(self, array: np.ndarray) -> np.ndarray:
        return _reversed_copy(array).reshape(self.torch_shape(array.shape))

    def torch_shape(self, tree_shape: Shape) -> Shape:
        return (tree_shape[-1], *self.inner)


@dataclasses.dataclass(frozen=True)
class KeepAxis:
    """A vector that torch stores with axes of length one around it: (1, .., n, .., 1) <-> (n,)."""

    rank: int
    axis: int
    row_axis = None

    def forward(self, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array).reshape(-1)

    def inverse(self, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array).reshape(self.torch_shape(array.shape))

    def torch_shape(self, tree_shape: Shape) -> Shape:
        return tuple(tree_shape[0] if axis == self.axis else 1 for axis in range(self.rank))


def _reversed_copy(array: np.ndarray) -> np.ndarray:
    """Returns a C-contiguous copy with all axes reversed."""
    if array.ndim != 2:
        return np.ascontiguousarray(array.transpose())
    rows, columns = array.shape
    out = np.empty((columns, rows), array.dtype)
    for i in range(0, rows, _TILE):
        for j in range(0, columns, _TILE):
            out[j : j + _TILE, i : i + _TILE] = array[i : i + _TILE, j : j + _TILE].T
    return out
