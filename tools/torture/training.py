"""Part `training`: SIGKILL at chosen moments of one run and of its data workers; stops.

The run always goes on by itself from its newest whole checkpoint, and its losses, evaluations and final trainables are those of a run that
nobody disturbed, bit for bit. What else can happen to a run is in faults.py.
"""

from __future__ import annotations

import collections
import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from omni_jax.cli.status import INTERRUPTED, STOPPED_AND_SAVED
from omni_jax.train.checkpoint import list_steps, read_trainable
from tests.train import tiny_run
from tools.torture import commands
from tools.torture.outcome import Outcome, begun

KILLS = 30
STEPS = 120
FULL = {"kills": KILLS, "steps": STEPS}
EVALUATED = 10  # updates between evaluations
SAVED = 3  # and between saves
ORPHANS_S = 60.0  # the workers of a killed run end within
LEAVE_S = 10.0  # a second Ctrl-C ends a run within, on a busy machine
# Moments of a kill, in turn: somewhere in the start, some updates on, in a save, in an evaluation.
MOMENTS = ("start", "update", "save", "evaluation", "update")
# What else is done to the run on the way, one of them after every few kills.
OTHERS = ("worker", "ctrl-c", "worker", "sigterm", "twice")


def run(seed: int, minutes: float, *, kills: int = KILLS, steps: int = STEPS) -> Outcome:
    """Returns what was tried and lost; fewer kills where the time is short, and the number says so."""
    rng = np.random.default_rng(seed)
    with begun("training", seed, minutes) as (outcome, clock, folder):
        config = tiny_run.make_files(folder)
        around = tiny_run.environment(folder / "cache")
        changes: dict[str, Any] = {"steps": steps, "checkpoint__every": SAVED, "evaluation__every": EVALUATED, "data__workers": 1}

        def command(name: str, *flags: str, **other: Any) -> list[str]:
            return tiny_run.command(config, folder / name, *flags, **{**changes, **other})

        _finish(command("calm"), around)
        disturbed = _Run(command("disturbed"), folder / "disturbed", around, steps, kills, rng)
        disturbed.begins = _begins(command("short", steps=1), around)
        # The last tenth of the time is for what comes after.
        while sum(disturbed.killed.values()) < kills and clock.left > 0.1 * 60 * minutes and not disturbed.ended:
            disturbed.disturb(outcome)
        disturbed.finish(outcome)
        killed = sum(disturbed.killed.values())
        outcome.tried.append(("SIGKILLs of one run", killed))
        outcome.tried += [(f"  in its {name}", disturbed.killed[name]) for name in sorted(disturbed.killed)]
        outcome.tried += [(f"the same run: {OTHER_NAMES[name]}", n) for name, n in sorted(disturbed.others.items())]
        if killed < kills:
            outcome.notes.append(f"out of time: {killed} of {kills} kills")
        compare(outcome, folder / "calm", folder / "disturbed", steps)
        outcome.expect(killed >= min(kills, 5), f"only {killed} kills in the time given")
    return outcome


OTHER_NAMES = {
    "worker": "SIGKILLs of its data worker, which it replaces",
    "ctrl-c": "Ctrl-C, which saves and leaves",
    "sigterm": "SIGTERM, which saves and leaves",
    "twice": "Ctrl-C twice, which leaves at once",
}


