"""Part `fuzz`: coverage-guided fuzzing of the readers of foreign bytes, by atheris where it is installed, else by the fuzzer below.

Ours keeps an input when it takes a way through the project's lines that none took before (`sys.settrace`), and mutates what it kept. What
either finds is written to tests/torture/corpus/TARGET, where the default tests run it again for good.

One target under atheris, which must own its process: python -m tools.torture.fuzz TARGET --seconds 60 --seed 0 --folder DIR
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from tests.repository import ROOT
from tools.torture import commands
from tools.torture.outcome import Clock, Outcome

CORPUS = ROOT / "tests" / "torture" / "corpus"
HANG_S = 20.0  # one input may take so long
SPECIAL = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)


class Hang(BaseException):
    """An input took too long."""


def have_atheris() -> bool:
    return importlib.util.find_spec("atheris") is not None


def run(seed: int, minutes: float, *, names: tuple[str, ...] | None = None, keep: Path | None = CORPUS) -> Outcome:
    """Returns what was tried and found; `minutes` are shared by the targets, `keep` is where findings are written."""
    from tools.torture.fuzz_targets import SEEDS, TARGETS, WORDS

    outcome = Outcome("fuzz", seed)
    clock = Clock(60 * minutes)
    engine = "atheris" if have_atheris() else "the project's own coverage-guided fuzzer (atheris is not installed)"
    outcome.notes.append(f"engine: {engine}")
    names = names or tuple(TARGETS)
    for number, name in enumerate(names):
        seconds = max(0.0, clock.left) / (len(names) - number)
        start = [*SEEDS[name], *(path.read_bytes() for path in corpus(name))]
        if have_atheris() and seconds >= 5:
            found, tried, note = _atheris(name, start, seed, seconds)
        else:
            fuzzer = Fuzzer(TARGETS[name], start, WORDS[name], seed)
            fuzzer.run(seconds)
            found, tried, note = fuzzer.found, fuzzer.tried, f"{name}: {len(fuzzer.kept)} inputs kept, {len(fuzzer.seen)} steps seen"
        outcome.tried.append((f"inputs to {name}", tried))
        outcome.notes.append(note)
        for what, data in found.items():
            where = ""
            if keep is not None:
                (keep / name).mkdir(parents=True, exist_ok=True)
                path = keep / name / hashlib.sha256(data).hexdigest()[:16]
                path.write_bytes(data)
                where = f", kept as {path.relative_to(keep)}"
            outcome.lost.append(f"{name}: {what}{where}")
    outcome.seconds = clock.spent
    return outcome


def corpus(name: str) -> list[Path]:
    """Returns the kept inputs of a target."""
    return sorted((CORPUS / name).iterdir()) if (CORPUS / name).is_dir() else []


class Fuzzer:
    """Mutates inputs and keeps those that take new steps.

    Attributes:
      kept: inputs, each with a step that none before it took.
      seen: steps, pairs of lines of the project's code.
      found: one line that names the error and its place -> the first input that led there.
      tried: inputs so far.
    """

    def __init__(self, target: Callable[[bytes], None], seeds: list[bytes], words: tuple[bytes, ...], seed: int) -> None:
        self._target, self._words, self._rng = target, words, np.random.default_rng(seed)
        self._seeds = seeds
        self.kept: list[bytes] = []
        self.seen: set[tuple[int, int, int]] = set()
        self.found: dict[str, bytes] = {}
        self.tried = 0

    def run(self, seconds: float, most: int | None = None) -> None:
        """Goes on for some seconds, or some number of inputs."""
        end = time.monotonic() + seconds
        for data in self._seeds:
            self.attempt(data)
        while time.monotonic() < end and (most is None or self.tried < most):
            self.attempt(self.mutated())

    def attempt(self, data: bytes) -> None:
        """Runs one input."""
        self.tried += 1
        steps: set[tuple[int, int, int]] = set()
        tracer = _Tracer(steps)
        alarm = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGALRM, _hangs) if alarm else None
        if alarm:
            signal.setitimer(signal.ITIMER_REAL, HANG_S)
        outer = sys.gettrace()
        sys.settrace(tracer.call)
        try:
            self._target(data)
        except Hang:
            self.found.setdefault(f"took over {HANG_S:.0f} s", data)
        except Exception as e:
            self.found.setdefault(_described(e), data)
        finally:
            sys.settrace(outer)
            if alarm:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
        if not steps <= self.seen:
            self.seen |= steps
            self.kept.append(data)

    def mutated(self) -> bytes:
        """Returns a kept input with one to a few changes."""
        rng = self._rng
        data = bytearray(self._pick())
        for _ in range(1 + int(rng.geometric(0.5))):
            at, kind = int(rng.integers(len(data) + 1)), int(rng.integers(8))
            size = int(rng.geometric(0.2))
            if kind == 0 and data:
                data[at % len(data)] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                data[at : at + size] = rng.bytes(size)
            elif kind == 2:
                del data[at : at + size]
            elif kind == 3:
                data[at:at] = data[at : at + 4 * size] * int(rng.integers(1, 4))
            elif kind == 4:
                word = self._words[int(rng.integers(len(self._words)))]
                data[at : at + int(rng.integers(2)) * len(word)] = word
            elif kind == 5:
                width = int(rng.choice([1, 2, 4, 8]))
                value = SPECIAL[int(rng.integers(len(SPECIAL)))] & ((1 << 8 * width) - 1)
                data[at : at + width] = value.to_bytes(width, "little" if rng.random() < 0.5 else "big")
            elif kind == 6:
                other = self._pick()
                data[at:] = other[int(rng.integers(len(other) + 1)) :]
            else:
                data[at:at] = str(SPECIAL[int(rng.integers(len(SPECIAL)))] - int(rng.integers(2))).encode()
        return bytes(data[: 1 << 16])

    def _pick(self) -> bytes:
        pool = self.kept or self._seeds
        # Half of the time among the newest, where new ways have just opened.
        first = max(0, len(pool) - 16) if self._rng.random() < 0.5 else 0
        return pool[int(self._rng.integers(first, len(pool)))]


class _Tracer:
    """Collects steps from line to line within the project's code."""

    def __init__(self, steps: set[tuple[int, int, int]]) -> None:
        self._steps = steps

    def call(self, frame: FrameType, event: str, argument: Any) -> Any:
        if "/omni_jax/" not in frame.f_code.co_filename and "/conversion/" not in frame.f_code.co_filename:
            return None
        code, last = hash((frame.f_code.co_filename, frame.f_code.co_firstlineno)), frame.f_lineno
        steps = self._steps

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal last
            if event == "line":
                steps.add((code, last, frame.f_lineno))
                last = frame.f_lineno
            return line

        return line


