"""Seven tables of a clip for the work of three: one pass with shared media prefixes beside a pass of its own for every table.

Both sides are omni_jax on the same clips and weights. Ours runs each tower once and each media prefix once; the baseline embeds the tables
one after the other, so that every table re-runs the towers it needs, as the published extractor does. Operations are counted from the
batches that are timed, and again from batches of the 7B shape, whose towers weigh differently; the six-table figure leaves out `tva`, which
no direction uses. The embeddings of both sides are compared before anything is timed.

Run alone: python -m tools.benchmarks --only tables
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from omni_jax.config import TABLES, ModelConfig
from omni_jax.tokens.batching import Planner
from omni_jax.towers.work import FlopCount
from omni_jax.types import Features
from tools.benchmarks import mid_size
from tools.benchmarks.encoder_7b import shape_7b
from tools.benchmarks.forward_work import forward_work, total
from tools.benchmarks.timing import PAIRS, clock, interleave

CLIPS = 2
SIX = tuple(name for name in TABLES if name != "tva")  # those of the twelve directions
CASES = {"seven_tables": TABLES, "six_tables": SIX}
LARGEST_DIFFERENCE = 1e-5  # between unit rows


class Pass(mid_size.Ours):
    """All tables together, or one after the other."""

    def together(self, clips: Sequence[Features], tables: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns table -> (N, D) unit rows."""
        return {table: row / np.linalg.norm(row, axis=1, keepdims=True) for table, row in self.embed(clips, tables).items()}

    def apart(self, clips: Sequence[Features], tables: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns the same, each table in a pass of its own."""
        return {table: self.together(clips, (table,))[table] for table in tables}


def work(config: ModelConfig, clips: Sequence[Features], tables: Sequence[str]) -> tuple[FlopCount, FlopCount]:
    """Returns the operations of embedding the clips together and apart; nothing is computed and no weight is needed."""
    planner = Planner()

    def count(names: Sequence[str]) -> FlopCount:
        return total(forward_work(config, mid_size.batch(clips, names, config, planner)))

    return count(tables), sum((count((table,)) for table in tables), FlopCount())


def run(
    pairs: int = PAIRS, config: ModelConfig | None = None, clips: int = CLIPS, large: ModelConfig | None = None, **shapes: Any
) -> dict[str, Any]:
    """Returns shares of operations and ratios of times of both cases, and prints a line for each."""
    side = Pass(mid_size.random_encoder(config or mid_size.mid_config()))
    features = mid_size.synthetic_clips(side.config, clips, **shapes)
    large = large or shape_7b()
    results: dict[str, Any] = {}
    first = clock(lambda: [run(features, tables) for tables in CASES.values() for run in (side.together, side.apart)])
    print(f"first calls, compiling {len(side.runner.programs)} programs: {first:.1f} s, not counted below")
    together, apart = (run(features, TABLES) for run in (side.together, side.apart))
    results["difference"] = max(float(np.abs(together[table] - apart[table]).max()) for table in TABLES)
    print(f"largest difference between unit rows of the two: {results['difference']:.1e}")
    if not results["difference"] <= LARGEST_DIFFERENCE:
        raise AssertionError(f"more than {LARGEST_DIFFERENCE:.0e}; the two do not embed the same")
    for name, tables in CASES.items():
        here, there = work(side.config, features, tables), work(large, mid_size.synthetic_clips(large, clips, **shapes), tables)
        timed = interleave(
            lambda: side.together(features, tables),  # noqa: B023 (called before the next case)
            lambda: side.apart(features, tables),  # noqa: B023
            pairs,
        )
        ours, theirs = timed.seconds
        results[name] = {
            "ratio": timed.ratio,
            "seconds_per_clip": (ours / clips, theirs / clips),
            "gflop_per_clip": tuple(w.computed / clips / 1e9 for w in here),
            "share_of_operations": here[0].computed / here[1].computed,
            "share_of_operations_needed": here[0].needed / here[1].needed,
            "share_of_operations_7b": there[0].computed / there[1].computed,
        }
        found = results[name]
        print(
            f"{name}: {100 * found['share_of_operations']:.1f} % of the operations of separate passes (at the 7B shape "
            f"{100 * found['share_of_operations_7b']:.1f} %), {timed.ratio:.2f} times as fast (median of {pairs} interleaved pairs); "
            f"a clip takes {ours / clips:.2f} s and {theirs / clips:.2f} s",
            flush=True,
        )
    return results
