"""Metrics by hand, tie policies, the twelve directions and their averages, and tables that are refused."""

from __future__ import annotations

import json
import math

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import Mesh

from omni_jax.retrieval import AVERAGES, DIRECTIONS, evaluate, score
from omni_jax.retrieval.directions import averages
from omni_jax.retrieval.metrics import direction_metrics, positions
from omni_jax.retrieval.ranks import Ranks
from omni_jax.types import EmbeddingTable, InputError
from tests.retrieval import naive
from tests.tolerances import assert_close

TABLES = ("text", "video", "audio", "av", "tv", "at")
SPOKEN = {  # written out, not taken from the code
    "t2v": ("text", "video"),
    "v2t": ("video", "text"),
    "t2a": ("text", "audio"),
    "a2t": ("audio", "text"),
    "v2a": ("video", "audio"),
    "a2v": ("audio", "video"),
    "t2av": ("text", "av"),
    "av2t": ("av", "text"),
    "a2tv": ("audio", "tv"),
    "tv2a": ("tv", "audio"),
    "v2at": ("video", "at"),
    "at2v": ("at", "video"),
}


def diagonal(better: list[int], equal: list[int]) -> Ranks:
    rows = np.arange(len(better))
    return Ranks(len(rows), 100, rows, rows, np.array(better), np.array(equal))


def from_scores(scores: np.ndarray, relevant: np.ndarray) -> Ranks:
    labels = [(i, j) for i, j in zip(*np.nonzero(relevant), strict=True)]
    better = [int((scores[i] > scores[i, j]).sum()) for i, j in labels]
    equal = [int((scores[i] == scores[i, j]).sum()) - 1 for i, j in labels]
    query, item = np.array(labels).T
    queries, gallery = scores.shape
    return Ranks(queries, gallery, query, item, np.array(better), np.array(equal))


def test_one_relevant_item_by_hand() -> None:
    got = direction_metrics(diagonal([0, 4, 9, 20], [0, 0, 0, 0]))  # places 1, 5, 10, 21
    assert_close([got["R@1"], got["R@5"], got["R@10"]], [25.0, 50.0, 75.0], "metric")
    assert_close(got["MRR"], 100 * (1 + 1 / 5 + 1 / 10 + 1 / 21) / 4, "metric")
    assert_close(got["NDCG@10"], 100 * (1 + 1 / math.log2(6) + 1 / math.log2(11)) / 4, "metric")
    assert_close([got["median_rank"], got["mean_rank"], got["ties"]], [7.5, 9.25, 0], "metric")


def test_tie_policies_by_hand() -> None:
    ranks = diagonal([0, 0, 3], [0, 4, 2])  # places 1, 1..5, 4..6
    assert positions(ranks, "optimistic").tolist() == [1, 1, 4]
    assert positions(ranks, "average").tolist() == [1, 3, 5]
    assert positions(ranks, "worst").tolist() == [1, 5, 6]
    assert [direction_metrics(ranks, ties)["ties"] for ties in ("optimistic", "average", "worst")] == [2, 2, 2]
    assert_close(direction_metrics(ranks, "worst")["R@5"], 100 * 2 / 3, "metric")


def test_several_relevant_items_by_hand() -> None:
    # One query, relevant items at places 2, 3 and 12; another with one relevant item at place 1.
    ranks = Ranks(2, 20, np.array([0, 0, 0, 1]), np.array([0, 1, 2, 3]), np.array([1, 2, 11, 0]), np.zeros(4, int))
    got = direction_metrics(ranks)
    ideal = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    assert_close(got["NDCG@10"], 100 * ((1 / math.log2(3) + 1 / math.log2(4)) / ideal + 1) / 2, "metric")
    assert_close([got["R@1"], got["R@5"], got["MRR"], got["median_rank"]], [50.0, 100.0, 75.0, 1.5], "metric")


def test_ideal_order_has_ten_places_at_most() -> None:
    rows = np.arange(15)
    ranks = Ranks(1, 15, np.zeros(15, int), rows, rows, np.zeros(15, int))  # fifteen relevant items in the first fifteen places
    assert_close(direction_metrics(ranks)["NDCG@10"], 100.0, "metric")


