"""Differences between two arms over seeds, and how sure they are.

A seed is the same for both arms: the same first weights and order of clips. So the difference of a seed is free of what they have in
common, and differences of seeds are independent. The interval is Student's, over n seeds: mean +- t(n - 1) * deviation / sqrt(n).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from omni_jax.types import InputError

LEVEL = 0.95
LEAST = 2  # seeds: one has no spread


@dataclasses.dataclass(frozen=True)
class Paired:
    """A mean difference over seeds.

    Attributes:
      difference: mean of second less first, one pair a seed.
      interval: 95 % interval of it.
    """

    difference: float
    interval: tuple[float, float]

    @property
    def apart(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.interval[0] > 0 or self.interval[1] < 0

    def row(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        return {"difference": self.difference, "interval": list(self.interval)}


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Returns second less first over seeds.

    Args:
      first, second: a figure of each seed, in the same order.

    Raises:
      InputError: for fewer than two seeds.
    """
    differences = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    if len(differences) < LEAST:
        raise InputError(f"an interval over seeds needs at least {LEAST} of them; raise --seeds")
    mean = float(differences.mean())
    reach = student(LEVEL, len(differences) - 1) * float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return Paired(mean, (mean - reach, mean + reach))


def student(level: float, freedom: int) -> float:
    """Returns t such that Student's distribution holds `level` of its mass between -t and t, to twelve digits.

    The mass is a finite series for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4); t is found by halving.
    """

    def mass(angle: float) -> float:  # of atan(t / sqrt(freedom))
        cosine, odd = math.cos(angle), freedom % 2
        term = cosine if odd else 1.0
        total = term if freedom > 1 else 0.0
        for k in range(2 + odd, freedom, 2):
            term *= (k - 1) / k * cosine * cosine
            total += term
        return (2 / math.pi) * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total

    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if mass(middle) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)
