"""One result as a self-contained HTML page: its contents, and the page's text. The templates beside this file draw it.

Nothing in the page asks a network: style, script, pictures and sounds are inside, and its content security policy allows nothing else. What
people wrote (captions, ids, file names) is escaped by the template engine, and would not run if it were not: the policy admits one script,
by its hash.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from omni_jax.retrieval import drawing, figures
from omni_jax.retrieval.directions import AVERAGES, DIRECTIONS, DUAL, SINGLE
from omni_jax.retrieval.metrics import Scores
from omni_jax.retrieval.statistics import Difference
from omni_jax.retrieval.table import POLICY, chance

TEMPLATES = Path(__file__).parent / "templates"
MEDIA_BYTES = 12_000_000  # of pictures and sounds in one page, as base64 characters
CAPTION_LENGTH, NEIGHBOUR_LENGTH = 500, 160  # characters shown
MODELS_DRAWN = 6  # colours of the style sheet
COMPARABLE = 0.1  # galleries whose sizes differ by more than this share are not drawn on one axis

WORDS = {"text": "text", "video": "video", "audio": "audio", "av": "audio + video", "tv": "text + video", "at": "audio + text"}
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class Clip:
    """What can be seen and heard of a record: encoded bytes with their media types, or None."""

    image: bytes | None = None
    sound: bytes | None = None
    image_type: str = "image/jpeg"
    sound_type: str = "audio/mpeg"


@dataclasses.dataclass(frozen=True)
class Other:
    """A result to compare with: a published one, or another file with the differences it leaves (ours less its own)."""

    name: str
    result: Mapping[str, Any]
    published: bool = False
    differences: Mapping[str, Difference] | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """A result with everything that is drawn of it.

    Attributes:
      name: of the embedding file.
      scores: the result and its places.
      others: results beside it.
      histograms, curves, hubness, gaps: by direction.
      examples: the best and the worst queries.
      points: table -> (P, 2), with the shares of variance of the two axes.
    """

    name: str
    scores: Scores
    others: Sequence[Other]
    histograms: Mapping[str, figures.Histogram]
    curves: Mapping[str, figures.Curve]
    hubness: Mapping[str, figures.Hubness]
    gaps: Mapping[str, figures.Gap]
    examples: Sequence[figures.Example]
    points: tuple[Mapping[str, np.ndarray], tuple[float, float]]

    @property
    def records(self) -> tuple[str, ...]:
        """Records that the page shows, the most informative first: queries from the outermost in, then what they found."""
        queries = [example.record for example in self.examples]
        number = max((sum(e.direction == d and e.kind == "worst" for e in self.examples) for d in DIRECTIONS), default=1) or 1
        outermost = [queries[i] for start in range(number) for i in range(start, len(queries), number)]
        found = [example.neighbours[0].record for example in self.examples if example.neighbours]
        return tuple(dict.fromkeys([*outermost, *found]))


def build_report(name: str, tables: Mapping[str, np.ndarray], scores: Scores, others: Sequence[Other] = ()) -> Report:
    """Returns the report of a result.

    Args:
      name: of the embedding file, as a heading.
      tables: table name -> (N, D), those that were scored.
      scores: from `score` over the same tables.
      others: results to show beside it.
    """
    names = list(scores.places)
    closer = {direction: figures.hubness_and_examples(tables, scores, direction) for direction in names}
    used = [table for table in WORDS if table in {side for direction in names for side in DIRECTIONS[direction]}]
    return Report(
        name,
        scores,
        tuple(others),
        {direction: figures.rank_histogram(scores.places[direction]) for direction in names},
        {direction: figures.recall_curve(scores.places[direction]) for direction in names},
        {direction: hubness for direction, (hubness, _) in closer.items()},
        {direction: figures.modality_gap(tables, scores, direction) for direction in _one_way(names)},
        [example for _, examples in closer.values() for example in examples],
        figures.scatter(tables, used),
    )


def render(
    report: Report,
    captions: Mapping[str, str] | None = None,
    clips: Mapping[str, Clip] | None = None,
    *,
    notes: Sequence[str] = (),
    version: str = "",
) -> str:
    """Returns the page.

    Args:
      captions: record -> caption; records without one show their id alone.
      clips: record -> picture and sound; those beyond MEDIA_BYTES in all are left out, in the order of `report.records`.
      notes: lines for the foot of the page, such as media that could not be read.
      version: of the program.
    """
    media, left_out = _media(report, clips or {})
    shown = {near.record for example in report.examples for near in example.neighbours} | set(report.records)
    if left_out:
        notes = [*notes, f"{left_out} clips are not in the page, to keep its media under {MEDIA_BYTES / 1e6:.0f} MB."]
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            result=report.scores.result,
            heat=_heat(report),
            comparison=_comparison(report),
            averages_chart=_averages_chart(report),
            histogram_charts={name: drawing.bars(found) for name, found in report.histograms.items()},
            hub_charts={name: drawing.bars(found.histogram) for name, found in report.hubness.items()},
            gap_charts={name: drawing.overlap(found) for name, found in report.gaps.items()},
            curve_charts=_curve_charts(report),
            cloud=drawing.cloud(report.points[0]),
            ties=_ties(report),
            gallery_examples={name: [e for e in report.examples if e.direction == name] for name in report.histograms},
            captions={record: clean(text) for record, text in (captions or {}).items() if record in shown},
            clip_number={record: number for number, record in enumerate(media)},
            media={str(number): found for number, found in enumerate(media.values())},
            notes=notes,
            version=version,
            script=Markup(script),
            policy=f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; media-src data:; "
            "base-uri 'none'; form-action 'none'",
        )
    )


def clean(text: str) -> str:
    """Returns the text with characters that no page may hold, lone surrogates among them, replaced by U+FFFD."""
    return UNPRINTABLE.sub("\ufffd", text)


def direction_label(direction: str) -> str:
    """Returns a direction in words: text to audio + video."""
    query, gallery = DIRECTIONS[direction]
    return f"{WORDS[query]} to {WORDS[gallery]}"


def environment() -> jinja2.Environment:
    """Returns the templates of this package, which escape what they are given."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "direction_label": direction_label,
        "clean": clean,
        "chance": chance,
        "place": lambda value: f"{value:,.0f}" if value == int(value) else f"{value:,.1f}",
        "cut": lambda text, length: text if len(text) <= length else text[: length - 1].rstrip() + "\u2026",
        "percent": lambda share: f"{100 * share:.1f}",
    }
    environment.globals |= {
        "WORDS": WORDS,
        "DIRECTIONS": DIRECTIONS,
        "AVERAGES": AVERAGES,
        "CAPTION_LENGTH": CAPTION_LENGTH,
        "NEIGHBOUR_LENGTH": NEIGHBOUR_LENGTH,
    }
    return environment


