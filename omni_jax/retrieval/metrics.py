"""From ranks to R@K, NDCG@10, MRR and rank statistics, and from tables to the 12-direction result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from omni_jax.retrieval.directions import AVERAGES, averages, possible
from omni_jax.retrieval.ranks import Ranks, Vectors, prepare, rank_pair
from omni_jax.retrieval.statistics import LEVEL, RESAMPLES, HitCounts, intervals
from omni_jax.types import EmbeddingTable, InputError

TIES = ("optimistic", "average", "worst")
"""The place of an item among candidates of the same similarity: first (as published), in the middle, last."""

RECALL_AT = (1, 5, 10)
NDCG_AT = 10


@dataclasses.dataclass(frozen=True)
class FirstHitRanks:
    """The rank of the first relevant item of every query of one direction.

    Attributes:
      query: (Q,) int64, row of the query table; a query without a relevant item has no entry.
      place: (Q,) float64, from 1, halves where `average` falls between two places.
      item: (Q,) int64, row of the gallery at that rank.
      record: (Q,) int64, the query's record, as a position in `Scores.records`.
      gallery: rows of the gallery.
    """

    query: np.ndarray
    place: np.ndarray
    item: np.ndarray
    record: np.ndarray
    gallery: int


@dataclasses.dataclass(frozen=True)
class Scores:
    """A result with the places it was counted from.

    Attributes:
      result: what `evaluate` returns.
      places: by direction.
      records: names of the records: ids, row numbers where none were given, or the labels of `relevance`.
      rows: table name -> (N,) int64, record of every row, as a position in `records`.
    """

    result: dict[str, Any]
    places: dict[str, FirstHitRanks]
    records: tuple
    rows: dict[str, np.ndarray]

    @property
    def hit_counts(self) -> HitCounts:
        """Hits at place 1 per record, for intervals and comparisons."""
        return hit_counts(self.places, self.records)


def hit_counts(places: Mapping[str, FirstHitRanks], records: tuple) -> HitCounts:
    """Returns the hits at place 1, and the queries, of every record and direction."""
    size = len(records)
    hits = [np.bincount(p.record, weights=p.place <= 1, minlength=size) for p in places.values()]
    asked = [np.bincount(p.record, minlength=size).astype(np.float64) for p in places.values()]
    return HitCounts(records, tuple(places), np.stack(hits, axis=1), np.stack(asked, axis=1))


def positions(ranks: Ranks, ties: str = "optimistic") -> np.ndarray:
    """Returns the place of every relevant item, from 1: (P,) float64, halves where `average` falls between two places.

    Relevant items tied with one another take places of their own: with r relevant and m other candidates level and b better ones, the
    k-th of them has rank b + k, b + m + k, or b + k (r + m + 1) / (r + 1), its expected place under a random order.
    """
    _check_ties(ties)
    _, block, size = np.unique(np.stack([ranks.query, ranks.better]), axis=1, return_inverse=True, return_counts=True)
    block = block.reshape(-1)
    order = np.argsort(block, kind="stable")
    first = np.cumsum(size) - size
    k = np.empty(len(block))
    k[order] = np.arange(len(block)) - first[block[order]] + 1
    r = size[block]
    m = _others(ranks, r)
    if ties == "optimistic":
        return ranks.better + k
    if ties == "worst":
        return ranks.better + m + k
    return ranks.better + k * (r + m + 1) / (r + 1)


def direction_metrics(ranks: Ranks, ties: str = "optimistic") -> dict[str, float | int]:
    """Returns R@1/5/10, NDCG@10 and MRR (x 100), median and mean rank, and the number of queries that a tie decides.

    With several relevant items R@K asks for any of them in the top K, MRR and the ranks are those of the first, and NDCG is normalised by
    the ideal order (SPEC section 9). `ties` counts, whatever the policy, the queries with an irrelevant candidate exactly level with a
    relevant one. Queries without a relevant item are left out.
    """
    place = positions(ranks, ties)
    queries, first, number = np.unique(ranks.query, return_index=True, return_counts=True)
    best = np.minimum.reduceat(place, first)
    gain = np.where(place <= NDCG_AT, 1 / np.log2(place + 1), 0.0)
    ideal = np.cumsum(1 / np.log2(np.arange(1, NDCG_AT + 1) + 1))[np.minimum(number, NDCG_AT) - 1]
    _, block, size = np.unique(np.stack([ranks.query, ranks.better]), axis=1, return_inverse=True, return_counts=True)
    tied = ranks.query[_others(ranks, size[block.reshape(-1)]) > 0]
    result: dict[str, float | int] = {f"R@{k}": 100 * float(np.count_nonzero(best <= k)) / len(queries) for k in RECALL_AT}
    result |= {
        f"NDCG@{NDCG_AT}": 100 * float(np.mean(np.add.reduceat(gain, first) / ideal)),
        "MRR": 100 * float(np.mean(1 / best)),
        "median_rank": float(np.median(best)),
        "mean_rank": float(np.mean(best)),
        "ties": len(np.unique(tied)),
    }
    return result


def evaluate(
    tables: EmbeddingTable | Mapping[str, Any],
    *,
    ids: Sequence[str] | None = None,
    relevance: Mapping[str, Sequence] | None = None,
    ties: str = "optimistic",
    chunk: int | None = None,
    mesh: Mesh | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns the 12-direction result, ready for JSON.

    {"n", "tie_policy", "directions": {"t2v": {"R@1", "R@1_interval", "R@5", "R@10", "NDCG@10", "MRR", "median_rank", "mean_rank", "ties"},
    ...}, "AVG-single", "AVG-dual", "AVG-all", "intervals": {"AVG-single": [low, high], ...}, "bootstrap": {"level", "resamples", "seed"},
    "missing"}. A direction whose tables are absent is left out; an average that needs it is None, and `missing` says why.

    Args:
      tables: table name -> (N, D) embeddings, need not be normalised; row i of every table belongs to record i.
      ids: N record ids, for messages; those of an `EmbeddingTable` are taken.
      relevance: table name -> one label per row: a gallery row is relevant where its label equals the query's. Tables may then differ in
        their number of rows, "n" counts the different labels, and each direction says its "queries" and its "gallery".
      ties: "optimistic", "average" or "worst".
      chunk, mesh: as in `rank_pair`.
      resamples, seed: of the bootstrap intervals; 0 resamples leaves them out.

    Raises:
      InputError: for NaN, infinite or zero vectors (naming the rows), tables or ids that do not fit together, or no direction at all.
    """
    return score(tables, ids=ids, relevance=relevance, ties=ties, chunk=chunk, mesh=mesh, resamples=resamples, seed=seed).result


