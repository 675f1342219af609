"""The 12 directions and their averages (SPEC section 9)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

SINGLE: Mapping[str, tuple[str, str]] = {
    "t2v": ("text", "video"),
    "v2t": ("video", "text"),
    "t2a": ("text", "audio"),
    "a2t": ("audio", "text"),
    "v2a": ("video", "audio"),
    "a2v": ("audio", "video"),
}
DUAL: Mapping[str, tuple[str, str]] = {
    "t2av": ("text", "av"),
    "av2t": ("av", "text"),
    "a2tv": ("audio", "tv"),
    "tv2a": ("tv", "audio"),
    "v2at": ("video", "at"),
    "at2v": ("at", "video"),
}
DIRECTIONS: Mapping[str, tuple[str, str]] = {**SINGLE, **DUAL}
"""Direction -> (query table, gallery table), in the order of the published table."""

AVERAGES: Mapping[str, tuple[str, ...]] = {
    "AVG-single": tuple(SINGLE),
    "AVG-dual": tuple(DUAL),
    "AVG-all": tuple(DIRECTIONS),
}
"""Average -> the directions whose R@1 it is the mean of."""


def possible(tables: Collection[str]) -> dict[str, tuple[str, str]]:
    """Returns the directions whose two tables are among `tables`."""
    return {name: pair for name, pair in DIRECTIONS.items() if pair[0] in tables and pair[1] in tables}


def averages(r1: Mapping[str, float]) -> dict[str, float | None]:
    """Returns the three averages of R@1 by direction; None where a direction is missing."""
    return {name: _mean([r1[d] for d in needed]) if all(d in r1 for d in needed) else None for name, needed in AVERAGES.items()}


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