def _hangs(number: int, frame: FrameType | None) -> None:
    raise Hang


def _described(error: BaseException) -> str:
    place, step = "", error.__traceback__
    while step is not None:
        place = f"{Path(step.tb_frame.f_code.co_filename).name}:{step.tb_lineno}"
        step = step.tb_next
    return f"{type(error).__name__} at {place}: {ascii(str(error))[:120]}"


# -------------------------------------------------------------------------------------------------------------------- atheris


def _atheris(name: str, start: list[bytes], seed: int, seconds: float) -> tuple[dict[str, bytes], int, str]:
    """Runs a target under atheris in a process of its own, again after each finding; returns findings, inputs tried and a note."""
    clock = Clock(seconds)
    found: dict[str, bytes] = {}
    tried = covered = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "corpus").mkdir()
        for i, data in enumerate(start):
            (folder / "corpus" / str(i)).write_bytes(data)
        while clock.left >= 2 and len(found) < 20:
            command = [sys.executable, "-m", "tools.torture.fuzz", name, "--seconds", str(int(clock.left)), "--folder", place]
            command += ["--seed", str(seed + len(found))]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(commands.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, errors="replace", timeout=clock.left + 120, cwd=folder, env=environment
                )
            except subprocess.TimeoutExpired:
                found["atheris did not end"] = b""
                break
            lines = done.stderr.splitlines()
            numbers = [int(line.split()[0][1:]) for line in lines if line.startswith("#") and line.split()[0][1:].isdigit()]
            covered = max([covered, *(int(line.split("cov: ")[1].split()[0]) for line in lines if "cov: " in line)])
            tried += max(numbers, default=0)
            crashes = list(folder.glob("crash-*")) + list(folder.glob("timeout-*")) + list(folder.glob("oom-*"))
            for crash in crashes:
                title = next((line.strip() for line in lines if "Error" in line or "Exception" in line or "ALARM" in line), crash.name)
                found.setdefault(ascii(title)[:160], crash.read_bytes())
                crash.unlink()
            if not crashes:
                if done.returncode:
                    found[f"atheris ended with status {done.returncode}: {done.stderr[-200:]!a}"] = b""
                break
        kept = len(list((folder / "corpus").iterdir()))
    return found, tried, f"{name}: {kept} inputs kept, {covered} edges covered"


def main(arguments: list[str] | None = None) -> None:
    """Runs one target under atheris; does not return."""
    parser = argparse.ArgumentParser(prog="python -m tools.torture.fuzz")
    parser.add_argument("name")
    parser.add_argument("--seconds", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    chosen = parser.parse_args(arguments)
    import atheris  # type: ignore[import-not-found] - installed for this part alone

    instrument: Any = atheris.instrument_imports  # type: ignore[attr-defined]
    with instrument(include=["omni_jax"]):
        from tools.torture.fuzz_targets import TARGETS
    options = [f"-max_total_time={chosen.seconds}", f"-seed={chosen.seed + 1}", f"-timeout={HANG_S:.0f}"]
    options += ["-max_len=65536", "-rss_limit_mb=4096"]
    setup: Any = atheris.Setup
    setup([sys.argv[0], *options, f"-artifact_prefix={chosen.folder}/", str(chosen.folder / "corpus")], TARGETS[chosen.name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
