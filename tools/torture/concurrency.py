"""Part `concurrency`: several `embed` on one output, and interruptions at random moments.

Whatever happens, the output is absent or whole, a run that is started again goes on where it was, and nothing half-written stays behind.
"""

from __future__ import annotations

import collections
import contextlib
import json
import resource
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil

from omni_jax.retrieval import read_embeddings
from omni_jax.retrieval.embedding_pass import Part
from omni_jax.retrieval.journal import Journal
from omni_jax.types import EmbeddingTable, InputError
from tools.torture import commands
from tools.torture.outcome import Outcome, begun

RECORDS = 400
ROUNDS = 8
FULL = {"rounds": ROUNDS}
HAMMER = 6000  # attempts at one journal: a race of a few lines shows itself once in thousands
LEAVE_S = 5.0  # of CPU: a second Ctrl-C ends the process within. On a busy machine the clock says little.
STOP_S = 60.0  # the first one, which lets what runs end
SAME = 1e-5  # tests/tolerances.py: the same embedding in other batch shapes


def run(seed: int, minutes: float, *, rounds: int = ROUNDS) -> Outcome:
    """Returns what was tried and lost."""
    rng = np.random.default_rng(seed)
    with begun("concurrency", seed, minutes) as (outcome, clock, folder):
        hammer(outcome, folder / "hammered", HAMMER)
        setting = _Setting(folder)
        races = stops = 0
        ended: collections.Counter[str] = collections.Counter()
        for _ in range(rounds):
            if clock.left < 60:
                break
            races += _race(outcome, setting)
            for what in ("once", "twice", "killed"):
                ended[what] += _stop(outcome, setting, what, float(rng.uniform(0, 0.9)) * setting.seconds)
                stops += 1
        outcome.expect(races > 0 and stops > 0, "out of time before the first race")
        outcome.expect(not stops or min(ended[what] for what in ("once", "twice", "killed")) > 0, f"no run ended by it: {dict(ended)}")
        outcome.notes.append("runs that ended by it, not by themselves before: " + ", ".join(f"{what} {n}" for what, n in ended.items()))
        outcome.tried.append(("pairs of embed started together on one output", races))
        outcome.tried.append(("runs interrupted once, twice or killed at a random moment, then resumed", stops))
        if races < rounds:
            outcome.notes.append(f"out of time: {races} of {rounds} rounds")
    return outcome


