"""Intervals and paired tests against brute force: every resample and every pattern of swaps written out on small cases."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from omni_jax.retrieval import compare, evaluate, format_differences, score
from omni_jax.retrieval.directions import AVERAGES, DIRECTIONS
from omni_jax.retrieval.metrics import FirstHitRanks, hit_counts
from omni_jax.retrieval.statistics import EXACT_RECORDS, HitCounts, intervals
from omni_jax.types import InputError
from tests.tolerances import TOLERANCES, assert_close

SINGLE = list(DIRECTIONS)[:6]


def one_query_each(hits: np.ndarray, directions: list[str]) -> HitCounts:
    return HitCounts(tuple(range(len(hits))), tuple(directions), hits.astype(float), np.ones(hits.shape))


def random_tally(rng: np.random.Generator, records: int, directions: list[str], several: bool) -> HitCounts:
    asked = rng.integers(0, 4, size=(records, len(directions))) if several else np.ones((records, len(directions)))
    asked[0] = 1  # every direction has a query
    return HitCounts(tuple(range(records)), tuple(directions), rng.binomial(asked.astype(int), 0.5).astype(float), asked.astype(float))


def figures(hits: np.ndarray, asked: np.ndarray, directions: list[str]) -> dict[str, float]:
    """R@1 of every direction and average, in percent, record by record; NaN where nothing was asked."""
    found = {}
    for k, name in enumerate(directions):
        found[name] = 100 * sum(hits[:, k]) / sum(asked[:, k]) if sum(asked[:, k]) else math.nan
    return found | {a: sum(found[d] for d in needed) / len(needed) for a, needed in AVERAGES.items() if set(needed) <= set(directions)}


# ------------------------------------------------------------------------------------------------------------------ intervals


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), records=st.integers(1, 5), several=st.booleans(), all_single=st.booleans())
def test_intervals_are_quantiles_of_all_resamples(seed: int, records: int, several: bool, all_single: bool) -> None:
    directions = SINGLE if all_single else ["t2v", "a2t"]
    case = random_tally(np.random.default_rng(seed), records, directions, several)
    every = [
        figures(case.hits[list(draw)], case.asked[list(draw)], directions) for draw in itertools.product(range(records), repeat=records)
    ]
    got = intervals(case, resamples=4000, seed=seed)
    assert set(got) == set(every[0])
    slack = TOLERANCES["resampled_probability"][1]
    for name, ends in got.items():
        values = np.array([resample[name] for resample in every])
        values = values[~np.isnan(values)]
        for end, wanted in zip(ends, (0.025, 0.975), strict=True):
            # The end of an interval of a few levels is a level, or between two neighbours: no more than `wanted` may lie below it.
            assert np.mean(values < end - 1e-9) <= wanted + slack and np.mean(values <= end + 1e-9) >= wanted - slack


def test_interval_of_many_records_is_that_of_the_normal_law() -> None:
    hits = np.zeros((4000, 1))
    hits[:1200] = 1
    low, high = intervals(one_query_each(hits, ["t2v"]))["t2v"]
    half = 100 * 1.959964 * math.sqrt(0.3 * 0.7 / 4000)
    assert_close([low, high], [30 - half, 30 + half], "interval_percent")


def test_average_knows_that_directions_share_their_records() -> None:
    """Six directions that always agree tell no more than one."""
    hits = np.random.default_rng(3).random((300, 1)) < 0.4
    alone = intervals(one_query_each(hits, ["t2v"]))["t2v"]
    together = intervals(one_query_each(np.repeat(hits, 6, axis=1), SINGLE))
    assert_close(together["AVG-single"], alone, "metric")


def test_seed_decides_and_nothing_else() -> None:
    case = random_tally(np.random.default_rng(1), 50, SINGLE, several=True)
    assert intervals(case, seed=4) == intervals(case, seed=4)
    assert intervals(case, seed=4) != intervals(case, seed=5)
    other = random_tally(np.random.default_rng(2), 50, SINGLE, several=False)
    same = HitCounts(other.records, other.directions, 1 - other.hits, other.asked)
    assert compare(other, same, seed=4) == compare(other, same, seed=4)


def test_nothing_that_varies_has_no_width() -> None:
    assert intervals(one_query_each(np.ones((20, 1)), ["t2v"])) == {"t2v": (100.0, 100.0)}
    assert intervals(one_query_each(np.zeros((1, 1)), ["t2v"])) == {"t2v": (0.0, 0.0)}


# ----------------------------------------------------------------------------------------------------------------- paired tests


def by_brute_force(first: HitCounts, second: HitCounts) -> dict[str, float]:
    """Share of all swaps of records whose difference is at least as large."""
    directions = list(first.directions)

    def differences(swap: tuple[bool, ...]) -> dict[str, float]:
        mask = np.array(swap)[:, None]
        a = figures(np.where(mask, second.hits, first.hits), first.asked, directions)
        b = figures(np.where(mask, first.hits, second.hits), first.asked, directions)
        return {name: a[name] - b[name] for name in a}

    observed = differences((False,) * len(first.records))
    every = [differences(swap) for swap in itertools.product((False, True), repeat=len(first.records))]
    return {name: sum(abs(d[name]) >= abs(value) - 1e-9 for d in every) / len(every) for name, value in observed.items()}


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), records=st.integers(1, 8), several=st.booleans(), all_single=st.booleans())
def test_p_values_are_those_of_every_swap(seed: int, records: int, several: bool, all_single: bool) -> None:
    rng = np.random.default_rng(seed)
    first = random_tally(rng, records, SINGLE if all_single else ["v2a"], several)
    second = HitCounts(first.records, first.directions, rng.binomial(first.asked.astype(int), 0.5).astype(float), first.asked)
    got = compare(first, second, resamples=50)
    want = by_brute_force(first, second)
    assert set(got) == set(want)
    assert_close([got[name].p for name in want], list(want.values()), "metric")
    a, b = (figures(side.hits, side.asked, list(side.directions)) for side in (first, second))
    assert_close([got[name].difference for name in want], [a[name] - b[name] for name in want], "metric")


@pytest.mark.parametrize(("gained", "lost"), [(12, 5), (20, 20), (30, 2), (9, 6)])
def test_random_swaps_come_near_mcnemar(gained: int, lost: int) -> None:
    hits = np.zeros((200, 2))
    hits[:gained, 0] = 1
    hits[gained : gained + lost, 1] = 1
    hits[100:150] = 1
    assert gained + lost > EXACT_RECORDS
    got = compare(one_query_each(hits[:, :1], ["t2v"]), one_query_each(hits[:, 1:], ["t2v"]))["t2v"]
    n, k = gained + lost, max(gained, lost)
    exact = min(Fraction(1), 2 * Fraction(sum(math.comb(n, i) for i in range(k, n + 1)), 2**n))
    assert_close(got.p, float(exact), "resampled_probability")
    assert_close(got.difference, (gained - lost) / 2, "metric")
    assert got.p_holm == got.p and got.p >= 1 / 10_001


def test_p_values_of_equal_models_are_spread_evenly() -> None:
    """Two results that differ by chance alone: about one in ten p-values lies below 0.1."""
    rng = np.random.default_rng(0)
    found = [
        compare(*(one_query_each(rng.random((60, 1)) < 0.5, ["t2v"]) for _ in range(2)), resamples=2, permutations=500)["t2v"].p
        for _ in range(300)
    ]
    assert 0.04 <= np.mean(np.array(found) <= 0.1) <= 0.16


def test_holm_by_hand() -> None:
    """Records 0..k-1 of direction k differ, all one way: p = 2 / 2^k."""
    directions = ["t2v", "v2t", "t2a"]
    hits = np.zeros((10, 3))
    for column, size in enumerate((2, 7, 6)):
        hits[:size, column] = 1
    got = compare(one_query_each(hits, directions), one_query_each(np.zeros((10, 3)), directions))
    assert_close([got[d].p for d in directions], [1 / 2, 1 / 64, 1 / 32], "metric")
    assert_close([got[d].p_holm for d in directions], [1 / 2, 3 / 64, 2 / 32], "metric")


def test_records_are_paired_by_name_and_directions_by_both() -> None:
    rng = np.random.default_rng(5)
    first, second = (one_query_each(rng.random((30, 6)) < chance, SINGLE) for chance in (0.3, 0.6))
    order = rng.permutation(30)
    shuffled = HitCounts(tuple(order.tolist()), ("a2t", "t2v", "t2av"), second.hits[order][:, [3, 0, 1]], second.asked[:, :3])
    got, want = compare(first, shuffled), compare(first, second)
    assert list(got) == ["t2v", "a2t"] and "AVG-single" in want
    assert_close([got[d].difference for d in got], [want[d].difference for d in got], "metric")
    for other, words in (
        (one_query_each(second.hits[:29], SINGLE), "30 and 29 records, 29 is in the first only"),
        (one_query_each(second.hits, list(DIRECTIONS)[6:]), "a direction that both sides have"),
        (HitCounts(second.records, second.directions, second.hits, 2 * second.asked), "the same queries"),
    ):
        with pytest.raises(InputError, match=words):
            compare(first, other)


# ------------------------------------------------------------------------------------------------------------- within a result


@pytest.mark.jit
def test_result_gains_intervals_around_its_figures() -> None:
    rng = np.random.default_rng(7)
    shared = rng.normal(size=(80, 8))
    tables = {name: (shared + rng.normal(size=shared.shape)).astype(np.float32) for name in ("text", "video", "audio", "av", "tv", "at")}
    result = evaluate(tables)
    spread = {name: metrics["R@1_interval"] for name, metrics in result["directions"].items()} | result["intervals"]
    values = {name: metrics["R@1"] for name, metrics in result["directions"].items()} | {name: result[name] for name in AVERAGES}
    assert list(spread) == list(values)
    assert all(low < values[name] < high for name, (low, high) in spread.items())
    assert result["bootstrap"] == {"level": 0.95, "resamples": 2000, "seed": 0}
    assert evaluate(tables) == result and evaluate(tables, seed=1)["intervals"] != result["intervals"]
    plain = evaluate(tables, resamples=0)
    assert "intervals" not in plain and "R@1_interval" not in plain["directions"]["t2v"]


@pytest.mark.jit
def test_several_captions_of_a_clip_are_drawn_together() -> None:
    text = np.array([[1, 0], [2, 0.1], [0.1, 1], [0, 1]], np.float32)
    audio = np.array([[1, 0.02], [0.02, 1]], np.float32)
    scores = score({"text": text, "audio": audio}, relevance={"text": ["x", "x", "x", "y"], "audio": ["x", "y"]})
    assert set(scores.records) == {"x", "y"}
    x, y = scores.records.index("x"), scores.records.index("y")
    column = scores.hit_counts.directions.index("t2a")
    assert scores.hit_counts.asked[[x, y], column].tolist() == [3, 1] and scores.hit_counts.hits[[x, y], column].tolist() == [2, 1]
    assert scores.places["t2a"].place.tolist() == [1, 1, 2, 1] and scores.places["t2a"].item.tolist() == [0, 0, 0, 1]
    # Draws of {x, x}, {x, y}, {y, y}: rates 2/3, 3/4, 1.
    assert_close(scores.result["directions"]["t2a"]["R@1_interval"], [200 / 3, 100.0], "metric")


def test_places_between_two_are_no_hit() -> None:
    places = FirstHitRanks(np.arange(3), np.array([1.0, 1.5, 2.0]), np.arange(3), np.arange(3), 3)
    assert hit_counts({"t2v": places}, ("a", "b", "c")).hits[:, 0].tolist() == [1, 0, 0]


def test_printed_differences_by_hand() -> None:
    hits = np.zeros((10, 1))
    hits[:6] = 1
    found = compare(one_query_each(hits, ["t2v"]), one_query_each(np.zeros((10, 1)), ["t2v"]))
    lines = format_differences("a.npz", "b.npz", found).splitlines()
    assert lines[0] == "a.npz less b.npz, percentage points:"
    assert lines[1].split() == ["R@1", "difference", "95", "%", "p", "p", "(Holm)"]
    assert lines[3].split() == ["t2v", "+60.00", "+30.00", "to", "+90.00", "0.031", "0.031"]
    assert lines[-1].endswith("corrected for the number of directions (1).")
