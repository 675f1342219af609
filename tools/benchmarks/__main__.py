"""Runs the benchmarks and prints ratios: python -m tools.benchmarks [--only NAME] [--pairs N] [--json FILE].

Ratios are the other side's time over ours (above one, we are faster): medians over interleaved pairs of one run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from pathlib import Path

BENCHMARKS = ("encoder_mid", "train_mid", "tables", "ranking", "conversion_memory", "embed_memory", "media", "engines", "starts", "serving")
TIMED = ("encoder_mid", "train_mid", "tables", "ranking", "media", "engines", "starts")  # those that take --pairs


def main(arguments: list[str] | None = None) -> None:
    """Runs the chosen benchmarks one after the other."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=BENCHMARKS, help="run this one alone")
    parser.add_argument("--pairs", type=int, help="interleaved pairs per ratio (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    chosen = parser.parse_args(arguments)
    if hasattr(os, "sched_setaffinity"):
        # XLA takes a thread per core it may use; torch is told the same number.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    print(f"load of the machine at the start: {os.getloadavg()[0]:.1f}")
    results = {}
    for name in (chosen.only,) if chosen.only else BENCHMARKS:
        print(f"== {name}", flush=True)
        options = {"pairs": chosen.pairs} if chosen.pairs and name in TIMED else {}
        results[name] = importlib.import_module(f"tools.benchmarks.{name}").run(**options)
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
