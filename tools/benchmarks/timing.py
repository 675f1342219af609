"""Interleaved timing of two sides, and the machine's matrix-product rate beside it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np

PAIRS = 5
PRODUCT = (1024, 1024, 4096)  # m, k, n of the product that stands for the machine's rate


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Seconds of each side in interleaved runs; `first_ours` is the first call, compilation included."""

    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    first_ours: float
    first_theirs: float

    @property
    def ratio(self) -> float:
        """Median over pairs of their time over ours: above one, we are faster."""
        return float(np.median(np.divide(self.theirs, self.ours)))

    @property
    def seconds(self) -> tuple[float, float]:
        """Medians: ours, theirs."""
        return float(np.median(self.ours)), float(np.median(self.theirs))


def clock(run: Callable[[], object]) -> float:
    """Returns the seconds a call takes; the call must wait for its own results."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleave(ours: Callable[[], object], theirs: Callable[[], object], pairs: int = PAIRS) -> Pairs:
    """Times both sides in turn, the order swapped from pair to pair, after one call of each that is not counted."""
    first = clock(ours), clock(theirs)
    times: dict[object, list[float]] = {ours: [], theirs: []}
    for n in range(pairs):
        for side in (ours, theirs) if n % 2 == 0 else (theirs, ours):
            times[side].append(clock(side))
    return Pairs(tuple(times[ours]), tuple(times[theirs]), *first)


def product_rates(repeats: int = 10) -> dict[str, float]:
    """Returns GFLOP/s of one float32 matrix product in jax and in torch, medians of interleaved runs."""
    import jax
    import jax.numpy as jnp
    import torch

    m, k, n = PRODUCT
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(m, k)).astype(np.float32), rng.normal(size=(k, n)).astype(np.float32)
    x, y, multiply = jnp.asarray(a), jnp.asarray(b), jax.jit(jnp.matmul)
    u, w = torch.from_numpy(a), torch.from_numpy(np.ascontiguousarray(b.T))
    pairs = interleave(lambda: multiply(x, y).block_until_ready(), lambda: torch.nn.functional.linear(u, w), repeats)
    return {name: 2 * m * k * n / seconds / 1e9 for name, seconds in zip(("jax", "torch"), pairs.seconds, strict=True)}
