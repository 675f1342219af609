"""Part `long`: thousands of updates and thousands of embeddings, watched from outside.

Memory grows by less than 2 % after warm-up, open files and threads stay as they were, nothing is compiled after warm-up, checkpoints are
pruned as configured, and what is written grows by a line of metrics an update and no more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from omni_jax.train.checkpoint import list_steps
from tests.train import tiny_run
from tools.torture import commands
from tools.torture.outcome import Outcome, begun

STEPS = 2000
RECORDS = 5000
FULL = {"steps": STEPS, "records": RECORDS}
GROWTH = 0.02
OUT_OF_TIME = -1000
COMPILED = 0.3  # of the work, after which nothing is compiled
WARM = 0.3  # of the work, before anything is measured
KEPT = 2
ROW_BYTES = 4000  # of a line of metrics, at most


@dataclasses.dataclass(frozen=True)
class Sample:
    """One look at a process: share of its work done, bytes of memory, open files, threads, and now and then the names of these."""

    done: float
    memory: int
    files: int
    threads: int
    names: tuple[str, ...] = ()


def run(seed: int, minutes: float, *, steps: int = STEPS, records: int = RECORDS) -> Outcome:
    """Returns what was tried and lost."""
    with begun("long", seed, minutes) as (outcome, clock, folder):
        _embeddings(outcome, folder, records, clock.left / 2)
        _updates(outcome, folder, steps, clock.left)
    return outcome


def _updates(outcome: Outcome, folder: Path, steps: int, limit: float) -> None:
    config = tiny_run.make_files(folder)
    environment = tiny_run.environment(folder / "cache") | {"JAX_LOG_COMPILES": "1"}
    workdir = folder / "run"
    changes = {"checkpoint__every": max(1, steps // 20), "checkpoint__keep": KEPT, "evaluation__every": max(1, steps // 40)}
    command = tiny_run.command(config, workdir, steps=steps, data__workers=1, **changes)

    def done() -> float:
        file = workdir / "metrics.jsonl"
        return sum(b'"loss"' in line for line in file.open("rb")) / steps if file.exists() else 0.0

    samples, said, status = watch(command, environment, folder / "train.log", done, limit)
    made, samples = _reached(outcome, "updates", steps, samples, status)
    outcome.expect(status in (0, OUT_OF_TIME), f"training ended with status {status}: {said[-300:]}")
    judge(outcome, f"{made:,} updates", samples, said)
    kept = list_steps(workdir / "checkpoints")
    # A killed run may have one on its way and one not yet removed. Evaluations save too.
    right = len(kept) == KEPT and kept[-1] == steps if status == 0 else 0 < len(kept) <= KEPT + 1
    outcome.expect(right, f"checkpoints {kept} where {KEPT} are kept")
    written = [path for path in workdir.rglob("*") if path.is_file() and not {"checkpoints", "base"} & set(path.parts)]
    size = sum(path.stat().st_size for path in written)
    outcome.expect(size <= ROW_BYTES * (made + 100), f"{size:,} bytes of metrics, events and evaluations for {made} updates")
    outcome.notes.append(f"{size / max(1, made):,.0f} bytes of metrics and TensorBoard events an update, {len(kept)} checkpoints kept")
    outcome.tried.append(("updates of one run", made))


def _embeddings(outcome: Outcome, folder: Path, records: int, limit: float) -> None:
    model, manifest, out = commands.convert(folder), folder / "m.jsonl", folder / "e.npz"
    rng = np.random.default_rng(outcome.seed)
    words = "a red disc moves over water while a deep tone rises and somebody laughs far away".split()
    texts = [" ".join(rng.choice(words, int(rng.integers(3, 20)))) for _ in range(records)]
    manifest.write_text("".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts)))
    usual = ["--model", str(model), "--manifest", str(manifest), "--out", str(out), "--tables", "text", *commands.settings()]
    command = [sys.executable, "-m", "omni_jax.cli.main", "embed", *usual, "--batch-size", "8"]
    environment = tiny_run.environment(folder / "cache") | {"JAX_LOG_COMPILES": "1"}
    parts = folder / ".e.unfinished"

    def done() -> float:
        return 8 * len(list(parts.glob("part-*.npz"))) / records

    samples, said, status = watch(command, environment, folder / "embed.log", done, limit)
    made, samples = _reached(outcome, "embeddings", records, samples, status)
    outcome.expect(status == OUT_OF_TIME or (status == 0 and out.exists()), f"embed ended with status {status}: {said[-300:]}")
    judge(outcome, f"{made:,} embeddings", samples, said)
    outcome.tried.append(("embeddings of one run", made))


def _reached(outcome: Outcome, what: str, wanted: int, samples: list[Sample], status: int) -> tuple[int, list[Sample]]:
    """Returns how many were made and the looks as shares of these; says so where the time ended before the work."""
    if status != OUT_OF_TIME:
        return wanted, samples
    end = samples[-1].done if samples else 0.0
    outcome.notes.append(f"out of time: {round(end * wanted):,} of {wanted:,} {what}")
    outcome.expect(end > COMPILED, f"out of time before {what} had begun well")
    return round(end * wanted), [dataclasses.replace(s, done=s.done / end) for s in samples if s.done < end]


def watch(
    command: list[str], environment: dict[str, str], log: Path, done: Callable[[], float], limit: float
) -> tuple[list[Sample], str, int]:
    """Runs a command, looking at it every tenth of a second; returns the looks, what it said with a mark at warm-up, and its status.

    Past the limit it is killed, and the status is OUT_OF_TIME.
    """
    samples: list[Sample] = []
    marked = late = False
    deadline = time.monotonic() + limit
    with log.open("ab") as file:
        process = subprocess.Popen(command, env=environment, cwd=commands.ROOT, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
                late = True
                break
            share = done()
            if share > COMPILED and not marked:
                file.write(b"\nWARM\n")
                file.flush()
                marked = True
            try:
                names = thread_names(process.pid) if len(samples) % 20 == 0 else ()
                samples.append(Sample(share, watched.memory_info().rss, watched.num_fds(), watched.num_threads(), names))
            except psutil.Error:
                break
            time.sleep(0.1)
        status = OUT_OF_TIME if (process.wait() and late) else process.returncode
    return samples, log.read_text(errors="replace"), status


def thread_names(pid: int) -> tuple[str, ...]:
    """Returns what the kernel calls the threads of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            found.append((task / "comm").read_text().strip())
    return tuple(found)