def hammer(outcome: Outcome, folder: Path, rounds: int, threads: int = 6) -> None:
    """Threads that take the journal of one output again and again: never two at once, and every part they add is read back."""
    inside, most = [0], [0]
    faults: list[str] = []
    ended: list[str] = []  # appending is atomic, adding is not
    part = Part(ids=("a",), rows={"text": np.ones((1, 2), np.float32)})

    def turn() -> None:
        try:
            journal = Journal(folder, {"a": 1})
        except InputError as e:
            if "another run is writing here" not in str(e):
                raise
            ended.append("refused")
            return
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        try:
            journal.add(part)
            time.sleep(0.0005)
            if journal.finished() != {"a"}:
                faults.append("a part was lost")
        finally:
            inside[0] -= 1
            journal.remove()
        ended.append("won")

    def work() -> None:
        for _ in range(rounds // threads):
            try:
                turn()
            except Exception as e:  # whatever it is: a run would have ended by it
                faults.append(f"{type(e).__name__}: {e}")

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    outcome.expect(not faults, f"the journal under {threads} threads: {faults[:3]}")
    won = ended.count("won")
    outcome.expect(len(ended) == rounds // threads * threads, f"{len(ended)} of {rounds} attempts at a journal came to an end")
    outcome.expect(most[0] == 1, f"{most[0]} runs held one journal at a time")
    outcome.expect(won > 0 and not folder.exists(), "a journal was left, or nobody got one")
    outcome.tried.append((f"attempts of {threads} threads at one journal ({won:,} had it)", rounds // threads * threads))


class _Setting:
    """The command, what it gives undisturbed, and how long that takes."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "o.npz"
        model, manifest = commands.convert(folder), folder / "m.jsonl"
        manifest.write_text("".join(json.dumps({"id": str(i), "text": f"caption number {i}"}) + "\n" for i in range(RECORDS)))
        usual = ["--model", str(model), "--manifest", str(manifest), "--out", str(self.out), "--tables", "text", "--batch-size", "2"]
        self.arguments = ["embed", *usual, *commands.settings()]
        start = time.monotonic()
        done = commands.command(self.arguments)
        self.seconds = time.monotonic() - start
        if done.status:
            raise RuntimeError(done.err)
        self.want: EmbeddingTable = read_embeddings(self.out)
        self.out.unlink()

    def check(self, outcome: Outcome, what: str) -> None:
        """The output is whole and alone; then it is removed for the next round."""
        found = read_embeddings(self.out)
        same = found.ids == self.want.ids
        apart = float(np.abs(found.tables["text"] - self.want.tables["text"]).max()) if same else np.inf
        outcome.expect(apart <= SAME, f"{what}: the embeddings differ by {apart:.1e}")
        left = [p.name for p in self.out.parent.iterdir() if p.name.startswith((".o", "o.")) and p != self.out]
        outcome.expect(not left, f"{what}: {left} were left")
        self.out.unlink()


def _race(outcome: Outcome, setting: _Setting) -> int:
    pair = [commands.start(setting.arguments) for _ in range(2)]
    ended = [(process.communicate(timeout=commands.LIMIT_S)[1], process.returncode) for process in pair]
    statuses = sorted(status for _, status in ended)
    outcome.expect(statuses in ([0, 2], [0, 0]), f"two at once ended with {statuses}")
    for err, status in ended:
        refused = [line for line in err.splitlines() if line.startswith("omni-jax: ")]
        outcome.expect(status == 0 or (len(refused) == 1 and "another run is writing here" in refused[0]), f"two at once: {err[-200:]!r}")
    setting.check(outcome, "two at once")
    return 1


def _stop(outcome: Outcome, setting: _Setting, what: str, after: float) -> int:
    """Interrupts a run and goes on with it; returns whether it was the interruption that ended it."""
    reaped = _cpu_of_children()
    process = commands.start(setting.arguments)
    time.sleep(after)
    signalled, spent = time.monotonic(), _cpu(process.pid)
    process.send_signal(signal.SIGKILL if what == "killed" else signal.SIGINT)
    if what == "twice":
        time.sleep(0.5)  # two at the same moment are one, and a busy machine takes its time to deliver
        spent = max(spent, _cpu(process.pid))
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=commands.LIMIT_S)
    took = time.monotonic() - signalled if what == "once" else _cpu_of_children() - reaped - spent
    # Before Python has set its handler, or after the work was done, a signal finds nothing to save.
    right = {"killed": (-signal.SIGKILL, 0), "once": (130, 0, -signal.SIGINT), "twice": (130, 0, -signal.SIGINT)}[what]
    outcome.expect(process.returncode in right, f"interrupted {what} after {after:.1f} s: status {process.returncode}, {err[-300:]!r}")
    limit = {"once": STOP_S, "twice": LEAVE_S, "killed": LEAVE_S}[what]
    unit = "s" if what == "once" else "s of CPU"
    outcome.expect(took <= limit, f"interrupted {what} after {after:.1f} s: it took {took:.1f} {unit} to end, status {process.returncode}")
    if setting.out.exists():
        outcome.expect(read_embeddings(setting.out).ids == setting.want.ids, f"interrupted {what}: a part of an output has its name")
    again = commands.command(setting.arguments)
    outcome.expect(again.status == 0, f"after being interrupted {what}: status {again.status}, {again.err[-300:]!r}")
    setting.check(outcome, f"interrupted {what} after {after:.1f} s")
    return int(process.returncode != 0)


def _cpu(pid: int) -> float:
    """Returns the seconds of CPU that a process has used; 0 where it is gone."""
    with contextlib.suppress(psutil.Error):
        times = psutil.Process(pid).cpu_times()
        return times.user + times.system
    return 0.0


def _cpu_of_children() -> float:
    """Returns the seconds of CPU of all processes that have been waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
