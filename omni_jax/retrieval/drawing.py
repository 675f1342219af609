"""Chart geometry: numbers in, coordinates of an SVG out. The templates draw them and know no arithmetic."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from omni_jax.retrieval.figures import Curve, Gap, Histogram


@dataclasses.dataclass(frozen=True)
class Tick:
    """A mark of an axis: its coordinate and its label."""

    at: float
    label: str


@dataclasses.dataclass(frozen=True)
class Bar:
    """A rectangle with the label of its place and its value."""

    x: float
    y: float
    width: float
    height: float
    label: str
    value: str


@dataclasses.dataclass(frozen=True)
class Line:
    """A named path; `colour` is a number from 0 that the style sheet turns into colour and dashes, -1 for the line of chance."""

    name: str
    path: str
    colour: int


@dataclasses.dataclass(frozen=True)
class Dot:
    """A named point with the ends of its interval, if it has one."""

    name: str
    x: float
    y: float
    colour: int
    low: float | None = None
    high: float | None = None
    value: str = ""


@dataclasses.dataclass(frozen=True)
class Chart:
    """One drawing of `width` x `height` units; the plot is within (left, top) and (right, bottom)."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: Sequence[Tick] = ()
    y_ticks: Sequence[Tick] = ()
    bars: Sequence[Bar] = ()
    lines: Sequence[Line] = ()
    dots: Sequence[Dot] = ()

    def x(self, share: float) -> float:
        """Returns the coordinate of a share of the plot's width, from the left."""
        return _round(self.left + (self.right - self.left) * share)

    def y(self, share: float) -> float:
        """Returns the coordinate of a share of the plot's height, from the bottom."""
        return _round(self.bottom - (self.bottom - self.top) * share)


def bars(histogram: Histogram) -> Chart:
    """Returns a bar chart of shares, its axis cut at the next tenth above the largest."""
    chart = Chart(260, 150, 30, 256, 14, 122)
    top_share = max(0.1, math.ceil(max(histogram.shares, default=0) * 10 - 1e-9) / 10)
    step, full = (chart.right - chart.left) / len(histogram.labels), chart.bottom - chart.top
    parts = [share / top_share for share in histogram.shares]
    drawn = [
        Bar(_round(chart.left + (i + 0.1) * step), chart.y(part), _round(step * 0.8), _round(full * part), label, f"{100 * share:.1f} %")
        for i, (label, share, part) in enumerate(zip(histogram.labels, histogram.shares, parts, strict=True))
    ]
    # Where the bar begins: the whole label of a wide bar would run into its neighbour's.
    marks = [Tick(_round(chart.left + (i + 0.5) * step), label.partition("-")[0]) for i, label in enumerate(histogram.labels)]
    levels = [Tick(chart.y(part), f"{100 * part * top_share:.0f}") for part in (0, 0.5, 1)]
    return dataclasses.replace(chart, x_ticks=marks, y_ticks=levels, bars=drawn)


def curves(named: Mapping[str, Curve]) -> Chart:
    """Returns recall over rank on a logarithmic axis, one line a direction, and the line of chance."""
    chart = Chart(560, 330, 40, 548, 12, 292)
    last = max(curve.ranks[-1] for curve in named.values())
    span = math.log10(max(last, 2))

    def path(ranks: Sequence[int], shares: Sequence[float]) -> str:
        points = [f"{chart.x(math.log10(rank) / span):g} {chart.y(share):g}" for rank, share in zip(ranks, shares, strict=True)]
        return "M" + "L".join(points) + (f"H{chart.right}" if len(points) == 1 else "")

    longest = max(named.values(), key=lambda curve: curve.ranks[-1])
    lines = [Line("chance", path(longest.ranks, longest.chance), -1)]
    lines += [Line(name, path(curve.ranks, curve.shares), i) for i, (name, curve) in enumerate(named.items())]
    ranks = [rank for power in range(7) for rank in (10**power, 2 * 10**power, 5 * 10**power) if rank <= last]
    if len(ranks) > 8:
        ranks = [rank for rank in ranks if str(rank)[0] == "1"]
    marks = [Tick(chart.x(math.log10(rank) / span), f"{rank:,}") for rank in ranks]
    levels = [Tick(chart.y(part), f"{100 * part:.0f}") for part in (0, 0.25, 0.5, 0.75, 1)]
    return dataclasses.replace(chart, x_ticks=marks, y_ticks=levels, lines=lines)


