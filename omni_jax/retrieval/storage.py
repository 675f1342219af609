"""What it costs to keep tables in fewer bits: they are rounded, scored, and compared metric by metric."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from omni_jax.types import EmbeddingTable

STORAGE = ("float32", "bfloat16")
COUNTS = ("queries", "gallery")  # sizes, which no rounding changes


def stored(table: EmbeddingTable, dtype: str) -> EmbeddingTable:
    """Returns the table in the type it is to be kept in, one of STORAGE; `evaluate` multiplies and sums in float32 either way."""
    kept = {name: rows if rows.dtype == jnp.dtype(dtype) else rows[:].astype(jnp.dtype(dtype)) for name, rows in table.tables.items()}
    return dataclasses.replace(table, tables=kept)


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Returns direction -> metric -> after less before, for every metric of two results of `evaluate` over the same records."""
    return {
        name: {
            key: after["directions"][name][key] - value
            for key, value in metrics.items()
            if isinstance(value, int | float) and key not in COUNTS
        }
        for name, metrics in before["directions"].items()
    }


def format_changes(found: Mapping[str, Mapping[str, float]], dtype: str) -> str:
    """Returns the table of `changes`, and the largest of each metric below it."""
    keys = list(next(iter(found.values())))
    width = {key: max(len(key), 9) for key in keys}
    lines = [f"Kept as {dtype}, less kept as float32:", "direction" + "".join(f"  {key:>{width[key]}}" for key in keys)]
    for name, row in found.items():
        lines.append(f"{name:<9}" + "".join(f"  {row[key]:+{width[key]}.3f}" for key in keys))
    lines.append("largest  " + "".join(f"  {max(abs(row[key]) for row in found.values()):{width[key]}.3f}" for key in keys))
    return "\n".join(lines)