def test_relevant_items_level_with_one_another_are_no_tie() -> None:
    got = from_scores(np.array([[1.0, 1.0, 0.5]]), np.array([[True, True, False]]))
    assert positions(got, "worst").tolist() == [1, 2]
    assert direction_metrics(got)["ties"] == 0


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1), m=st.integers(1, 8), levels=st.integers(1, 4), ties=st.sampled_from(["optimistic", "average", "worst"])
)
def test_positions_are_those_of_sorting_every_order(seed: int, m: int, levels: int, ties: str) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(levels, size=(3, m)).astype(float)
    relevant = rng.random((3, m)) < 0.5
    relevant[:, 0] = True
    ranks = from_scores(scores, relevant)
    got = positions(ranks, ties)
    for i in range(3):
        want = naive.positions(scores[i].tolist(), relevant[i].tolist(), ties)
        assert_close(np.sort(got[ranks.query == i]), np.sort(want), "metric")
    tied = [i for i in range(3) if any(scores[i, j] == scores[i, k] for j in range(m) for k in range(m) if relevant[i, j] > relevant[i, k])]
    assert direction_metrics(ranks, ties)["ties"] == len(tied)


@pytest.fixture(scope="module")
def tables() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(11)
    shared = rng.normal(size=(60, 6))
    noise = dict(zip(TABLES, (0.2, 0.5, 0.9, 0.4, 0.7, 1.3), strict=True))
    return {name: (shared + noise[name] * rng.normal(size=shared.shape)).astype(np.float32) for name in TABLES}


@pytest.mark.jit
def test_every_direction_is_its_own_and_never_its_transpose(tables: dict[str, np.ndarray]) -> None:
    result = evaluate(tables, chunk=8)
    assert list(result["directions"]) == list(SPOKEN) == list(DIRECTIONS)
    mean_ranks = {}
    for name, (query, gallery) in SPOKEN.items():
        scores = naive.cosines(tables[query], tables[gallery])
        places = np.array([1 + (row > row[i]).sum() for i, row in enumerate(scores)])
        got = result["directions"][name]
        assert_close([got["R@1"], got["mean_rank"]], [100 * (places == 1).mean(), places.mean()], "metric")
        mean_ranks[name] = got["mean_rank"]
    assert len(set(mean_ranks.values())) == 12, "the fixture must tell all directions apart"


def test_averages_come_out_to_the_last_digit() -> None:
    single = {"t2v": 31.07, "v2t": 29.93, "t2a": 12.11, "a2t": 11.92, "v2a": 25.46, "a2v": 24.01}
    dual = {"t2av": 45.5, "av2t": 44.25, "a2tv": 30.125, "tv2a": 31.0, "v2at": 50.0, "at2v": 49.0}
    got = averages({**single, **dual})
    assert got == {"AVG-single": 134.5 / 6, "AVG-dual": 249.875 / 6, "AVG-all": 384.375 / 12}
    assert averages(single) == {"AVG-single": 134.5 / 6, "AVG-dual": None, "AVG-all": None}


@pytest.mark.jit
def test_result_has_the_documented_shape(tables: dict[str, np.ndarray]) -> None:
    result = json.loads(json.dumps(evaluate(tables), allow_nan=False))
    assert set(result) == {"n", "tie_policy", "directions", "missing", "intervals", "bootstrap", *AVERAGES}
    assert result["n"] == 60 and result["tie_policy"] == "optimistic" and result["missing"] == {}
    for metrics in result["directions"].values():
        assert set(metrics) == {"R@1", "R@5", "R@10", "NDCG@10", "MRR", "median_rank", "mean_rank", "ties", "R@1_interval"}
    r1 = {name: metrics["R@1"] for name, metrics in result["directions"].items()}
    assert_close(result["AVG-all"], sum(r1.values()) / 12, "metric")
    assert_close(result["AVG-dual"], sum(r1[name] for name in list(SPOKEN)[6:]) / 6, "metric")


@pytest.mark.jit
def test_devices_and_chunks_do_not_change_the_result(tables: dict[str, np.ndarray]) -> None:
    one = evaluate(tables)
    assert evaluate(tables, mesh=Mesh(np.array(jax.devices()), ("rows",))) == one
    assert evaluate(tables, chunk=8, mesh=Mesh(np.array(jax.devices()), ("rows",))) == one