def overlap(gap: Gap) -> Chart:
    """Returns the two histograms of cosines as outlines: line 0 the random pairs, line 1 the relevant ones."""
    chart = Chart(260, 150, 8, 252, 10, 122)
    low, high = gap.edges[0], gap.edges[-1]
    peak = max(*gap.random, *gap.matched, 1e-9)

    def outline(shares: Sequence[float]) -> str:
        steps = "".join(f"V{chart.y(share / peak):g}H{chart.x((i + 1) / len(shares)):g}" for i, share in enumerate(shares))
        return f"M{chart.left} {chart.bottom}{steps}V{chart.bottom}Z"

    marks = [Tick(chart.x(part), f"{low + (high - low) * part:.2f}") for part in (0.06, 0.5, 0.94)]
    lines = [Line("random pairs", outline(gap.random), 0), Line("relevant pairs", outline(gap.matched), 1)]
    return dataclasses.replace(chart, x_ticks=marks, lines=lines)


def cloud(points: Mapping[str, np.ndarray]) -> Chart:
    """Returns a scatter plot with equal scales, one colour a table."""
    chart = Chart(560, 400, 10, 550, 10, 390)
    every = np.concatenate(list(points.values()))
    low, high = every.min(axis=0), every.max(axis=0)
    wide, tall = chart.right - chart.left, chart.bottom - chart.top
    scale = min((wide - 12) / max(high[0] - low[0], 1e-9), (tall - 12) / max(high[1] - low[1], 1e-9))
    middle = (low + high) / 2
    dots = [
        Dot(name, chart.x(0.5 + (x - middle[0]) * scale / wide), chart.y(0.5 + (y - middle[1]) * scale / tall), i)
        for i, (name, rows) in enumerate(points.items())
        for x, y in rows.tolist()
    ]
    return dataclasses.replace(chart, dots=dots)


def averages_chart(rows: Sequence[str], models: Sequence[tuple[str, Mapping[str, float | None], Mapping[str, Sequence[float]]]]) -> Chart:
    """Returns averages on a common axis: one row an average, one dot a model.

    Args:
      rows: names of the averages.
      models: (name, average -> R@1 in percent, average -> its interval), in the order of their colours.
    """
    top, line = 16, 56
    chart = Chart(560, top + line * len(rows) + 30, 92, 548, top, top + line * len(rows))
    ends = [v for _, values, spread in models for key in rows for v in (values.get(key), *spread.get(key, ())) if v is not None]
    low, high = math.floor(min(ends) / 5) * 5, math.ceil(max(ends) / 5) * 5
    high = max(high, low + 5)

    def across(value: float) -> float:
        return chart.x((value - low) / (high - low))

    dots = []
    for r, key in enumerate(rows):
        present = [
            (m, name, value, spread.get(key)) for m, (name, values, spread) in enumerate(models) if (value := values.get(key)) is not None
        ]
        for slot, (m, name, value, interval) in enumerate(present):
            y = top + line * r + 12 + (line - 24) * (slot + 0.5) / len(present)
            left, right = map(across, interval) if interval else (None, None)
            dots.append(Dot(name, across(value), _round(y), m, left, right, f"{value:.2f}"))
    step = next(s for s in (1, 2, 5, 10, 20) if (high - low) / s <= 10)
    marks = [Tick(across(v), f"{v}") for v in range(math.ceil(low / step) * step, high + 1, step)]
    levels = [Tick(top + line * (r + 0.5), key) for r, key in enumerate(rows)]
    return dataclasses.replace(chart, x_ticks=marks, y_ticks=levels, dots=dots)


def over_steps(named: Mapping[str, Sequence[tuple[float, float]]]) -> Chart:
    """Returns (step, value) points of a run, one line a metric; about five round values of the axis enclose them."""
    chart = Chart(520, 230, 58, 510, 12, 198)
    points = [point for one in named.values() for point in one]
    first = min(step for step, _ in points)
    last = max(*(step for step, _ in points), first + 1)
    levels = _round_values(min(value for _, value in points), max(value for _, value in points))

    def x(step: float) -> float:
        return chart.x((step - first) / (last - first))

    def y(value: float) -> float:
        return chart.y((value - levels[0]) / (levels[-1] - levels[0]))

    lines = [
        Line(name, "M" + "L".join(f"{x(step):g} {y(value):g}" for step, value in one), i) for i, (name, one) in enumerate(named.items())
    ]
    marks = [Tick(x(step), f"{step:g}") for step in (first, (first + last) // 2, last)]
    return dataclasses.replace(chart, x_ticks=marks, y_ticks=[Tick(y(v), f"{v:.4g}") for v in levels], lines=lines)


def _round_values(low: float, high: float) -> list[float]:
    """Returns about five round values that enclose both."""
    span = max(high - low, abs(high) * 1e-3, 1e-12)
    power = 10.0 ** math.floor(math.log10(span / 4))
    unit = next(power * m for m in (1, 2, 5, 10) if power * m >= span / 4)
    start, stop = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
    return [k * unit for k in range(start, max(stop, start + 1) + 1)]


def _round(value: float) -> float:
    return round(float(value), 1)
