"""The numbers behind the report's charts: rank histograms, recall curves, hubness, modality gap, and the queries worth looking at.

Letters: N records, Q queries, M gallery rows, D width, k neighbours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from omni_jax.retrieval.directions import DIRECTIONS
from omni_jax.retrieval.metrics import FirstHitRanks, Scores
from omni_jax.retrieval.rows import l2_normalize
from omni_jax.retrieval.search import search

STUDIED = 4096  # queries whose neighbours are looked at; more are sampled, so that a report costs O(STUDIED * M)
NEIGHBOURS = 10
SHOWN = 3  # neighbours named in the gallery
SEED = 0  # of all samples
EXTREMES = 8  # best queries, and worst queries, of a direction
PAIRS = 2000  # pairs whose cosines are drawn
POINTS = 150  # rows of a table in the scatter plot
COSINE_BINS = 40

RANK_EDGES = (1, 5, 10, 50, 100, 500)  # a bar holds the ranks above the edge before it, up to its own
HUB_EDGES = (0, 1, 2, 5, 10, 20, 50)


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Shares (0 to 1) of `labels`."""

    labels: tuple[str, ...]
    shares: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Curve:
    """Share of queries (0 to 1) whose relevant item has one of the first `ranks`, and what a random order would give."""

    ranks: tuple[int, ...]
    shares: tuple[float, ...]
    chance: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Hubness:
    """How unevenly the gallery is returned.

    Attributes:
      k: neighbours counted.
      queries: queries studied.
      histogram: of the k-occurrence, the number of queries that have a gallery row among their k nearest.
      skewness: of the k-occurrence; 0 for an even spread, above about 1 where a few hubs answer everything.
      never: share of rows that are among no query's k nearest.
      hubs: (record, k-occurrence) of the most returned rows.
    """

    k: int
    queries: int
    histogram: Histogram
    skewness: float
    never: float
    hubs: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class Gap:
    """How far apart two tables lie as clouds.

    Attributes:
      edges: (COSINE_BINS + 1,) of the cosine.
      matched, random: shares of relevant pairs, and of pairs drawn at random, per bin.
      matched_mean, random_mean: mean cosines.
      centroids: distance between the mean unit vectors.
    """

    edges: tuple[float, ...]
    matched: tuple[float, ...]
    random: tuple[float, ...]
    matched_mean: float
    random_mean: float
    centroids: float


@dataclasses.dataclass(frozen=True)
class Neighbour:
    """A gallery row near a query."""

    record: str
    cosine: float
    relevant: bool


@dataclasses.dataclass(frozen=True)
class Example:
    """One query worth looking at.

    Attributes:
      kind: "best" or "worst".
      record: the query's record.
      place: of its first relevant item, from 1.
      cosine: of that item.
      margin: that cosine less the best one of another record.
      neighbours: the nearest gallery rows, best first.
    """

    direction: str
    kind: str
    record: str
    place: float
    cosine: float
    margin: float
    neighbours: tuple[Neighbour, ...]


def rank_histogram(places: FirstHitRanks) -> Histogram:
    """Returns the shares of queries by place of their first relevant item; halves count with the place above them."""
    edges = [edge for edge in RANK_EDGES if edge < places.gallery] + [places.gallery]
    return _histogram(np.ceil(places.place), edges, 0)


def recall_curve(places: FirstHitRanks, points: int = 48) -> Curve:
    """Returns the cumulative recall at up to `points` ranks, evenly spread over the logarithm."""
    ranks = np.unique(np.geomspace(1, places.gallery, points).round().astype(int))
    shares = np.searchsorted(np.sort(places.place), ranks, side="right") / len(places.place)
    return Curve(tuple(ranks.tolist()), tuple(shares.tolist()), tuple((ranks / places.gallery).tolist()))


