"""Memory and start-up time of a training run's sampler over 1e4 to 1e8 clips: the index opened, the planner made, steps planned.

The index is written as `omni-jax prepare` writes it (captions of 8 words; 1e8 clips take 16 GB of disk); its shards are empty files of the
right length. A process of its own opens it, plans the first step, then steps all over the first epoch. Peaks are of all pages, those that
are mapped from the index too; "above imports" leaves out what the process holds before it opens anything.

Run alone: python -m tools.benchmarks.sampler [CLIPS ...]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tools.benchmarks.process_memory import alone, status

SIZES = (10**8, 10**7, 10**6, 10**5, 10**4)
STEP, STEPS = 256, 50  # clips of a step, and steps that are planned
CLIPS_A_SHARD, BYTES_A_CLIP = 16384, 1_600_000
RUNS = 1 << 12  # captions' beginnings


def write(folder: Path, clips: int) -> None:
    """Writes the index of so many clips, and files as long as its shards."""
    import pyarrow as pa
    import pyarrow.compute

    from omni_jax.data.clip_index import BATCH, schema, write_batches, write_index
    from omni_jax.data.shards import shard_name
    from tests.data.training_clips import PRESET, WORDS

    pc: Any = pyarrow.compute
    rng = np.random.default_rng(0)
    heads = pa.array([" ".join(rng.choice(WORDS, 7)) for _ in range(RUNS)])
    lengths = [min(CLIPS_A_SHARD, clips - start) for start in range(0, clips, CLIPS_A_SHARD)]

    def batches() -> Iterator[Any]:
        for start in range(0, clips, BATCH):
            numbers = np.arange(start, min(start + BATCH, clips))
            texts = pa.array(numbers).cast(pa.string())
            captions = pc.binary_join_element_wise(heads.take(pa.array(numbers % RUNS)), texts, " ")
            begin = numbers % CLIPS_A_SHARD * BYTES_A_CLIP
            grid = pa.FixedSizeListArray.from_arrays(pa.array(np.tile(np.array([4, 16, 16], np.int32), len(numbers))), 3)
            columns = [texts, captions, grid, np.full(len(numbers), 0.5), np.full(len(numbers), 4.0), np.full(len(numbers), 8)]
            columns += [np.full(len(numbers), 160_000), numbers % 50 == 0, begin, begin + BYTES_A_CLIP]
            yield pa.record_batch([pa.array(c) if isinstance(c, np.ndarray) else c for c in columns], schema=schema())

    write_batches(folder, batches())
    sizes = [length * BYTES_A_CLIP for length in lengths]
    said = {"shards": lengths, "sizes": sizes, "limits": (4, 256, 160_000), "silent": -(-clips // 50), "digest": "0" * 32}
    write_index(folder, PRESET, said)
    for shard, size in enumerate(sizes):
        with (folder / shard_name(shard, len(sizes))).open("wb") as file:
            file.truncate(size)


def measured(folder: str) -> dict[str, float]:
    """Returns seconds to open the index, to make the planner, of the median and the slowest plan, and peaks of memory in bytes."""
    import functools

    from omni_jax.api.training import clips_digest
    from omni_jax.config.batches import AugmentConfig
    from omni_jax.data.plan import BatchConfig, Planner
    from omni_jax.data.shards import ShardSource
    from omni_jax.train import LossConfig, kinds_of_update
    from tests.data.training_clips import CONFIG, PRESET, tokenizer

    before, start = status("VmRSS"), time.perf_counter()
    source = ShardSource(folder, PRESET)
    clips_digest(source)
    opened = time.perf_counter()
    kinds = functools.partial(kinds_of_update, micro_batches=1, losses=LossConfig())
    planner = Planner(source, BatchConfig(STEP), kinds, tokenizer(), CONFIG, PRESET, AugmentConfig())
    made = time.perf_counter()
    times = []
    for update in np.linspace(0, planner.updates_per_epoch - 1, STEPS).astype(int).tolist():
        begun = time.perf_counter()
        planner.plan(update)
        times.append(time.perf_counter() - begun)
    peak = status("VmHWM")
    seconds = {"open_s": opened - start, "planner_s": made - opened, "plan_s": float(np.median(times)), "slowest_plan_s": max(times)}
    return {**seconds, "peak": peak, "above": peak - before}


def run(sizes: tuple[int, ...] = SIZES) -> dict[int, dict[str, float]]:
    """Returns the figures by number of clips, and prints a row of a table for each."""
    found = {}
    print("| clips | index, MB | open, s | planner, s | plan of a step, s | with a new window, s | peak, MB | above imports, MB |")
    print("|---|---|---|---|---|---|---|---|")
    for clips in sizes:
        with tempfile.TemporaryDirectory(prefix="omni_jax-sampler-") as folder:
            write(Path(folder), clips)
            size = (Path(folder) / "index.arrow").stat().st_size
            row = found[clips] = alone("sampler.measured", folder)
        times = " | ".join(f"{row[name]:.2f}" for name in ("open_s", "planner_s", "plan_s", "slowest_plan_s"))
        print(f"| {clips:,} | {size / 1e6:.0f} | {times} | {row['peak'] / 1e6:.0f} | {row['above'] / 1e6:.0f} |", flush=True)
    return found


if __name__ == "__main__":
    run(tuple(map(int, sys.argv[1:])) or SIZES)
