"""Large matrices in int8: which ones, their rounding on the host, and products with them.

A matrix W (I, O) is held as q (I, O) int8 and a scale (O,) float32, W ~ q * scale: symmetric, one scale for each output, so that a product
is scaled once and no entry of q is multiplied twice. What is rounded keeps half a step, scale / 2, of its value.

Letters: I inputs, O outputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

LEVELS = 127
"""Largest entry of a rounded column; -128 is left out, so that both signs have the same steps."""

SCALE = "kernel_scale"
"""Name of the parameter beside an int8 `kernel`."""

_SMALL = ("beats/patch_embed", "beats/layers/attn/gate")  # 131 thousand and 6 thousand values at 7B: nothing to gain
_ONE_TOKEN = "head/"  # reads a handful of prompts a row, each the states of all layers: memory decides, and layers differ in size
_LEAST = np.float32(np.finfo(np.float32).tiny)  # a smaller scale would be flushed to zero on a TPU
_BLOCK = 4 * 2**20  # values rounded at a time on the host


def kind_of(module: str, weights: str, kept: tuple[str, ...]) -> str:
    """Returns how one linear map holds its matrix: "float", "int8", or "int8-dynamic", whose inputs are rounded on the fly as well.

    The one place that decides. Everything that is no linear map (norms, biases, tables, convolutions, patch embeddings) stays as it is.

    Args:
      module: path of the map ("decoder/layers/attn/q").
      weights, kept: as in `ModelConfig`.
    """
    if module in _SMALL or module in kept:
        return "float"
    return "int8" if weights == "int8-dynamic" and module.startswith(_ONE_TOKEN) else weights


def product(x: jax.Array, kernel: jax.Array, scale: jax.Array, *, dynamic: bool) -> jax.Array:
    """Returns x W, (..., O) in the dtype of x.

    Args:
      x: (..., I).
      kernel, scale: (I, O) int8 and (O,) float32.
      dynamic: rounds x to int8 with one scale for each token and multiplies integers; no gradient passes.
    """
    if not dynamic:
        return ((x @ kernel.astype(x.dtype)).astype(jnp.float32) * scale).astype(x.dtype)
    wide = x.astype(jnp.float32)
    step = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / LEVELS, _LEAST)
    rounded = jnp.round(wide / step).astype(jnp.int8)
    sums = jax.lax.dot_general(rounded, kernel, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    return (sums.astype(jnp.float32) * step * scale).astype(x.dtype)


def rounded(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns a matrix as int8 (..., I, O) and its scales (..., O) float32: of each column's largest value one in 127.

    Args:
      matrix: (..., I, O) of any float type; leading axes are layers.

    Raises:
      ValueError: for a value that is not finite.
    """
    *layers, inputs, outputs = matrix.shape
    q, scale = np.empty(matrix.shape, np.int8), np.empty((*layers, outputs), np.float32)
    rows = max(1, _BLOCK // max(outputs, 1))
    for layer in np.ndindex(*layers):
        one = matrix[layer]
        blocks = [slice(start, start + rows) for start in range(0, inputs, rows)]
        top = np.zeros(outputs, np.float32)
        for block in blocks:
            np.maximum(top, np.abs(one[block].astype(np.float32)).max(axis=0), out=top)
        if not np.isfinite(top).all():
            raise ValueError("holds values that are not finite")
        step = np.maximum(top / np.float32(LEVELS), _LEAST)
        for block in blocks:
            wide = one[block].astype(np.float32)
            np.rint(np.divide(wide, step, out=wide), out=wide)
            q[layer][block] = wide
        scale[layer] = step
    return q, scale


def restored(q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Returns the matrix (..., I, O) float32 that an int8 one and its scales (..., O) stand for."""
    return q.astype(np.float32) * scale[..., None, :]