def score(
    tables: EmbeddingTable | Mapping[str, Any],
    *,
    ids: Sequence[str] | None = None,
    relevance: Mapping[str, Sequence] | None = None,
    ties: str = "optimistic",
    chunk: int | None = None,
    mesh: Mesh | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Scores:
    """Returns the result of `evaluate`, which has the same arguments, with the place of every query."""
    _check_ties(ties)
    if isinstance(tables, EmbeddingTable):
        if tables.own and relevance is None:
            relevance = {name: tables.ids_of(name) for name in tables.tables}
        # Row numbers are no ids: beside another result they would be taken for its records.
        tables, ids = tables.tables, tables.ids if relevance is None and tables.named else None
    wanted = possible(tables)
    if not wanted:
        raise InputError(
            f"no direction can be scored with the tables {', '.join(sorted(tables)) or '(none)'}; two of text, video, audio are needed"
        )
    used = sorted({name for pair in wanted.values() for name in pair})
    _check(tables, used, ids, relevance)
    vectors = {name: prepare(tables[name], name, ids) for name in used}

    records, record_of = _records(vectors, ids, relevance)

    found: dict[str, dict[str, Any]] = {}
    places: dict[str, FirstHitRanks] = {}
    for query, gallery in dict.fromkeys((min(pair), max(pair)) for pair in wanted.values()):
        labels = None if relevance is None else (relevance[query], relevance[gallery])
        forward, backward = rank_pair(vectors[query], vectors[gallery], labels, chunk=chunk, mesh=mesh)
        both = {(query, gallery): forward, (gallery, query): backward}
        for name, pair in wanted.items():
            if pair in both:
                found[name] = direction_metrics(both[pair], ties)
                places[name] = _places(both[pair], ties, record_of[pair[0]])
                if relevance is not None:
                    found[name] |= {"queries": len(places[name].query), "gallery": both[pair].gallery}
    places = {name: places[name] for name in wanted}
    means = averages({name: float(found[name]["R@1"]) for name in wanted})
    missing = {name: f"needs {', '.join(d for d in AVERAGES[name] if d not in wanted)}" for name, mean in means.items() if mean is None}
    result: dict[str, Any] = {"n": len(records), "tie_policy": ties, "directions": {name: found[name] for name in wanted}, **means}
    if resamples:
        spread = {name: list(pair) for name, pair in intervals(hit_counts(places, records), resamples=resamples, seed=seed).items()}
        for name in wanted:
            found[name]["R@1_interval"] = spread.pop(name)
        result |= {"intervals": spread, "bootstrap": {"level": LEVEL, "resamples": resamples, "seed": seed}}
    return Scores(result | {"missing": missing}, places, records, record_of)


def _records(
    vectors: Mapping[str, Vectors], ids: Sequence[str] | None, relevance: Mapping[str, Sequence] | None
) -> tuple[tuple, dict[str, np.ndarray]]:
    """Names of the records, and for every table the record of each row."""
    if relevance is None:
        rows = len(next(iter(vectors.values())).rows)
        return (tuple(ids) if ids is not None else tuple(range(rows))), dict.fromkeys(vectors, np.arange(rows))
    position = {
        label: i for i, label in enumerate(dict.fromkeys(label for name in vectors for label in np.asarray(relevance[name]).tolist()))
    }
    return tuple(position), {name: np.array([position[label] for label in np.asarray(relevance[name]).tolist()]) for name in vectors}


def _places(ranks: Ranks, ties: str, record_of: np.ndarray) -> FirstHitRanks:
    place = positions(ranks, ties)
    order = np.lexsort((place, ranks.query))
    query, first = np.unique(ranks.query[order], return_index=True)
    best = order[first]
    return FirstHitRanks(query, place[best], ranks.item[best], record_of[query], ranks.gallery)


def _others(ranks: Ranks, relevant: np.ndarray) -> np.ndarray:
    """Irrelevant candidates level with each relevant item, given how many relevant ones are level (itself included)."""
    return np.maximum(ranks.equal - (relevant - 1), 0)


def _check_ties(ties: str) -> None:
    if ties not in TIES:
        raise InputError(f"ties {ties!r} is unknown; choose one of {', '.join(TIES)}")


def _check(tables: Mapping[str, Any], used: Sequence[str], ids: Sequence[str] | None, relevance: Mapping[str, Sequence] | None) -> None:
    shapes = {name: np.shape(tables[name]) for name in used}
    bad = {name: shape for name, shape in shapes.items() if len(shape) != 2}
    if bad:
        raise InputError(f"tables must be (records, width): {_listed(bad)}")
    if len({shape[1] for shape in shapes.values()}) > 1:
        raise InputError(f"tables of different width cannot be compared: {_listed(shapes)}; embed them with one model")
    if relevance is not None:
        absent = [name for name in used if name not in relevance]
        if absent:
            raise InputError(f"relevance has no labels for {', '.join(absent)}; give one label per row of every table")
        return
    if len({shape[0] for shape in shapes.values()}) > 1:
        raise InputError(f"tables have different numbers of records: {_listed(shapes)}; row i must be record i in each")
    if ids is not None:
        rows = shapes[used[0]][0]
        if len(ids) != rows:
            raise InputError(f"{len(ids)} ids for {rows} rows; one id per row is needed")
        if len(set(ids)) != len(ids):
            seen: set[str] = set()
            twice = next(i for i in ids if i in seen or seen.add(i))
            raise InputError(f"id {twice!r} appears more than once; every record may be given once")


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())
