"""Rotary positions: angles in float32, one rotation for the decoder (TMRoPE) and the vision tower (2-D).

Letters: B batch, S tokens, P patches, h head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def _inverse_frequencies(width: int, theta: float) -> np.ndarray:
    """(width/2,) float32, theta ** (-2i/width)."""
    exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return (1.0 / np.float32(theta) ** exponent).astype(np.float32)


def tmrope_angles(positions: jax.Array, head_dim: int, theta: float, sections: tuple[int, int, int]) -> jax.Array:
    """Returns angles (B, S, h/2) float32 from positions (3, B, S) int32.

    The first `sections[0]` frequencies turn with the temporal position, the next with the row, the rest with the column (SPEC section 4).
    """
    axis = np.repeat(np.arange(3), sections)
    per_frequency = jnp.moveaxis(positions.astype(jnp.float32)[axis], 0, -1)
    return per_frequency * _inverse_frequencies(head_dim, theta)


def vision_angles(coords: jax.Array, head_dim: int, theta: float) -> jax.Array:
    """Returns angles (N, P, h/2) float32 from patch coordinates (N, P, 2) int32: half the frequencies for rows, half for columns."""
    inverse = _inverse_frequencies(head_dim // 2, theta)
    angles = coords.astype(jnp.float32)[..., None] * inverse
    return angles.reshape(*coords.shape[:-1], head_dim // 2)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, product: bool = False) -> jax.Array:
    """Rotates x (B, S, H, h) by angles whose cosine and sine are (B, S, h/2) float32; halves are paired, not neighbours.

    With `product` the halves change places in a product with a permutation, which gives the same numbers: a TPU moves arrays about to get
    at halves that are narrower than its registers. No gradient reaches the angles then.
    """
    if product:
        return _rotate_whole(x, cos, sin)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@jax.custom_vjp
def _rotate_whole(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    width = x.shape[-1]
    # Each sum has one term that is not zero, so that no rounding takes place.
    exchange = jnp.asarray(np.roll(np.eye(width), width // 2, axis=0), x.dtype)
    other = jnp.matmul(x, exchange, precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None)
    cos, sin = jnp.concatenate([cos, cos], axis=-1)[:, :, None], jnp.concatenate([-sin, sin], axis=-1)[:, :, None]
    return (x.astype(jnp.float32) * cos + other.astype(jnp.float32) * sin).astype(x.dtype)


def _rotate_back(angles: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    cos, sin = angles
    return _rotate_whole(gradient, cos, -sin), jnp.zeros_like(cos), jnp.zeros_like(sin)


_rotate_whole.defvjp(lambda x, cos, sin: (_rotate_whole(x, cos, sin), (cos, sin)), _rotate_back)
