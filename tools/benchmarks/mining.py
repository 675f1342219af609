"""Time, memory and what is found of `omni-jax mine`'s search, exact and by FAISS, on tables with planted negatives.

Of each group of three records one has a near miss, which should be found, and a twin of the same caption, which should not. Every case runs
in a process of its own: its peak is that of the kernel's counter, set back before the mining, less what the tables hold.

Run alone, and write the table of the documentation: python -m tools.benchmarks.mining --write docs/guides/hard_negatives.md
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.retrieval.mining import MiningConfig, mine
from omni_jax.types import EmbeddingTable
from tools.benchmarks.process_memory import alone, forget_peak, status

BEGIN, END = "<!-- mining table -->", "<!-- end of the mining table -->"
CASES = (("exact", 100_000, 64), ("faiss", 100_000, 64), ("faiss", 1_000_000, 64))
HEAD = ("search", "rows", "width", "seconds", "CPU seconds", "above the tables, MB", "tables, MB", "near misses found", "twins kept")


def planted(rows: int, width: int, seed: int = 0) -> tuple[EmbeddingTable, dict[str, dict[str, int]]]:
    """Returns tables text and video of so many records, and their captions: record r of a group, its near miss h, its twin f."""
    groups = rows // 3
    rng = np.random.default_rng(seed)
    center = _unit(rng.standard_normal((groups, width), dtype=np.float32))
    text, video = [], []
    for kind, shift in (("r", 0.0), ("h", 0.5), ("f", 0.05)):
        moved = _unit(center + shift * _unit(rng.standard_normal(center.shape, dtype=np.float32)))
        text.append(center if kind == "f" else moved)
        video.append(_unit(moved + 0.02 * _unit(rng.standard_normal(center.shape, dtype=np.float32))))
    ids = tuple(f"{kind}{n}" for kind in "rhf" for n in range(groups))
    captions = {f"{kind}{n}": 2 * n + (kind == "h") for kind in "rhf" for n in range(groups)}
    return EmbeddingTable(ids, {"text": np.concatenate(text), "video": np.concatenate(video)}), {"same caption": captions}


def measure(search: str, rows: int, width: int) -> dict[str, Any]:
    """Returns the figures of mining t2v with one negative a record, in this process."""
    from omni_jax.retrieval.faiss_search import FaissIndex

    table, same = planted(rows, width)
    held = sum(x.nbytes for x in table.tables.values())
    forget_peak()
    before, clock, cpu = status("VmRSS"), time.monotonic(), time.process_time()
    nearest = FaissIndex if search == "faiss" else None
    config = MiningConfig(num_negatives=1, range_max=20)
    found = mine(table, config, same=same, directions=("t2v",), nearest=nearest).negatives
    seconds, cpu = time.monotonic() - clock, time.process_time() - cpu
    groups = rows // 3
    first = [found.get(f"r{n}", {}).get("t2v", [""])[0] for n in range(groups)]
    return {
        "search": search,
        "rows": 3 * groups,
        "width": width,
        "seconds": seconds,
        "cpu": cpu,
        "above": status("VmHWM") - before,
        "tables": held,
        "found": sum(name == f"h{n}" for n, name in enumerate(first)) / groups,
        "twins": sum(name == f"f{n}" for n, name in enumerate(first)) / groups,
    }


def run(cases: tuple[tuple[str, int, int], ...] = CASES) -> list[dict[str, Any]]:
    """Returns the figures of every case, each measured in a process of its own, and prints the table."""
    rows = [alone("mining.measure", *case) for case in cases]
    print(table(rows))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the figures as a table of the documentation."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for r in rows:
        figures = (f"{r['seconds']:.0f}", f"{r['cpu']:.0f}", f"{r['above'] / 1e6:.0f}", f"{r['tables'] / 1e6:.0f}")
        lines.append(f"| {r['search']} | {r['rows']:,} | {r['width']} | {' | '.join(figures)} | {r['found']:.2%} | {r['twins']:.2%} |")
    return "\n".join(lines)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints and, where it is asked to, writes the table between its marks."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmarks.mining", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="put the table between the marks of this page")
    chosen = parser.parse_args(arguments)
    made = table(run())
    if chosen.write:
        before, _, rest = chosen.write.read_text(encoding="utf-8").partition(BEGIN)
        chosen.write.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
