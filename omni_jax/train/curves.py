"""Training curves as one self-contained HTML page: rows of metrics in, SVG out."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss", ("loss",)),
    ("losses by part", ("L_T", "L_D", "L_A")),
    ("gradient norm", ("grad_norm",)),
    ("learning rate", ("learning_rate",)),
    ("mean cosine of different clips", ("mean_cosine",)),
    ("effective rank", ("effective_rank",)),
)
"""Title and metrics of each panel, where a run has them."""

_WIDTH, _HEIGHT = 520, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 510, 12, 198
_COLOURS = ("#1f6feb", "#d1480f", "#2da44e")


@dataclasses.dataclass(frozen=True)
class Series:
    """One metric of a run: (step, value) in the order of the steps, finite values only."""

    name: str
    points: tuple[tuple[float, float], ...]


def read_series(rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> list[Series]:
    """Returns the series of the named metrics that some row has, from rows with a "step".

    A step that appears twice, as after a run was taken up again, counts as it stands last.
    """
    found: dict[str, dict[float, float]] = {name: {} for name in names}
    for row in rows:
        for name in names:
            value = row.get(name)
            if isinstance(value, (int, float)) and math.isfinite(value) and isinstance(row.get("step"), (int, float)):
                found[name][row["step"]] = float(value)
    return [Series(name, tuple(sorted(points.items()))) for name, points in found.items() if points]


def curves_page(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Returns the page; panels without a value are left out."""
    panels = [(name, read_series(rows, metrics)) for name, metrics in PANELS]
    drawn = "\n".join(f"<figure><figcaption>{html.escape(name)}</figcaption>{_svg(series)}</figure>" for name, series in panels if series)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>
body {{ font: 14px system-ui, sans-serif; margin: 24px; color: #1f2328; background: #fff; }}
main {{ display: flex; flex-wrap: wrap; gap: 20px; }} figure {{ margin: 0; }} figcaption {{ font-weight: 600; }}
text {{ font-size: 11px; fill: #57606a; }} .grid {{ stroke: #d8dee4; }} .line {{ fill: none; stroke-width: 1.6; }}
</style></head><body><h1>{html.escape(title)}</h1><main>
{drawn}
</main></body></html>
"""


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


def _svg(series: Sequence[Series]) -> str:
    steps = [step for one in series for step, _ in one.points]
    values = [value for one in series for _, value in one.points]
    first, last = min(steps), max(max(steps), min(steps) + 1)
    ticks = _ticks(min(values), max(values))
    low, high = ticks[0], ticks[-1]

    def x(step: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * (step - first) / (last - first), 1)

    def y(value: float) -> float:
        return round(_BOTTOM - (_BOTTOM - _TOP) * (value - low) / (high - low), 1)

    parts = []
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 4}" text-anchor="end">{tick:.4g}</text>')
    parts += [f'<text x="{x(s)}" y="{_BOTTOM + 16}" text-anchor="middle">{s:g}</text>' for s in (first, (first + last) // 2, last)]
    for colour, one in zip(_COLOURS, series, strict=False):
        path = "M" + "L".join(f"{x(step):g} {y(value):g}" for step, value in one.points)
        parts.append(f'<path class="line" stroke="{colour}" d="{path}"/>')
    if len(series) > 1:
        parts += [
            f'<text x="{_RIGHT - 60}" y="{_TOP + 14 * (i + 1)}" style="fill:{_COLOURS[i]}">{html.escape(one.name)}</text>'
            for i, one in enumerate(series)
        ]
    label = html.escape(", ".join(one.name for one in series))
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" aria-label="{label} over steps">{"".join(parts)}</svg>'


def _ticks(low: float, high: float) -> list[float]:
    """Returns about five round values that enclose both."""
    span = max(high - low, abs(high) * 1e-3, 1e-12)
    power = 10.0 ** math.floor(math.log10(span / 4))
    unit = next(power * m for m in (1, 2, 5, 10) if power * m >= span / 4)
    start, stop = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
    return [k * unit for k in range(start, max(stop, start + 1) + 1)]