def hubness_and_examples(tables: Mapping[str, np.ndarray], scores: Scores, direction: str) -> tuple[Hubness, list[Example]]:
    """Returns the hubness of a direction, and its `shown` best and worst queries.

    Best: found first, by the largest margin. Worst: by the lowest place, then the smallest margin. With more than STUDIED queries
    both come from a seeded sample, to which the worst places are added.
    """
    query_table, gallery_table = DIRECTIONS[direction]
    queries, gallery = tables[query_table], tables[gallery_table]
    places = scores.places[direction]
    gallery_record = scores.rows[gallery_table]
    rng = np.random.default_rng(SEED)
    sample = np.sort(rng.permutation(len(places.query))[:STUDIED])
    low = np.argsort(-places.place, kind="stable")[:EXTREMES]
    studied = np.union1d(sample, low)
    wanted = min(max(NEIGHBOURS, SHOWN) + 1, len(gallery))
    cosines, items = search(queries[places.query[studied]], gallery, wanted, name=gallery_table)

    k = max(1, min(NEIGHBOURS, len(gallery) // 10))  # more would count every row of a small gallery for everyone
    counts = np.bincount(items[np.isin(studied, sample), :k].reshape(-1), minlength=len(gallery))
    hubs = np.argsort(-counts, kind="stable")[:5]
    hubness = Hubness(
        k,
        len(sample),
        _histogram(counts, [edge for edge in HUB_EDGES if edge < counts.max()] + [int(counts.max())], -1),
        _skewness(counts),
        float(np.mean(counts == 0)),
        tuple((str(scores.records[gallery_record[i]]), int(counts[i])) for i in hubs if counts[i]),
    )

    own = gallery_record[items] == places.record[studied][:, None]
    found = l2_normalize(queries[places.query[studied]]), l2_normalize(gallery[places.item[studied]])
    cosine = np.sum(found[0] * found[1], axis=1)
    rival = np.where(own, -np.inf, cosines).max(axis=1)
    margin = cosine - np.where(np.isfinite(rival), rival, cosine)
    place = places.place[studied]
    examples = []
    for kind, order in (("best", np.lexsort((-margin, place))), ("worst", np.lexsort((margin, -place)))):
        for i in order[: min(EXTREMES, max(1, len(order) // 2))].tolist():  # a query is not among the best and the worst at once
            near = [
                Neighbour(str(scores.records[gallery_record[item]]), float(level), bool(mine))
                for item, level, mine in zip(items[i, :SHOWN], cosines[i, :SHOWN], own[i, :SHOWN], strict=True)
            ]
            record = str(scores.records[places.record[studied[i]]])
            examples.append(Example(direction, kind, record, float(place[i]), float(cosine[i]), float(margin[i]), tuple(near)))
    return hubness, examples


def modality_gap(tables: Mapping[str, np.ndarray], scores: Scores, direction: str) -> Gap:
    """Returns the cosines of relevant and of random pairs, and the distance between the two tables' centres."""
    query_table, gallery_table = DIRECTIONS[direction]
    queries, gallery = tables[query_table], tables[gallery_table]
    places = scores.places[direction]
    rng = np.random.default_rng(SEED)
    chosen = rng.permutation(len(places.query))[:PAIRS]
    other = rng.integers(len(gallery), size=len(chosen))
    q = l2_normalize(queries[places.query[chosen]])
    matched = np.sum(q * l2_normalize(gallery[places.item[chosen]]), axis=1)
    apart = scores.rows[gallery_table][other] != places.record[chosen]
    random = np.sum(q * l2_normalize(gallery[other]), axis=1)[apart]
    low = float(min(matched.min(), random.min(initial=1.0)))
    high = float(max(matched.max(), random.max(initial=-1.0)))
    edges = np.linspace(low, max(high, low + 1e-3), COSINE_BINS + 1)
    shares = [np.histogram(values, edges)[0] / max(len(values), 1) for values in (matched, random)]
    return Gap(
        tuple(edges.tolist()),
        tuple(shares[0].tolist()),
        tuple(shares[1].tolist()),
        float(matched.mean()),
        float(random.mean()) if len(random) else float("nan"),
        float(np.linalg.norm(_centre(queries, rng) - _centre(gallery, rng))),
    )


def scatter(tables: Mapping[str, np.ndarray], names: list[str]) -> tuple[dict[str, np.ndarray], tuple[float, float]]:
    """Returns up to POINTS unit rows of each table on their two common principal axes, (P, 2) each, and the shares of variance there."""
    rng = np.random.default_rng(SEED)
    rows = [l2_normalize(tables[name][np.sort(rng.permutation(len(tables[name]))[:POINTS])]) for name in names]
    every = np.concatenate(rows).astype(np.float64)
    every -= every.mean(axis=0)
    left, size, _ = np.linalg.svd(every, full_matrices=False)
    size = np.pad(size, (0, max(0, 2 - len(size))))
    flat = np.pad(left[:, :2] * size[: min(2, left.shape[1])], ((0, 0), (0, max(0, 2 - left.shape[1]))))
    total = max(float((size**2).sum()), 1e-30)
    ends = np.cumsum([len(part) for part in rows])[:-1]
    shares = (float(size[0] ** 2 / total), float(size[1] ** 2 / total))
    return dict(zip(names, np.split(flat, ends), strict=True)), shares


def _centre(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return l2_normalize(rows[np.sort(rng.permutation(len(rows))[:PAIRS])]).mean(axis=0)


def _histogram(values: np.ndarray, edges: list[int], below: int) -> Histogram:
    """Shares of values in (below, edges[0]], (edges[0], edges[1]] ..."""
    counts = np.diff(np.searchsorted(np.sort(values), [below, *edges], side="right"))
    starts = [below + 1, *(edge + 1 for edge in edges[:-1])]
    labels = tuple(str(end) if start == end else f"{start}-{end}" for start, end in zip(starts, edges, strict=True))
    return Histogram(labels, tuple((counts / max(len(values), 1)).tolist()))


def _skewness(counts: np.ndarray) -> float:
    spread = counts.std()
    return float(np.mean((counts - counts.mean()) ** 3) / spread**3) if spread > 0 else 0.0
