"""Part `faults`: two runs on one workdir, a full disk or a read-only folder during a save, the death of one of two processes."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.train.checkpoint import list_steps
from tests.train import tiny_run
from tools.torture import commands
from tools.torture.outcome import Outcome, begun
from tools.torture.training import compare

SMALL_FILE = 20_000  # bytes: no array file of a checkpoint fits
PAIR_STEPS = 16
ALONE_S = 400.0  # the process that is left ends by itself within: jax hears nothing for 100 seconds before it gives a process up


def run(seed: int, minutes: float) -> Outcome:
    """Returns what was tried and lost; without the pairs of processes where the time is short, and it says so."""
    with begun("faults", seed, minutes) as (outcome, clock, folder):
        config = tiny_run.make_files(folder)
        around = tiny_run.environment(folder / "cache")
        changes: dict[str, Any] = {"checkpoint__every": 3, "evaluation__every": 10, "data__workers": 1}

        def command(name: str, *flags: str, **other: Any) -> list[str]:
            return tiny_run.command(config, folder / name, *flags, **{**changes, **other})

        two_at_once(outcome, command("twice", steps=9), around)
        full_disk(outcome, folder / "full", command("full", steps=30, data__workers=0), around)
        read_only(outcome, folder / "closed", command("closed", steps=60), around)
        if clock.left > 60:
            one_of_two(outcome, folder, command, around, np.random.default_rng(seed))
        else:
            outcome.notes.append("out of time: no run of two processes")
    return outcome


def two_at_once(outcome: Outcome, command: list[str], around: dict[str, str]) -> None:
    """Starts two runs on one workdir: one trains, the other refuses."""
    pair = [tiny_run.start(command, around) for _ in range(2)]
    ended = [(process.communicate(timeout=commands.LIMIT_S)[0], process.returncode) for process in pair]
    refused = [said for said, status in ended if status == 2]
    outcome.expect(sorted(status for _, status in ended) == [0, 2], f"two runs on one workdir: {[status for _, status in ended]}")
    outcome.expect(all("another run is training here" in said for said in refused), f"two runs on one workdir: {refused}")
    outcome.tried.append(("pairs of runs on one workdir", 1))


def full_disk(outcome: Outcome, workdir: Path, command: list[str], around: dict[str, str]) -> None:
    """A limit on the size of files stands for a full disk.

    The command must not use data workers, whose shared memory the limit would meet first.
    """
    process = tiny_run.start(command, around)
    _until_two_checkpoints(process, workdir)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    limited = tiny_run.start(command, around, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE, SMALL_FILE)))
    _refused_and_gone_on_with(outcome, "full disk", limited, workdir, command, around)
    outcome.tried.append(("runs whose disk was full during a save, resumed afterwards", 1))


def read_only(outcome: Outcome, workdir: Path, command: list[str], around: dict[str, str]) -> None:
    """The folder of checkpoints takes no files any more in the midst of a run."""
    process = tiny_run.start(command, around, _obey_permissions)
    _until_two_checkpoints(process, workdir)
    (workdir / "checkpoints").chmod(0o555)
    _refused_and_gone_on_with(outcome, "read-only folder", process, workdir, command, around)
    outcome.tried.append(("runs whose folder became read-only, resumed afterwards", 1))


def _obey_permissions() -> None:
    """Takes from root, in what is executed next, what lets it write where permissions do not; of others it changes nothing."""
    drop_from_bounding_set, override = 24, 1  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE of linux/prctl.h and linux/capability.h
    ctypes.CDLL(None).prctl(drop_from_bounding_set, override, 0, 0, 0)


def _until_two_checkpoints(process: subprocess.Popen[str], workdir: Path) -> None:
    deadline = time.monotonic() + 300
    while process.poll() is None and len(list_steps(workdir / "checkpoints")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)


def _refused_and_gone_on_with(
    outcome: Outcome, what: str, process: subprocess.Popen[str], workdir: Path, command: list[str], around: dict[str, str]
) -> None:
    """Expects one clear line of a run that cannot save, the checkpoint before it, and that the run resumes once it can."""
    folder = workdir / "checkpoints"
    before = list_steps(folder)
    said = process.communicate(timeout=commands.LIMIT_S)[0]
    last = said.strip().splitlines()[-1] if said.strip() else ""
    reported = re.match(r"omni-jax: .*checkpoint.* could not be written", last) and "Traceback" not in said
    outcome.expect(process.returncode == 2 and bool(reported), f"{what}: status {process.returncode}, {said[-400:]!r}")
    outcome.expect(list_steps(folder)[-1:] >= before[-1:], f"{what}: the checkpoint before it is gone")
    folder.chmod(0o755)
    again = tiny_run.start(command, around)
    said = again.communicate(timeout=commands.LIMIT_S)[0]
    outcome.expect(again.returncode == 0 and "resuming from step" in said, f"after a {what}: status {again.returncode}, {said[-300:]!r}")
    outcome.notes.append(f"a {what} says: {last.replace(os.fspath(workdir), 'WORKDIR')}")


def one_of_two(outcome: Outcome, folder: Path, command: Callable[..., list[str]], around: dict[str, str], rng: np.random.Generator) -> None:
    """Kills one and then the other of two processes that train together: the one left ends by itself, and both are started again."""

    def pair(name: str) -> list[subprocess.Popen[str]]:
        address = f"127.0.0.1:{tiny_run.free_port()}"
        flags = ("--coordinator", address, "--processes", "2", "--process")
        settings = {"steps": PAIR_STEPS, "evaluation__manifest": "", "checkpoint__every": 2, "data__workers": 0}
        return [tiny_run.start(command(name, *flags, str(i), **settings), around) for i in range(2)]

    def finish(name: str) -> None:
        processes = pair(name)
        said = [process.communicate(timeout=commands.LIMIT_S)[0] for process in processes]
        statuses = [process.returncode for process in processes]
        outcome.expect(statuses == [0, 0], f"two processes ended with {statuses}: {said[0][-300:]} {said[1][-300:]}")

    finish("calm pair")
    killed = 0
    for victim in (1, 0):
        processes = pair("disturbed pair")
        folder_of = folder / "disturbed pair" / "checkpoints"
        goal = (list_steps(folder_of)[-1:] or [0])[0] + 2
        deadline = time.monotonic() + 300
        while all(p.poll() is None for p in processes) and (list_steps(folder_of)[-1:] or [0])[0] < goal and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(float(rng.uniform(0, 0.2)))
        alive = all(process.poll() is None for process in processes)
        processes[victim].send_signal(signal.SIGKILL)
        start = time.monotonic()
        processes[victim].communicate()
        left = processes[1 - victim]
        try:
            said = left.communicate(timeout=ALONE_S)[0]
        except subprocess.TimeoutExpired:
            left.kill()
            said = left.communicate()[0]
            outcome.lost.append(f"process {1 - victim} hung for {ALONE_S:.0f} s after process {victim} was killed: {said[-300:]}")
        outcome.expect(not alive or left.returncode != 0, f"process {1 - victim} ended well without process {victim}")
        killed += alive
        outcome.notes.append(
            f"process {victim} of two killed: the other ended after {time.monotonic() - start:.0f} s, status {left.returncode}"
        )
    finish("disturbed pair")
    outcome.tried.append(("SIGKILLs of one of two processes", killed))
    compare(outcome, folder / "calm pair", folder / "disturbed pair", PAIR_STEPS, " (two processes)")