class _Run:
    """A run that is disturbed again and again.

    Attributes:
      begins: seconds until its first update, about.
      killed: moment -> kills that came then.
      others: what else was done -> times.
      ended: whether it has come to its end.
    """

    def __init__(self, command: list[str], workdir: Path, around: dict[str, str], steps: int, kills: int, rng: np.random.Generator) -> None:
        self._command, self._workdir, self._around, self._rng = command, workdir, around, rng
        self._steps, self._pace = steps, max(1, steps // (kills + kills // 3))
        self._turn = 0
        self.begins, self.ended = 10.0, False
        self.killed: collections.Counter[str] = collections.Counter()
        self.others: collections.Counter[str] = collections.Counter()

    def disturb(self, outcome: Outcome) -> None:
        """Starts the run, does the next thing to it, and looks at how it ended."""
        turn, self._turn = self._turn, self._turn + 1
        if turn % 5 == 3:
            return self._stop(outcome, OTHERS[turn // 5 % len(OTHERS)])
        kind = MOMENTS[turn % len(MOMENTS)]
        process = tiny_run.start(self._command, self._around)
        reached = self._reach(process, kind)
        moment = self._moment() if reached else kind
        children = _children(process)
        process.send_signal(signal.SIGKILL)
        said = process.communicate()[0]
        left = psutil.wait_procs(children, timeout=ORPHANS_S)[1]
        outcome.expect(not left, f"{len(left)} processes of a killed run were left: {[_named(child) for child in left]}")
        for child in left:
            child.kill()
        if process.returncode == -signal.SIGKILL:
            self.killed[moment if kind != "start" else kind] += 1
        else:
            outcome.expect(process.returncode == 0, f"the run ended by itself with status {process.returncode}: {said[-300:]}")
            self.ended = True

    def finish(self, outcome: Outcome) -> None:
        """Lets the run come to its end."""
        process = tiny_run.start(self._command, self._around)
        said = process.communicate(timeout=commands.LIMIT_S)[0]
        outcome.expect(process.returncode == 0, f"the run did not end after {sum(self.killed.values())} kills: {said[-300:]}")

    def _reach(self, process: subprocess.Popen[str], kind: str) -> bool:
        """Waits for a moment; returns whether the process lives then."""
        at = newest_row(self._workdir)
        if kind == "start":
            wait(process, float(self._rng.uniform(0, self.begins)))
        elif kind == "save":
            goal = list_steps(self._workdir / "checkpoints")[-1:] or [0]
            wait_until(process, lambda: newest_row(self._workdir) > goal[0] and saving(self._workdir))
            wait(process, float(self._rng.uniform(0, 0.05)))
        elif kind == "evaluation":
            goal = [min((at // EVALUATED + 1) * EVALUATED, self._steps)]
            wait_until(process, lambda: newest_row(self._workdir) >= goal[0])
            wait(process, float(self._rng.uniform(0, 0.5)))
        else:
            goal = [at + int(self._rng.integers(1, 1 + 2 * self._pace))]
            wait_until(process, lambda: newest_row(self._workdir) >= goal[0])
            wait(process, float(self._rng.uniform(0, 0.2)))
        return process.poll() is None

    def _moment(self) -> str:
        """Returns the state of the run, by the contents of its workdir."""
        row = newest_row(self._workdir)
        if row and row % EVALUATED == 0 and not evaluated(self._workdir, row):
            return "evaluation"
        return "save" if saving(self._workdir) else "update"

    def _stop(self, outcome: Outcome, what: str) -> None:
        process = tiny_run.start(self._command, self._around)
        if not self._reach(process, "update"):
            said = process.communicate()[0]
            outcome.expect(process.returncode == 0, f"the run ended by itself with status {process.returncode}: {said[-300:]}")
            self.ended = True
            return
        if what == "worker":
            for child in _children(process):
                if "resource_tracker" not in _named(child):
                    child.kill()
                    self.others[what] += 1
            at = newest_row(self._workdir)
            wait_until(process, lambda: newest_row(self._workdir) > at + 2)
            process.send_signal(signal.SIGTERM)
            right: tuple[int, ...] = (STOPPED_AND_SAVED, 0)
        elif what == "sigterm":
            process.send_signal(signal.SIGTERM)
            right = (STOPPED_AND_SAVED, 0)
            self.others[what] += 1
        else:
            process.send_signal(signal.SIGINT)
            right = (INTERRUPTED, 0)
            self.others[what] += 1
            if what == "twice":
                wait(process, 0.3)
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGINT)
        signalled = time.monotonic()
        said = process.communicate(timeout=commands.LIMIT_S)[0]
        outcome.expect(process.returncode in right, f"{what}: status {process.returncode}: {said[-300:]}")
        if what == "twice":
            outcome.expect(time.monotonic() - signalled < LEAVE_S, f"Ctrl-C twice: it took {time.monotonic() - signalled:.1f} s to leave")
        elif process.returncode:
            kept = list_steps(self._workdir / "checkpoints")
            saved = f"{kept[-1] if kept else 0} of {self._steps} steps are saved"
            outcome.expect(saved in said, f"{what}: it does not say {saved!r}: {said[-300:]}")


def compare(outcome: Outcome, calm: Path, disturbed: Path, steps: int, what: str = "") -> None:
    """Holds losses, evaluations and final trainables of two workdirs together."""
    want, found = rows(calm), rows(disturbed)
    outcome.expect(sorted(want) == list(range(1, steps + 1)), f"the undisturbed run{what} has rows for {len(want)} of {steps} updates")
    differ = [n for n in want if found.get(n) != want[n]]
    outcome.expect(not differ, f"other losses{what} at updates {differ[:5]}: {[(want[n], found.get(n)) for n in differ[:2]]}")
    want, found = rows(calm, evaluations=True), rows(disturbed, evaluations=True)
    differ = [n for n in want if found.get(n) != want[n]]
    outcome.expect(not differ, f"other evaluations{what} after updates {differ}, or none")
    outcome.expect(bool(list_steps(disturbed / "checkpoints")[-1:] == [steps]), f"no checkpoint{what} of the last update")
    arrays = [read_trainable(folder / "checkpoints", steps) for folder in (calm, disturbed)]
    bits = [name for name, x in arrays[0].items() if not np.array_equal(x.view(np.uint8), arrays[1][name].view(np.uint8))]
    outcome.expect(not bits and arrays[0].keys() == arrays[1].keys(), f"other bits{what} in {len(bits)} trainables: {bits[:3]}")
    outcome.tried.append((f"updates whose losses were compared bit for bit{what}", len(rows(calm))))
    outcome.tried += [(f"evaluations compared bit for bit{what}", len(want))] if want else []
    outcome.tried.append((f"trainables compared bit for bit at the end{what}", len(arrays[0])))


def rows(workdir: Path, evaluations: bool = False) -> dict[int, dict[str, float]]:
    """Returns update -> its losses, or its evaluation; where a run made an update again after a kill, the later row."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (workdir / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):  # the last line of a killed process may be cut
                row = json.loads(line)
                if ("eval/AVG-all" in row) if evaluations else ("loss" in row):
                    found[int(row["step"])] = {name: value for name, value in row.items() if name != "clips_per_second"}
    return found


def newest_row(workdir: Path) -> int:
    return max(rows(workdir), default=0)


def evaluated(workdir: Path, number: int) -> bool:
    return number in rows(workdir, evaluations=True)


def saving(workdir: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def wait(process: subprocess.Popen[str], seconds: float) -> None:
    """Waits, but not beyond the end of a process."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def wait_until(process: subprocess.Popen[str], what: Callable[[], bool], seconds: float = 300) -> None:
    """Waits until `what` holds, the process ends or the time is over."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and not what() and time.monotonic() < deadline:
        time.sleep(0.01)


def _children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def _named(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return "gone"


def _finish(command: list[str], around: dict[str, str]) -> None:
    process = tiny_run.start(command, around)
    said = process.communicate(timeout=commands.LIMIT_S)[0]
    if process.returncode:
        raise RuntimeError(f"a run that nobody disturbed ended with status {process.returncode}: {said[-300:]}")


def _begins(command: list[str], around: dict[str, str]) -> float:
    start = time.monotonic()
    _finish(command, around)
    return time.monotonic() - start
