"""docs/reports/training_cost.md: every figure counted by hand there, read out of the page, against the code. Valid tokens only."""

from __future__ import annotations

import re

import pytest

from omni_jax.planning.step_flops import ClipCounts, RowCounts, StepFlops, clip_flops
from omni_jax.towers import NAMES
from omni_jax.train import LossConfig, TrainableConfig
from omni_jax.train.trainable import select
from tests.model.builders import SEVEN_B
from tests.repository import ROOT
from tests.tolerances import assert_close
from tools.training_cost import ClipSizes, mean, per_triple, released_per_triple, total

PAGE = (ROOT / "docs/reports/training_cost.md").read_text()
BY_HAND = PAGE.split("## By hand, at 7B\n")[1].split("\n## ")[0]
SIZES, LOSSES = ClipSizes(), LossConfig()
MEDIA = {"a tuple": "anchor", "audio alone": "audio", "video alone": "video", "text alone": "text"}
RUNS = ("release", 'ours, `negatives="micro"`', 'ours, `negatives="global"`')


def tables() -> dict[str, dict[str, list[str]]]:
    """Returns first heading -> first cell -> the other cells, of the tables counted by hand."""
    found: dict[str, dict[str, list[str]]] = {}
    rows: dict[str, list[str]] = {}
    before = ""
    for line in BY_HAND.splitlines():
        if line.startswith("|"):
            first, *rest = (cell.strip() for cell in line.strip("|").split("|"))
            if not before.startswith("|"):
                rows = found[first] = {}
            elif not first.startswith("---"):
                rows[first] = rest
        before = line
    return found


TABLES = tables()


def counted(run: str, remat: str) -> list[StepFlops]:
    """Returns the counts of the three step kinds."""
    if run == "release":
        return released_per_triple(SEVEN_B, SIZES, LOSSES, remat=remat)
    return per_triple(SEVEN_B, SIZES, LOSSES, remat=remat, cached="global" in run)


def forward(name: str, whole: bool = True) -> float:
    """Returns the decoder's operations of one prompt; without `whole`, those of the last layer for its last token."""
    tokens = SIZES.prompt(name)
    pairs = tokens * (tokens + 1) // 2
    rows = RowCounts(tokens, pairs, tokens, pairs) if whole else RowCounts(tokens, pairs, 1, tokens)
    counts = ClipCounts(towers={}, bridged=0, with_gradient=RowCounts(), without_gradient=rows)
    return clip_flops(SEVEN_B, counts, select(SEVEN_B, TrainableConfig()))["decoder"].forward


def number(pattern: str) -> float:
    """Returns the one number that the page has at a place."""
    (found,) = re.findall(pattern, " ".join(BY_HAND.split()))
    return float(found)


def test_the_page_has_these_tables():
    assert TABLES.keys() == {"forward of", "TFLOP per triple, remat `layer`", "TFLOP per triple, remat `none`"}
    assert TABLES["forward of"].keys() == {*MEDIA, "the three towers, once"}
    for remat in ("layer", "none"):
        assert tuple(TABLES[f"TFLOP per triple, remat `{remat}`"]) == RUNS


@pytest.mark.parametrize("remat", ["layer", "none"])
@pytest.mark.parametrize("run", RUNS)
def test_operations_of_a_step(run: str, remat: str):
    steps = [total(one) / 1e12 for one in counted(run, remat)]
    wanted = [float(cell) for cell in TABLES[f"TFLOP per triple, remat `{remat}`"][run]]
    assert len(wanted) == 4
    for page, got in zip(wanted, [*steps, sum(steps) / 3], strict=True):
        assert_close(page, got, "hand_count")


def test_forwards():
    for row, name in MEDIA.items():
        tokens, whole, ours = TABLES["forward of"][row]
        assert int(tokens) == SIZES.prompt(name)
        assert_close(float(whole), forward(name) / 1e12, "hand_count")
        assert_close(float(ours), forward(name, whole=False) / 1e12, "hand_count")
    saved = number(r"rest of the last layer \(([\d.]+) of a tuple's 8\.71")
    assert_close(saved, (forward("anchor") - forward("anchor", whole=False)) / 1e12, "hand_count")
    step = counted('ours, `negatives="micro"`', "layer")[0]
    towers = sum(step[tower].forward for tower in NAMES) / 1e12
    assert_close(float(TABLES["forward of"]["the three towers, once"][1]), towers / 2, "hand_count")
    assert_close(number(r"augmented copy: ([\d.]+) TFLOP"), towers, "hand_count")


def test_figures_in_the_text():
    one, seen = (forward("anchor") - forward("text")) / (660 - 40), 4 * 3584 * 28
    assert_close(
        number(r"A token costs 2 x 28 x 233\.3 M = ([\d.]+) GFLOP"), (one - seen * (660 * 661 - 40 * 41) / 2 / 620) / 1e9, "hand_count"
    )
    assert_close(number(r"4 x 3584 x 28 = ([\d.]+) MFLOP"), seen / 1e6, "hand_count")
    step = counted("release", "layer")[1]
    assert_close(number(r"\+ 5\.36 \+ 3\.42 = (\d+)\."), total(step) / 1e12, "hand_count")
    decoder = counted("release", "layer")[1]["decoder"]
    with_gradient = decoder.forward - forward("anchor") - forward("audio")  # the hard negative and what is not active take none
    again = decoder.recomputed / with_gradient
    assert_close(number(r"its last product, (\d+) % of a forward"), 100 * again, "hand_count")
    assert_close(number(r"costs ([\d.]+) forwards, a hard negative one"), 2 + again, "hand_count")


def test_shares_in_the_text():
    means = {(run, remat): total(mean(counted(run, remat))) / 1e12 for run in RUNS[:2] for remat in ("layer", "none")}
    saved = {remat: f"{100 * (1 - means[RUNS[1], remat] / means['release', remat]):.0f}" for remat in ("layer", "none")}
    assert f"thus {saved['layer']} % (remat `layer`) or {saved['none']} % (`none`)" in BY_HAND
    could = 109 * 3600 * 989e12 / 1e6 / 1e12  # TFLOP a triple
    least, most = (f"{100 * means['release', remat] / could:.0f}" for remat in ("none", "layer"))
    assert f"{least} to {most} % of the cards' 989 TFLOP/s" in BY_HAND
