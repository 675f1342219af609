"""The tiny golden checkpoint, converted, and the command line run as a user runs it: in a process of its own, its memory watched."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil

from omni_jax.config import Preset
from tests import golden_set

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 1500.0


@dataclasses.dataclass(frozen=True)
class Done:
    """How a command ended: its status, what it printed, and the peak of its memory with all its children, in bytes."""

    status: int
    out: str
    err: str
    peak: int


def golden() -> golden_set.GoldenSet:
    return golden_set.find("OMNI_GOLDEN", "wave_tiny")


def settings() -> list[str]:
    """Returns the `--set` arguments that make the training preset the one of the golden set."""
    found = golden()
    names = [field.name for field in dataclasses.fields(Preset) if field.name in found.spec]
    return [part for name in names for part in ("--set", f"{name}={getattr(found.preset, name)}")]


def convert(folder: Path) -> Path:
    """Converts the golden checkpoint with its adapter into `folder`/model and returns that."""
    base, adapter = golden().checkpoint, golden().adapter_dir
    done = command(["convert", "to-jax", "--base", str(base), "--adapter", str(adapter), "--out", str(folder / "model")])
    if done.status:
        raise RuntimeError(f"the golden checkpoint was not converted: {done.err}")
    return folder / "model"


def start(arguments: list[str], **options: object) -> subprocess.Popen[str]:
    """Starts `omni-jax ARGUMENTS`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process: subprocess.Popen[str] = subprocess.Popen(
        [sys.executable, "-m", "omni_jax.cli.main", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env=environment,
        **options,  # type: ignore[call-overload] - cwd and the like
    )
    return process


def command(arguments: list[str], limit_s: float = LIMIT_S) -> Done:
    """Runs `omni-jax ARGUMENTS`; raises subprocess.TimeoutExpired past the limit, after killing it."""
    process = start(arguments)
    peak, stop = [0], threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peak, stop), daemon=True)
    watcher.start()
    try:
        out, err = process.communicate(timeout=limit_s)
    finally:
        process.kill()
        stop.set()
        watcher.join()
    return Done(process.returncode, out, err, peak[0])


def _watch(pid: int, peak: list[int], stop: threading.Event) -> None:
    while not stop.wait(0.05):
        try:
            parent = psutil.Process(pid)
            family = [parent, *parent.children(recursive=True)]
            peak[0] = max(peak[0], sum(resident(process) for process in family))
        except psutil.Error:
            continue


def resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0
