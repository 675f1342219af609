"""Published results in the shape of `evaluate`, each with its source; R@1 in percent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omni_jax.types import InputError

BENCH = "omniretriever"

OMNIRETRIEVER_BENCH: dict[str, dict[str, Any]] = {
    "WAVE-7B frozen": {"directions": {}, "AVG-single": 19.27, "AVG-dual": 31.37, "AVG-all": 25.32},
    "Omni-Embed-Nemotron-3B": {"directions": {}, "AVG-single": 21.79, "AVG-dual": 31.84, "AVG-all": 26.81},
    "Gemini Embedding 2": {
        "directions": {"a2t": {"R@1": 1.48}, "v2a": {"R@1": 13.80}},
        "AVG-single": 25.44,
        "AVG-dual": 40.80,
        "AVG-all": 33.12,
    },
    "OmniRetriever-7B": {
        "directions": {"a2t": {"R@1": 11.92}, "v2a": {"R@1": 25.46}},
        "AVG-single": 28.63,
        "AVG-dual": 41.05,
        "AVG-all": 34.84,
    },
}
"""The 12 directions over the 3,782 records of OmniRetriever-Bench. Only the known cells."""

OMNIRETRIEVER_BENCH_RECORDS = 3782

PAPER = "arXiv 2605.26641"
README = "README of github.com/yunzeliu/Omni-Retriever at 762ca7d6"
LEADERBOARD = "a third-party leaderboard seen in 2026; how it was measured is not known"
USERS = "an independent group, 3,030 clips, reported in 2026; the direction is not stated and taken as t2v"
MTEB = "mteb 2.20 (August 2026), reported by its users"

OTHER_BENCHMARKS: dict[str, dict[str, tuple[str, dict[str, float]]]] = {
    "clotho": {
        "OmniRetriever-7B": (PAPER, {"t2a": 19.14, "a2t": 16.1}),
        "Omni-Embed-Nemotron-3B": (README, {"t2a": 6.4, "a2t": 3.5}),
        "Gemini Embedding 2": (README, {"t2a": 5.2, "a2t": 1.3}),
        "OmniRetriever-7B, mteb": (MTEB, {"t2a": 15.67}),
    },
    "sounddescs": {
        "OmniRetriever-7B": (PAPER, {"t2a": 25.00, "a2t": 20.7}),
        "Omni-Embed-Nemotron-3B": (README, {"t2a": 6.4, "a2t": 4.8}),
        "Gemini Embedding 2": (README, {"t2a": 7.0, "a2t": 7.4}),
    },
    "youcook2": {
        "OmniRetriever-7B": (USERS, {"t2v": 22.41}),
        "OmniRetriever-7B, fine-tuned on YouCook2": (USERS, {"t2v": 35.64}),
    },
    **{
        benchmark: {
            "OmniRetriever-7B": (PAPER, {"t2v": paper}),
            "Omni-Embed-Nemotron-3B": (README, {"t2v": nemotron}),
            "Gemini Embedding 2": (README, {"t2v": gemini}),
            "OmniRetriever-7B, leaderboard": (LEADERBOARD, {"t2v": leaderboard}),
        }
        for benchmark, paper, nemotron, gemini, leaderboard in (
            ("msrvtt", 47.9, 35.8, 53.9, 47.6),
            ("msvd", 65.6, 55.8, 77.1, 66.88),
            ("didemo", 45.1, 41.9, 55.6, 46.03),
            ("vatex", 58.7, 47.5, 69.4, 57.98),
        )
    },
}
"""Other benchmarks: model -> (source, R@1 by direction)."""


def published(benchmark: str = BENCH) -> dict[str, dict[str, Any]]:
    """Returns the published rows of a benchmark by heading, in the shape of `evaluate`; "source" is where each was published, "n" the
    gallery where it is known.

    Raises:
      InputError: for a benchmark without published rows.
    """
    if benchmark == BENCH:
        extra = {"n": OMNIRETRIEVER_BENCH_RECORDS, "source": PAPER}
        return {f"{name} (published)": {**row, **extra} for name, row in OMNIRETRIEVER_BENCH.items()}
    if benchmark not in OTHER_BENCHMARKS:
        raise InputError(f"nothing published is known for {benchmark!r}; choose one of {', '.join((BENCH, *OTHER_BENCHMARKS))}")
    return {
        f"{name} (published)": {"directions": {direction: {"R@1": r1} for direction, r1 in cells.items()}, "source": source}
        for name, (source, cells) in OTHER_BENCHMARKS[benchmark].items()
    }


def sources(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns one line a source that rows of `published` name: which models it gave figures of."""
    models: dict[str, list[str]] = {}
    for name, row in rows.items():
        models.setdefault(row["source"], []).append(name.removesuffix(" (published)"))
    return "\n".join(f"Published: {', '.join(names)}: {source}." for source, names in models.items())
