"""Training curves as one self-contained HTML page, drawn as the report is."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_jax.retrieval.drawing import over_steps
from omni_jax.retrieval.report import environment

PANELS: dict[str, tuple[str, ...]] = {
    "loss": ("loss",),
    "losses by part": ("L_T", "L_D", "L_A"),
    "gradient norm": ("grad_norm",),
    "learning rate": ("learning_rate",),
    "mean cosine of different clips": ("mean_cosine",),
    "effective rank": ("effective_rank",),
}
"""Title and metrics of each panel, where a run has them."""

Series = dict[str, tuple[tuple[float, float], ...]]
"""Metric -> (step, value) in the order of the steps, finite values only."""


def read_series(rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> Series:
    """Returns the named metrics that some row has, from rows with a "step".

    A step that appears twice, as after a run was resumed, counts as it was last.
    """
    found: dict[str, dict[float, float]] = {name: {} for name in names}
    for row in rows:
        for name in names:
            value = row.get(name)
            if isinstance(value, (int, float)) and math.isfinite(value) and isinstance(row.get("step"), (int, float)):
                found[name][row["step"]] = float(value)
    return {name: tuple(sorted(points.items())) for name, points in found.items() if points}


def curves_page(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Returns the page; panels without a value are left out."""
    panels = {name: over_steps(series) for name, metrics in PANELS.items() if (series := read_series(rows, metrics))}
    legends = {name: [(f"c{line.colour}", line.name) for line in chart.lines] for name, chart in panels.items()}
    return environment().get_template("curves.html.j2").render(title=title, panels=panels, legends=legends)


def read_rows(path: os.PathLike[str] | str) -> list[dict[str, Any]]:
    """Returns the rows of a `metrics.jsonl`; a last line that was cut off is left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
