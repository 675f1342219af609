"""Counts of floating-point operations, and the terms that they are sums of.

A product of (m, k) and (k, n) is 2 m k n. Elementwise work (norms, softmax, activations) is left out, as is usual for model FLOP/s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """A count, of operations or of what causes them (tokens, pairs): `computed` with padding, `needed` without."""

    computed: float = 0.0
    needed: float = 0.0

    def __add__(self, other: FlopCount) -> FlopCount:
        return FlopCount(self.computed + other.computed, self.needed + other.needed)

    def __mul__(self, factor: float) -> FlopCount:
        return FlopCount(self.computed * factor, self.needed * factor)

    @property
    def padding(self) -> float:
        """Share of the computed operations that nothing needed."""
        return 1 - self.needed / self.computed if self.computed else 0.0


def unpadded(count: float) -> FlopCount:
    """Returns a count of which nothing is padding."""
    return FlopCount(count, count)


@dataclasses.dataclass(frozen=True)
class LinearOps:
    """Linear maps applied to so many tokens.

    Attributes:
      paths: path prefixes of their matrices, all layers of a stack together.
    """

    paths: tuple[str, ...]
    tokens: FlopCount


@dataclasses.dataclass(frozen=True)
class Attention:
    """Logits and weighted sum of so many query-key pairs, counted over all layers; all heads together `width` wide."""

    width: int
    pairs: FlopCount


Terms = Sequence[LinearOps | Attention]
