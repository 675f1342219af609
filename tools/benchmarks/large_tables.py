"""Memory of `search` in 1e7 x 256 and of `eval` of 1e6 x 512 from sets of embedding files on disk, each in a process of its own.

Peaks are of all pages of the process, libraries included; that of `search`, which maps the files, leaves out their pages. `eval` ranks
4,096 captions among all clips and all clips for the captions, as `eval clips.npz --captions captions.npz` does; then the clips' two tables
against each other for some minutes: the whole takes hours on two cores, and its memory does not change from tile to tile. 10.5 GB of disk
are used and given back.

Run alone: python -m tools.benchmarks.large_tables
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tools.benchmarks.process_memory import alone, own_peak, status

SEARCHED, SCORED = (10_000_000, 256), (1_000_000, 512)  # rows, width
CAPTIONS, QUERIES = 4096, 16
ROWS = 1 << 18  # of a file
MINUTES = 3.0


def write(path: Path, shape: tuple[int, int], names: tuple[str, ...], suffix: str = "") -> None:
    """Writes a set of files of random rows, which `path` names together."""
    from omni_jax.retrieval.embedding_file import part_path, write_embeddings
    from omni_jax.types import EmbeddingTable

    of = -(-shape[0] // ROWS)
    for part in range(of):
        count = min(ROWS, shape[0] - part * ROWS)
        ids = tuple(f"clip{part * ROWS + n}{suffix}" for n in range(count))
        tables = {n: np.random.default_rng((part, i)).standard_normal((count, shape[1]), np.float32) for i, n in enumerate(names)}
        write_embeddings(part_path(path, part, of), EmbeddingTable(ids, tables, parts=(part,), of=of))  # type: ignore[arg-type]


def searched(path: str) -> dict[str, float]:
    """Opens an index twice and searches it; returns seconds and the peak of its own memory in bytes."""
    from omni_jax.retrieval.search import Index
    from tools.benchmarks.timing import clock

    index: Any = None

    def opened() -> None:
        nonlocal index
        index = Index.open(path, "av")

    with own_peak() as most:
        first, again = clock(opened), clock(opened)
        queries = np.random.default_rng(7).standard_normal((QUERIES, index.rows.shape[1]))
        seconds = clock(lambda: index.search(queries))
    return {"rows": len(index.rows), "open_s": first, "open_again_s": again, "search_s": seconds, "peak": most[0]}


def captioned(clips: str, captions: str) -> dict[str, float]:
    """Scores captions against clips as the command does; returns seconds and the peak in bytes."""
    from omni_jax.cli.main import main
    from tools.benchmarks.timing import clock

    return {"eval_s": clock(lambda: main(["eval", clips, "--captions", captions])), "peak": status("VmHWM")}


def scored(clips: str, minutes: str) -> dict[str, float]:
    """Begins to score two whole tables, and returns the peak in bytes after some minutes of ranking, or at its end."""
    import threading

    from omni_jax.cli.main import main

    work = threading.Thread(target=main, args=(["eval", clips],), daemon=True)
    work.start()
    work.join(60 * float(minutes))
    print(json.dumps({"ended": not work.is_alive(), "peak": status("VmHWM")}), flush=True)
    os._exit(0)


def _measure(what: str, *arguments: object) -> dict[str, float]:
    row = alone(f"large_tables.{what}", *map(str, arguments))
    shown = (f"{name} {value / 2**30:.2f} GiB" if name == "peak" else f"{name} {value}" for name, value in row.items())
    print(f"{what}: {', '.join(shown)}")
    return row


def run(searched: tuple[int, int] = SEARCHED, scored: tuple[int, int] = SCORED, minutes: float = MINUTES) -> dict[str, dict[str, float]]:
    """Returns what each measurement returns, by name."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="omni_jax-tables-") as name:
        folder = Path(name)
        write(folder / "wide.npz", searched, ("av",))
        found["searched"] = _measure("searched", folder / "wide.npz")
        for file in folder.iterdir():
            file.unlink()
        write(folder / "clips.npz", scored, ("text", "av"))
        write(folder / "captions.npz", (CAPTIONS, scored[1]), ("text",), "#0")
        found["captioned"] = _measure("captioned", folder / "clips.npz", folder / "captions.npz")
        found["scored"] = _measure("scored", folder / "clips.npz", minutes)
    return found


if __name__ == "__main__":
    run()
