"""Part `training`: SIGKILL at random moments of one run, two runs on one workdir, a full disk.

The run always goes on by itself from its newest whole checkpoint, and its losses and final trainables are those of a run that nobody
disturbed, bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.train.checkpoint import read_trainable, steps_of
from tests.torture import commands
from tests.torture.outcome import Clock, Outcome
from tests.train import tiny_run

KILLS = 30
STEPS = 120
SMALL_FILE = 20_000  # bytes: no array file of a checkpoint fits


def run(seed: int, minutes: float, *, kills: int = KILLS, steps: int = STEPS) -> Outcome:
    """Returns what was tried and lost; fewer kills where the time is short, and the number says so."""
    outcome = Outcome("training", seed)
    clock = Clock(60 * minutes)
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config = tiny_run.make_files(folder)
        environment = tiny_run.environment(folder / "cache")
        changes: dict[str, Any] = {"steps": steps, "checkpoint__every": 3, "evaluation__every": 20, "data__workers": 1}

        def command(name: str) -> list[str]:
            return tiny_run.command(config, folder / name, **changes)

        tiny_run.finish(command("calm"), environment)
        start = time.monotonic()
        tiny_run.finish(tiny_run.command(config, folder / "short", **{**changes, "steps": 1}), environment)
        begins = time.monotonic() - start  # seconds until the first update, about
        killed = where = 0
        while killed < kills and clock.left > 4 * begins:
            process = tiny_run.start(command("disturbed"), environment)
            # A third anywhere in the start, the others some updates on: in steps, saves, evaluations and data workers.
            if rng.random() < 0.33:
                _wait(process, float(rng.uniform(0, begins)))
            else:
                _wait_for_rows(process, folder / "disturbed", where + int(rng.integers(1, max(2, 2 * steps // kills))))
                _wait(process, float(rng.uniform(0, 0.2)))
            if process.poll() is not None:
                said = process.communicate()[0]
                outcome.expect(process.returncode == 0, f"the run ended by itself with status {process.returncode}: {said[-300:]}")
                break
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1
            where = max(_rows(folder / "disturbed"), default=0)
        process = tiny_run.start(command("disturbed"), environment)
        said = process.communicate(timeout=commands.LIMIT_S)[0]
        outcome.expect(process.returncode == 0, f"the run did not end after {killed} kills: {said[-300:]}")
        outcome.tried.append(("SIGKILLs of one run, in its start, steps, saves, evaluations and data workers", killed))
        compare(outcome, folder / "calm", folder / "disturbed", steps)
        outcome.expect(killed >= min(kills, 5), f"only {killed} kills in the time given")
        _two_at_once(outcome, command("twice"), environment)
        _full_disk(outcome, folder / "full", command("full"), environment)
    outcome.seconds = clock.spent
    return outcome


def compare(outcome: Outcome, calm: Path, disturbed: Path, steps: int) -> None:
    """Holds losses and final trainables of two workdirs together."""
    want, found = _rows(calm), _rows(disturbed)
    outcome.expect(sorted(want) == list(range(1, steps + 1)), f"the undisturbed run has rows for {len(want)} of {steps} updates")
    differ = [n for n in want if found.get(n) != want[n]]
    outcome.expect(not differ, f"other losses at updates {differ[:5]}: {[(want[n], found.get(n)) for n in differ[:2]]}")
    arrays = [read_trainable(folder / "checkpoints", steps) for folder in (calm, disturbed)]
    bits = [name for name, x in arrays[0].items() if not np.array_equal(x.view(np.uint8), arrays[1][name].view(np.uint8))]
    outcome.expect(not bits and arrays[0].keys() == arrays[1].keys(), f"other bits in {len(bits)} trainables: {bits[:3]}")
    outcome.tried.append(("updates whose losses were compared bit for bit", len(want)))
    outcome.tried.append(("trainables compared bit for bit at the end", len(arrays[0])))


def _rows(workdir: Path) -> dict[int, list[float]]:
    """Returns update -> its losses; where a run made an update again after a kill, the later row."""
    rows = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (workdir / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):  # the last line of a killed process may be cut
                row = json.loads(line)
                if "loss" in row:
                    rows[int(row["step"])] = [row.get(name) for name in ("loss", "L_T", "L_D", "L_A", "grad_norm")]
    return rows


def _wait(process: subprocess.Popen[str], seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def _wait_for_rows(process: subprocess.Popen[str], workdir: Path, update: int) -> None:
    deadline = time.monotonic() + 300
    while process.poll() is None and max(_rows(workdir), default=0) < update and time.monotonic() < deadline:
        time.sleep(0.02)


def _two_at_once(outcome: Outcome, command: list[str], environment: dict[str, str]) -> None:
    pair = [tiny_run.start(command, environment) for _ in range(2)]
    ended = [(process.communicate(timeout=commands.LIMIT_S)[0], process.returncode) for process in pair]
    refused = [said for said, status in ended if status == 2]
    outcome.expect(sorted(status for _, status in ended) == [0, 2], f"two runs on one workdir: {[status for _, status in ended]}")
    outcome.expect(all("another run is training here" in said for said in refused), f"two runs on one workdir: {refused}")
    outcome.tried.append(("pairs of runs on one workdir", 1))


def _full_disk(outcome: Outcome, workdir: Path, command: list[str], environment: dict[str, str]) -> None:
    """A limit on the size of files stands for a full disk, also for root, whom permissions do not stop."""
    process = tiny_run.start(command, environment)
    deadline = time.monotonic() + 300
    while process.poll() is None and len(steps_of(workdir / "checkpoints")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = steps_of(workdir / "checkpoints")
    limited = subprocess.Popen(
        command,
        env=environment,
        cwd=commands.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE, SMALL_FILE)),
    )
    said = limited.communicate(timeout=commands.LIMIT_S)[0]
    last = said.strip().splitlines()[-1] if said.strip() else ""
    outcome.expect(limited.returncode == 2 and last.startswith("omni-jax: "), f"full disk: status {limited.returncode}, {said[-400:]!r}")
    outcome.expect(steps_of(workdir / "checkpoints")[-1:] >= before[-1:], "full disk: the checkpoint before it is gone")
    again = tiny_run.start(command, environment)
    said = again.communicate(timeout=commands.LIMIT_S)[0]
    outcome.expect(
        again.returncode == 0 and "going on after update" in said, f"after a full disk: status {again.returncode}, {said[-300:]!r}"
    )
    outcome.tried.append(("runs whose disk was full during a save, gone on with afterwards", 1))
    outcome.notes.append(f"a full disk says: {last.replace(os.fspath(workdir), 'WORKDIR')}")
