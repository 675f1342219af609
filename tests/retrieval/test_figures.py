"""The numbers behind the report's charts, against sorting every candidate and counting by hand."""

from __future__ import annotations

import numpy as np
import pytest

from omni_jax.retrieval import figures, score
from omni_jax.retrieval.metrics import FirstHitRanks
from omni_jax.retrieval.rows import l2_normalize
from tests.tolerances import assert_close

pytestmark = pytest.mark.jit

TABLES = ("text", "video", "audio", "av", "tv", "at")


def places_of(values: list[float], gallery: int) -> FirstHitRanks:
    rows = np.arange(len(values))
    return FirstHitRanks(rows, np.array(values, float), rows, rows, gallery)


@pytest.fixture(scope="module")
def tables() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    shared = rng.normal(size=(90, 12))
    return {name: (shared + 1.2 * rng.normal(size=shared.shape)).astype(np.float32) for name in TABLES}


def test_rank_histogram_and_recall_by_hand() -> None:
    places = places_of([1, 1, 1.5, 3, 5, 6, 40, 120, 700, 2], 1000)
    found = figures.rank_histogram(places)
    assert found.labels == ("1", "2-5", "6-10", "11-50", "51-100", "101-500", "501-1000")
    assert_close(found.shares, [0.2, 0.4, 0.1, 0.1, 0.0, 0.1, 0.1], "metric")
    curve = figures.recall_curve(places)
    assert curve.ranks[0] == 1 and curve.ranks[-1] == 1000 and len(curve.ranks) <= 48
    recall = dict(zip(curve.ranks, curve.shares, strict=True))
    assert_close([recall[1], recall[2], recall[1000]], [0.2, 0.4, 1.0], "metric")
    assert_close(curve.chance[0], 0.001, "metric")
    assert figures.rank_histogram(places_of([1], 1)).labels == ("1",)
    assert figures.rank_histogram(places_of([1, 2], 2)).labels == ("1", "2")


def test_hubness_counts_who_is_returned(tables: dict[str, np.ndarray]) -> None:
    scores = score(tables, resamples=0)
    hubness, _ = figures.hubness_and_examples(tables, scores, "v2a")
    products = l2_normalize(tables["video"]) @ l2_normalize(tables["audio"]).T
    k = 9  # a tenth of the gallery
    counts = np.zeros(90, int)
    for row in products:
        counts[np.argsort(-row, kind="stable")[:k]] += 1
    assert (hubness.k, hubness.queries) == (k, 90)
    assert_close(hubness.never, np.mean(counts == 0), "metric")
    assert_close(hubness.skewness, np.mean((counts - counts.mean()) ** 3) / counts.std() ** 3, "metric")
    assert hubness.hubs[0][1] == counts.max() and hubness.hubs[0][0] == str(int(np.argmax(counts)))
    assert_close(sum(hubness.histogram.shares), 1.0, "metric")


def test_best_and_worst_queries_are_the_ends_of_the_ranking(tables: dict[str, np.ndarray]) -> None:
    scores = score(tables, resamples=0, ids=[f"r{i}" for i in range(90)])
    _, examples = figures.hubness_and_examples(tables, scores, "t2av")
    best, worst = ([e for e in examples if e.kind == kind] for kind in ("best", "worst"))
    assert len(best) == len(worst) == figures.EXTREMES
    place = scores.places["t2av"].place
    assert [e.place for e in worst] == sorted(place.tolist(), reverse=True)[: len(worst)]
    assert [e.place for e in best] == sorted(place.tolist())[: len(best)]
    products = l2_normalize(tables["text"]) @ l2_normalize(tables["av"]).T
    for e in examples:
        i = int(e.record[1:])
        assert e.place == place[i]
        order = np.argsort(-products[i])
        assert [n.record for n in e.neighbours] == [f"r{j}" for j in order[: figures.SHOWN]]
        assert [n.relevant for n in e.neighbours] == [j == i for j in order[: figures.SHOWN]]
        assert_close([e.cosine, e.margin], [products[i, i], products[i, i] - np.delete(products[i], i).max()], "cosine_shown")
    assert [e.margin for e in best] == sorted((e.margin for e in best), reverse=True)


def test_sample_of_many_queries_still_holds_the_worst(tables: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "STUDIED", 20)
    scores = score(tables, resamples=0)
    hubness, examples = figures.hubness_and_examples(tables, scores, "a2t")
    assert hubness.queries == 20
    assert max(e.place for e in examples) == scores.places["a2t"].place.max()
    assert examples == figures.hubness_and_examples(tables, scores, "a2t")[1]


def test_small_sets_show_no_query_twice() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 6):
        tables = {name: rng.normal(size=(n, 5)).astype(np.float32) for name in ("text", "video")}
        hubness, examples = figures.hubness_and_examples(tables, score(tables, resamples=0), "t2v")
        assert hubness.k == 1 and len({e.record for e in examples}) == (1 if n == 1 else len(examples))
        gap = figures.modality_gap(tables, score(tables, resamples=0), "t2v")
        assert np.isfinite(gap.matched_mean) and (n == 1 or np.isfinite(gap.centroids))


def test_modality_gap_of_two_clouds() -> None:
    rng = np.random.default_rng(1)
    one = np.array([[1.0, 0, 0]]) + 0.01 * rng.normal(size=(400, 3))
    other = np.array([[0, 1.0, 0]]) + 0.01 * rng.normal(size=(400, 3))
    tables = {"text": one.astype(np.float32), "video": other.astype(np.float32)}
    gap = figures.modality_gap(tables, score(tables, resamples=0), "t2v")
    assert_close([gap.centroids, gap.matched_mean, gap.random_mean], [2**0.5, 0.0, 0.0], "cloud")
    assert_close([sum(gap.matched), sum(gap.random)], [1.0, 1.0], "metric")
    points, shares = figures.scatter(tables, ["text", "video"])
    assert points["text"].shape == points["video"].shape == (figures.POINTS, 2)
    assert shares[0] > 0.95 and abs(points["text"][:, 0].mean() - points["video"][:, 0].mean()) > 1


def test_several_captions_share_a_record() -> None:
    text = np.array([[1, 0], [2, 0.1], [0.1, 1], [0, 1]], np.float32)
    tables = {"text": text, "audio": np.array([[1, 0.02], [0.02, 1]], np.float32)}
    scores = score(tables, relevance={"text": ["x", "x", "x", "y"], "audio": ["x", "y"]}, resamples=0)
    _, examples = figures.hubness_and_examples(tables, scores, "t2a")
    worst = next(e for e in examples if e.kind == "worst")
    assert (worst.record, worst.place, worst.neighbours[0].record, worst.neighbours[0].relevant) == ("x", 2.0, "y", False)
