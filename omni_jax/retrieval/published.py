"""Published results (arXiv 2605.26641, as SPEC section 9 lists them), in the shape of `evaluate`; R@1 in percent."""

from __future__ import annotations

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
"""The 12 directions over the 3,782 records of OmniRetriever-Bench. Only the cells that are known stand here."""

OMNIRETRIEVER_BENCH_RECORDS = 3782

OTHER_BENCHMARKS: dict[str, dict[str, float]] = {
    "clotho": {"t2a": 19.14, "a2t": 16.1},
    "sounddescs": {"t2a": 25.00, "a2t": 20.7},
    "msrvtt": {"t2v": 47.9},
    "msvd": {"t2v": 65.6},
    "didemo": {"t2v": 45.1},
    "vatex": {"t2v": 58.7},
}
"""R@1 of OmniRetriever-7B on other benchmarks, by direction."""


def published(benchmark: str = BENCH) -> dict[str, dict[str, Any]]:
    """Returns the published rows of a benchmark by heading, in the shape of `evaluate`; "n", the gallery, where it is known.

    Raises:
      InputError: for a benchmark without published rows.
    """
    if benchmark == BENCH:
        return {f"{name} (published)": {**row, "n": OMNIRETRIEVER_BENCH_RECORDS} for name, row in OMNIRETRIEVER_BENCH.items()}
    if benchmark not in OTHER_BENCHMARKS:
        raise InputError(f"nothing published is known for {benchmark!r}; choose one of {', '.join((BENCH, *OTHER_BENCHMARKS))}")
    return {"OmniRetriever-7B (published)": {"directions": {name: {"R@1": r1} for name, r1 in OTHER_BENCHMARKS[benchmark].items()}}}
