"""Fingerprints of arrays: a sum over all values, each weighted by its place, so that every split over devices and hosts gives the same.

They are for values that storage changed: a value of which any bits differ always changes the sum. Computed where the arrays are: on an
accelerator one pass over its memory. Arithmetic is modulo 2**32, exact, and so the same in NumPy and in a compiled program.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

_BLOCK = 1 << 18  # values at a time on the host: its temporaries stay in the cache


def fingerprints(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Returns name -> 16 hexadecimal digits for arrays of 1, 2 or 4 bytes a value, whatever their sharding; every process must call it."""
    if all(isinstance(x, np.ndarray) or (x.is_fully_addressable and jax.default_backend() == "cpu") for x in arrays.values()):
        sums = {name: _on_host(np.asarray(x)) for name, x in arrays.items()}
    else:
        places = {x.sharding for x in arrays.values()}
        mesh = next((place.mesh for place in places if isinstance(place, NamedSharding)), None)
        sums = _program(NamedSharding(mesh, PartitionSpec()) if mesh is not None else None)(dict(arrays))
    return {name: f"{int(first):08x}{int(second):08x}" for name, (first, second) in sums.items()}


@functools.cache
def _program(place: Sharding | None) -> Any:
    return jax.jit(lambda arrays: {name: _on_devices(x) for name, x in arrays.items()}, out_shardings=place)


def _on_host(x: np.ndarray) -> tuple[Any, Any]:
    bits = np.ascontiguousarray(x).reshape(-1).view(f"u{x.dtype.itemsize}")
    sums = np.zeros(2, np.uint32)
    for start in range(0, bits.size, _BLOCK):
        part = bits[start : start + _BLOCK].astype(np.uint32)
        # As int64 first: past 2**32 values the places wrap, as they do on a device.
        place = np.arange(start, start + part.size, dtype=np.int64).astype(np.uint32)
        sums += np.array([np.sum(terms, dtype=np.uint32) for terms in _terms(part, place)], np.uint32)
    return sums[0], sums[1]


def _on_devices(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x  # which has no bits to convert
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        step = np.uint32(math.prod(x.shape[axis + 1 :]) % 2**32)
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * step
    first, second = (jnp.sum(terms, dtype=jnp.uint32) for terms in _terms(bits, place))
    return first, second


def _terms(bits: Any, place: Any) -> tuple[Any, Any]:
    """Two summands of each value. Weights are odd: the product with a difference of bits is never 0."""
    u = np.uint32
    mixed = place ^ (place >> u(15))
    return bits * (place * u(0x9E3779B1) | u(1)), (bits ^ (bits >> u(16))) * (mixed * u(0x85EBCA77) | u(1))
