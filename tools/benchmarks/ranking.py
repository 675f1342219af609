"""Speed and memory of the ranker, beside the published formula: the whole similarity matrix, its diagonal, strictly greater.

At the size of OmniRetriever-Bench (3,782 x 3,584) all twelve directions; then one pair of tables at four sizes up to 100,000 x 512. Memory
is what a process of its own needs above the loaded tables: its peak, less what it held before, after a first call on small tables of the
same tile shapes has compiled the programs. In the same process the tiles are then multiplied and nothing else: what share of that rate
ranking reaches, by the clock and by CPU seconds, which other work on the machine changes less.

Run alone: python -m tools.benchmarks.ranking
"""

from __future__ import annotations

import concurrent.futures
import functools
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from tools.benchmarks.process_memory import alone, forget_peak, status
from tools.benchmarks.timing import PAIRS, clock, interleave

RECORDS, WIDTH = 3782, 3584
SIZES = (12_500, 25_000, 50_000, 100_000)
NARROW = 512
TABLES = ("text", "video", "audio", "av", "tv", "at")


def random_tables(n: int, width: int, names: tuple[str, ...] = TABLES) -> dict[str, np.ndarray]:
    """Returns unit rows (n, width) float32 of tables that are somewhat alike, laid out in memory as `read_embeddings` lays them out."""
    tables = {}
    for seed, name in enumerate(names):
        room = np.empty(4 * n * width + 64, np.uint8)
        rows = room[-room.ctypes.data % 64 :][: 4 * n * width].view(np.float32).reshape(n, width)
        for start in range(0, n, 1024):
            size = min(1024, n - start)
            shared = np.random.default_rng(start).standard_normal((size, width), dtype=np.float32)
            own = np.random.default_rng((seed, start)).standard_normal((size, width), dtype=np.float32)
            part = shared + 3 * own
            rows[start : start + size] = part / np.linalg.norm(part, axis=1, keepdims=True)
        tables[name] = rows
    return tables


def warm_rows(n: int) -> int:
    """Returns the fewest rows that compile the programs for n: one tile."""
    from omni_jax.retrieval.ranks import CPU_CHUNK, _tile_rows

    return _tile_rows(n, CPU_CHUNK)


def ours(tables: Mapping[str, np.ndarray]) -> dict[tuple[str, str], np.ndarray]:
    """Returns the place of the relevant item by direction, as `evaluate` computes it: tables checked once, one product for both ways."""
    from omni_jax.retrieval.directions import possible
    from omni_jax.retrieval.ranks import prepare, rank_pair

    vectors = {name: prepare(rows, name) for name, rows in tables.items()}
    found = {}
    for a, b in dict.fromkeys((min(pair), max(pair)) for pair in possible(tables).values()):
        found[a, b], found[b, a] = (ranks.better + 1 for ranks in rank_pair(vectors[a], vectors[b]))
    return found


def published(tables: Mapping[str, np.ndarray]) -> dict[tuple[str, str], np.ndarray]:
    """Returns the same by the published formula, once for every direction."""
    from omni_jax.retrieval.directions import possible

    found = {}
    for a, b in possible(tables).values():
        scores = tables[a] @ tables[b].T
        found[a, b] = (scores > np.diag(scores)[:, None]).sum(axis=1) + 1
    return found


def products(a: np.ndarray, b: np.ndarray) -> None:
    """Multiplies the tiles that ranking a against b multiplies, by a plain product, as many at a time."""
    from omni_jax.retrieval.ranks import CPU_STREAMS

    size = min(len(a), warm_rows(len(a)))
    starts = [min(start, len(a) - size) for start in range(0, len(a), size)]

    def multiply(i: int) -> None:
        for j in starts:
            _product()(a[i : i + size], b[j : j + size]).block_until_ready()

    with concurrent.futures.ThreadPoolExecutor(CPU_STREAMS) as pool:
        list(pool.map(multiply, starts))


@functools.cache
def _product() -> Callable[[np.ndarray, np.ndarray], jax.Array]:
    return jax.jit(lambda x, y: jnp.dot(x, y.T, precision=jax.lax.Precision.HIGHEST))


def spent(run: Callable[[], object]) -> tuple[float, float]:
    """Returns the seconds a call takes, by the clock and of this process's CPU time."""
    cpu = time.process_time()
    return clock(run), time.process_time() - cpu


def measured(what: str, n: int, width: int) -> dict[str, float]:
    """Returns seconds, bytes above the loaded tables, and bytes of these, of one run of `ours` or `published`, or of ours on one "pair"."""
    tables = random_tables(n, width, TABLES[:2] if what == "pair" else TABLES)
    run = published if what == "published" else ours
    warm = {name: rows[: min(n, warm_rows(n))] for name, rows in tables.items()}
    run(warm)
    forget_peak()
    before = status("VmRSS")
    seconds, cpu = spent(lambda: run(tables))
    done = {"seconds": seconds, "cpu": cpu, "above": status("VmHWM") - before, "tables": sum(t.nbytes for t in tables.values())}
    if what == "pair":
        products(*warm.values())
        done["product_seconds"], done["product_cpu"] = spent(lambda: products(*tables.values()))
    return done


def run(pairs: int = PAIRS, records: int = RECORDS, width: int = WIDTH, sizes: tuple[int, ...] = SIZES) -> dict[str, object]:
    """Returns the ratio of times, the memory of both sides and the growth with N, and prints a line for each."""
    memory = {what: alone("ranking.measured", what, records, width) for what in ("ours", "published")}
    tables = random_tables(records, width)
    ranks, theirs = ours(tables), published(tables)
    apart = sum(int((ranks[pair] != theirs[pair]).sum()) for pair in theirs)
    times = interleave(lambda: ours(tables), lambda: published(tables), pairs)
    above = {what: max(memory[what]["above"] / 1e6, 0.1) for what in memory}  # small tables fit into pages that are there already
    print(
        f"12 directions of {records:,} x {width:,}: {times.seconds[0]:.2f} s, published formula {times.seconds[1]:.2f} s, "
        f"{times.ratio:.2f} times as fast (median of {pairs} interleaved pairs)"
    )
    print(
        f"memory above the tables: {above['ours']:.1f} MB, published formula {above['published']:.1f} MB, "
        f"{above['published'] / above['ours']:.1f} times less; {apart} of {12 * records:,} places differ"
    )
    growth = {}
    for n in sizes:
        growth[n] = alone("ranking.measured", "pair", n, NARROW)
        total = (growth[n]["above"] + growth[n]["tables"]) / 1e6
        rate = 2 * n * n * NARROW / growth[n]["seconds"] / 1e9
        print(
            f"both directions of {n:,} x {NARROW}: {growth[n]['seconds']:.1f} s ({rate:.0f} GFLOP/s), "
            f"{growth[n]['above'] / 1e6:.0f} MB above the tables, {total:.0f} MB with them; of the rate of its products alone "
            f"{growth[n]['product_seconds'] / growth[n]['seconds']:.0%}, by CPU seconds {growth[n]['product_cpu'] / growth[n]['cpu']:.0%}"
        )
    return {"ratio": times.ratio, "seconds": times.seconds, "memory_mb": above, "places_apart": apart, "growth": growth}


if __name__ == "__main__":
    run()