def more(early: list[Sample], late: list[Sample]) -> str:
    """Returns which threads there were more of late than early, in words."""
    first, last = (Counter(next((s.names for s in reversed(part) if s.names), ())) for part in (early, late))
    return ", ".join(f"{count} more of {name}" for name, count in sorted((last - first).items()))


def judge(outcome: Outcome, what: str, samples: list[Sample], said: str) -> None:
    """Notes a loss where memory, files or threads grew between the first third and the end, or something was compiled after warm-up."""
    early = [s for s in samples if WARM < s.done <= WARM + 0.2]
    late = [s for s in samples if 0.8 < s.done < 1.0]
    if len(early) < 3 or len(late) < 3:
        outcome.lost.append(f"{what}: too few looks ({len(early)} early, {len(late)} late)")
        return
    memory = [float(np.median([s.memory for s in part])) for part in (early, late)]
    growth = memory[1] / memory[0] - 1
    outcome.expect(growth < GROWTH, f"{what}: memory grew by {100 * growth:.1f} %")
    for name in ("files", "threads"):
        first, last = (float(np.median([getattr(s, name) for s in part])) for part in (early, late))
        which = f" ({more(early, late)})" if name == "threads" else ""
        outcome.expect(last <= first, f"{what}: {name} went from {first:.0f} to {last:.0f}{which}")
    compiled = [line for line in said.partition("\nWARM\n")[2].splitlines() if "Compiling" in line]
    outcome.expect(not compiled, f"{what}: {len(compiled)} programs compiled after warm-up: {compiled[:1]}")
    before = said.partition("\nWARM\n")[0].count("Compiling")
    outcome.notes.append(
        f"{what}: memory {memory[0] / 1e6:.0f} MB early and {memory[1] / 1e6:.0f} MB late ({100 * growth:+.1f} %), "
        f"{before} compilations before warm-up and {len(compiled)} after"
    )