@pytest.mark.jit
def test_absent_tables_leave_out_directions_and_averages(tables: dict[str, np.ndarray]) -> None:
    result = evaluate({name: tables[name] for name in ("text", "video", "audio", "av")})
    assert list(result["directions"]) == ["t2v", "v2t", "t2a", "a2t", "v2a", "a2v", "t2av", "av2t"]
    assert result["AVG-single"] is not None and result["AVG-dual"] is None and result["AVG-all"] is None
    assert result["missing"] == {"AVG-dual": "needs a2tv, tv2a, v2at, at2v", "AVG-all": "needs a2tv, tv2a, v2at, at2v"}
    with pytest.raises(InputError, match="no direction"):
        evaluate({"text": tables["text"], "tva": tables["text"]})


@pytest.mark.jit
@pytest.mark.parametrize("n", [1, 2, 75])
def test_constant_embeddings_are_all_ties(n: int) -> None:
    constant = np.tile(np.random.default_rng(0).normal(size=(1, 33)).astype(np.float32), (n, 1))
    for ties, r1 in (("optimistic", 100.0), ("average", 100.0 if n == 1 else 0.0), ("worst", 100.0 if n == 1 else 0.0)):
        result = evaluate(dict.fromkeys(TABLES, constant), ties=ties)
        assert result["AVG-all"] == r1
        assert all(metrics["ties"] == (n if n > 1 else 0) for metrics in result["directions"].values())


@pytest.mark.jit
def test_one_record_is_found() -> None:
    result = evaluate({"text": np.ones((1, 3)), "video": -np.ones((1, 3))})
    assert result["n"] == 1 and result["directions"]["t2v"]["R@1"] == 100 and result["directions"]["v2t"]["mean_rank"] == 1


@pytest.mark.jit
def test_many_to_many_counts_queries_and_gallery() -> None:
    # Two clips, captions c0 c1 c2 of clip 0 and c3 of clip 1; c2 lies nearer to clip 1.
    text = np.array([[1, 0], [2, 0.1], [0.1, 1], [0, 1]], np.float32)
    audio = np.array([[1, 0.02], [0.02, 1]], np.float32)
    result = evaluate({"text": text, "audio": audio}, relevance={"text": ["x", "x", "x", "y"], "audio": ["x", "y"]})
    assert result["n"] == 2
    t2a, a2t = result["directions"]["t2a"], result["directions"]["a2t"]
    assert (t2a["R@1"], t2a["queries"], t2a["gallery"]) == (75.0, 4, 2)
    assert (a2t["queries"], a2t["gallery"]) == (2, 4)
    assert a2t["R@1"] == 100.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t["video"].__setitem__((3, 2), np.nan), r"table 'video': 1 rows hold NaN or infinity: 3 \(id3\)"),
        (lambda t: t["at"].__setitem__(0, np.inf), r"table 'at': 1 rows hold NaN or infinity: 0 \(id0\)"),
        (lambda t: t["audio"].__setitem__(slice(4, 6), 0), r"table 'audio': 2 rows hold only zeros: 4 \(id4\), 5 \(id5\)"),
        (lambda t: t.update(av=t["av"][:-1]), "different numbers of records"),
        (lambda t: t.update(av=t["av"][:, :-1]), "different width"),
        (lambda t: t.update(av=t["av"][0]), "must be"),
    ],
)
def test_bad_tables_are_refused(tables: dict[str, np.ndarray], change, words: str) -> None:
    mine = {name: rows.copy() for name, rows in tables.items()}
    change(mine)
    with pytest.raises(InputError, match=words):
        evaluate(mine, ids=[f"id{i}" for i in range(60)])


def test_ids_and_policies_that_do_not_fit_are_refused(tables: dict[str, np.ndarray]) -> None:
    with pytest.raises(InputError, match="59 ids for 60 rows"):
        evaluate(EmbeddingTable(tuple(map(str, range(59))), tables))
    with pytest.raises(InputError, match="id 'a' appears more than once"):
        evaluate(tables, ids=["a", *map(str, range(58)), "a"])
    with pytest.raises(InputError, match="ties 'kind'"):
        evaluate(tables, ties="kind")
    with pytest.raises(InputError, match="no labels for"):
        evaluate(tables, relevance={"text": list(range(60))})


@pytest.mark.jit
def test_row_numbers_are_no_ids() -> None:
    rows = np.eye(3, dtype=np.float32)
    without = EmbeddingTable(("0", "1", "2"), {"text": rows, "video": rows}, named=False)
    assert score(without, resamples=0).records == (0, 1, 2)
    with_ids = EmbeddingTable(("0", "1", "2"), {"text": rows, "video": rows})
    assert score(with_ids, resamples=0).records == ("0", "1", "2")
