"""Training curves: which rows become which points, and a page a browser can read alone."""

from __future__ import annotations

import json
import math
import re
from xml.etree import ElementTree

from omni_jax.api.training_curves import curves_page, read_rows, read_series


def test_points_are_ordered_finite_and_taken_from_the_last_row_of_a_step():
    rows = [
        {"step": 2, "loss": 3.0},
        {"step": 1, "loss": 4.0},
        {"step": 3, "loss": math.nan},
        {"step": 2, "loss": 2.5},
        {"loss": 9.0},
        {"step": 4, "loss": "low"},
    ]
    assert read_series(rows, ["loss", "L_A"]) == {"loss": ((1, 4.0), (2, 2.5))}


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + '\n[3]\n{"step": 2, "lo')
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def test_the_page_draws_falling_values_lower_and_names_every_line():
    rows = [{"step": s, "loss": 5.0 - s, "L_T": 1.0, "L_A": 2.0 + s} for s in range(4)]
    page = curves_page(rows, "a <run>")
    assert "a &lt;run&gt;" in page and "<run>" not in page
    drawings = [ElementTree.fromstring(svg) for svg in re.findall(r'<svg class="chart".*?</svg>', page, re.S)]
    assert [d.get("aria-label") for d in drawings] == ["loss over steps", "L_T, L_A over steps"]
    (path,) = drawings[0].iter("path")
    heights = [float(point.split()[1]) for point in path.get("d")[1:].split("L")]
    assert len(heights) == 4 and heights == sorted(heights)  # y grows downwards
    assert not re.search(r"https?://|src=|href=", page)


def test_constant_and_single_values_can_be_drawn():
    page = curves_page([{"step": 5, "loss": 0.0, "learning_rate": 1e-9}], "one")
    assert page.count('<svg class="chart"') == 2 and "nan" not in page.lower()