def _one_way(directions: Sequence[str]) -> list[str]:
    """The first direction of each pair of tables: a gap is the same from both sides."""
    return list({frozenset(DIRECTIONS[name]): name for name in reversed(directions)}.values())[::-1]


def _heat(report: Report) -> dict[str, Any]:
    """The matrix of R@1: tables as rows (queries) and columns (galleries), cells with their strength of colour."""
    directions = report.scores.result["directions"]
    sides = [table for table in WORDS if any(table in DIRECTIONS[name] for name in directions)]
    by_pair = {DIRECTIONS[name]: name for name in directions}
    top = max([metrics["R@1"] for metrics in directions.values()]) or 1.0
    cells = {
        pair: {"name": name, "value": directions[name]["R@1"], "strength": round(0.06 + 0.84 * directions[name]["R@1"] / top, 3)}
        for pair, name in by_pair.items()
    }
    return {"sides": sides, "cells": cells}


def _comparison(report: Report) -> dict[str, Any]:
    """Names of the columns (averages, then directions that some other result knows) and one row a model."""
    ours = report.scores.result
    known = [
        name
        for name in (*AVERAGES, *DIRECTIONS)
        if _value(ours, name) is not None or any(_value(other.result, name) is not None for other in report.others)
    ]
    columns = [name for name in known if name in AVERAGES or any(_value(other.result, name) is not None for other in report.others)]
    own: dict[str, Any] = {name: _value(ours, name) for name in columns}
    rows = [{"name": report.name, "own": True, "values": own, "published": False, "n": ours["n"], "differences": None}]
    rows += [
        {
            "name": other.name,
            "own": False,
            "values": {name: _value(other.result, name) for name in columns},
            "published": other.published,
            "n": other.result.get("n"),
            "differences": other.differences,
        }
        for other in report.others
    ]
    return {"columns": columns, "rows": rows, "tested": [row for row in rows if row["differences"]]}


def _value(result: Mapping[str, Any], name: str) -> float | None:
    return result.get(name) if name in AVERAGES else result["directions"].get(name, {}).get("R@1")


def _averages_chart(report: Report) -> dict[str, Any] | None:
    """The chart of averages beside those of others, and its legend; None where our result has no average."""
    ours = report.scores.result
    rows = [name for name in AVERAGES if ours.get(name) is not None]
    if not rows:
        return None
    models = [(report.name, {k: ours[k] for k in rows}, ours.get("intervals", {}))]
    # Those compared by name come before the published ones when the colours run out.
    near = [other for other in report.others if abs(other.result.get("n", ours["n"]) - ours["n"]) <= COMPARABLE * ours["n"]]
    near = sorted(near, key=lambda other: other.published)[: MODELS_DRAWN - 1]
    models += [(other.name, other.result, other.result.get("intervals", {})) for other in near]
    return {"chart": drawing.averages_chart(rows, models), "legend": [(f"c{i}", name) for i, (name, _, _) in enumerate(models)]}


def _curve_charts(report: Report) -> list[dict[str, Any]]:
    groups = (("Single", SINGLE), ("Dual", DUAL))
    found = [(title, {name: report.curves[name] for name in group if name in report.curves}) for title, group in groups]
    return [
        {
            "title": title,
            "chart": drawing.curves(named),
            "legend": [*((f"c{i}", name) for i, name in enumerate(named)), ("chance", "random order")],
        }
        for title, named in found
        if named
    ]


def _ties(report: Report) -> dict[str, Any]:
    result = report.scores.result
    queries = sum(len(places.query) for places in report.scores.places.values())
    tied = sum(int(metrics["ties"]) for metrics in result["directions"].values())
    return {"tied": tied, "queries": queries, "policy": POLICY[result["tie_policy"]], "optimistic": result["tie_policy"] == "optimistic"}


def _media(report: Report, clips: Mapping[str, Clip]) -> tuple[dict[str, dict[str, str]], int]:
    """Record -> data URIs, as far as MEDIA_BYTES reach, and how many records were left out."""
    found: dict[str, dict[str, str]] = {}
    budget, left_out = MEDIA_BYTES, 0
    for record in report.records:
        clip = clips.get(record)
        if clip is None or (clip.image is None and clip.sound is None):
            continue
        parts = {"image": (clip.image, clip.image_type), "sound": (clip.sound, clip.sound_type)}
        uris = {key: f"data:{kind};base64,{base64.b64encode(data).decode()}" for key, (data, kind) in parts.items() if data is not None}
        size = sum(map(len, uris.values()))
        if size > budget:
            left_out += 1
            continue
        budget -= size
        found[record] = uris
    return found, left_out
