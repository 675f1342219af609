"""Tries to break what is built: python -m tools.torture [--part NAME] [--minutes N] [--seed N] [--scale X].

Each part says what was tried, how many times, and what was lost; the results go into docs/reports/reliability.md with the date and the
machine, and the parts that were not run keep theirs. Ends with status 1 where anything was lost.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import platform
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.torture.outcome import Outcome

# Part -> its module, which has `run(seed, minutes) -> Outcome`, its share of the time, and what it is about.
PARTS: dict[str, tuple[str, float, str]] = {
    "training": ("training", 12, "Kills of a run at every stage and of its workers; stops"),
    "faults": ("faults", 4, "Two runs on one workdir, a full disk, a read-only folder, the death of one of two processes"),
    "media": ("hostile_media", 8, "Broken, mislabelled and odd media files through `embed` and `prepare`, intact ones between them"),
    "files": ("hostile_files", 5, "Checkpoints, adapters, embedding files, manifests and captions made to run code or to mislead"),
    "fuzz": ("fuzz", 20, "Coverage-guided fuzzing of manifest, safetensors header, torch reader and prompt builder"),
    "numbers": ("numbers", 5, "bfloat16 beside float32, near-duplicates at temperature 0.01, zero rows, counts over a million rows"),
    "long": ("long", 10, "2,000 updates and 5,000 embeddings, watched from outside"),
    "concurrency": ("concurrency", 8, "Several `embed` on one output; Ctrl-C once and twice, and kills, at random moments"),
    "supply": ("supply", 3, "Pinned hashes, licences, nothing of a download run as code, no network at run time"),
}
MINUTES = 75.0
PAGE = Path(__file__).resolve().parents[2] / "docs/reports/reliability.md"
HEAD = """# Reliability

This page lists what was done to break this software, how often, and what was lost. `make torture` writes it (`python -m tools.torture
[--part NAME] [--minutes N] [--seed N] [--scale X]`). Everything random follows from the seed of each part; what depends on the clock does
not. A part that runs alone (`make torture TORTURE_ARGS="--part media"`) replaces its own section, with its own date and machine. `make
test` runs a short form of every part.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the chosen parts, writes the page and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.torture", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", action="append", choices=list(PARTS), help="run this part; may be repeated (default: all)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=None, help="default: another one every time")
    parser.add_argument("--scale", type=float, default=1.0, help="of the counts of a part (kills, files, updates), for a busy machine")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the results go (default: docs/reports/reliability.md)")
    chosen = parser.parse_args(arguments)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        # As a shell starts what runs in the background: every command below would ignore Ctrl-C, too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    seed = chosen.seed if chosen.seed is not None else int.from_bytes(os.urandom(3), "big")
    names = chosen.part or list(PARTS)
    share = chosen.minutes / sum(PARTS[name][1] for name in names)
    print(f"seed {seed}; at most about {chosen.minutes:g} minutes; {machine()}", flush=True)
    lost = 0
    for name in names:
        module, weight, about = PARTS[name]
        print(f"== {name}: {about}", flush=True)
        start = time.monotonic()
        try:
            outcome = _run(importlib.import_module(f"tools.torture.{module}"), seed, weight * share, chosen.scale)
        except Exception as e:  # a part that broke has lost something, and the others still run
            traceback.print_exc()
            outcome = Outcome(name, seed, lost=[f"the part ended with {type(e).__name__}: {e}"], seconds=time.monotonic() - start)
        text = section(name, outcome)
        print(text.partition("\n")[2], flush=True)
        write(chosen.page, name, text)
        lost += len(outcome.lost)
    print(f"lost: {lost or 'nothing'}; seed {seed}")
    return 1 if lost else 0


def _run(module: Any, seed: int, minutes: float, scale: float) -> Outcome:
    """Runs a part, where asked with a share of its counts, which it then says."""
    if scale == 1 or not hasattr(module, "FULL"):
        return module.run(seed, minutes)
    counts = {name: max(1, round(scale * count)) for name, count in module.FULL.items()}
    outcome = module.run(seed, minutes, **counts)
    outcome.notes.append("scaled: " + ", ".join(f"{name} {count:,} of {module.FULL[name]:,}" for name, count in counts.items()))
    return outcome


def section(name: str, outcome: Outcome) -> str:
    """Returns a part's section of the page."""
    lines = [
        f"## {name}",
        "",
        f"{PARTS[name][2]}. {datetime.date.today().isoformat()}, seed {outcome.seed}, {outcome.seconds:.0f} s; {machine()}.",
        "",
        "| tried | times |",
        "|---|---|",
        *(f"| {'&nbsp;&nbsp;' if what.startswith(' ') else ''}{what.strip()} | {times:,} |" for what, times in outcome.tried),
        "",
        *(f"- {_shown(note)}" for note in outcome.notes),
        *([""] if outcome.notes else []),
        "Lost: nothing." if not outcome.lost else f"Lost: {len(outcome.lost)}.",
        *(f"- {_shown(line)}" for line in outcome.lost),
    ]
    return "\n".join(lines) + "\n"


def write(page: Path, name: str, text: str) -> None:
    """Puts a section into the page, in the order of PARTS, in place of the one that was there."""
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    found = {part[3:].split("\n", 1)[0].strip(): part for part in re.split(r"(?m)^(?=## )", old)[1:]}
    found[name] = text
    page.write_text("\n".join([HEAD, *(found[part].rstrip() + "\n" for part in PARTS if part in found)]), encoding="utf-8")


def machine() -> str:
    """Returns the machine in words: processor, cores, memory, load, versions."""
    import jax
    import psutil

    model = next((line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory().total / 2**30
    versions = f"Python {platform.python_version()}, jax {jax.__version__}"
    return f"{cores} cores of {model}, {memory:.0f} GiB, load {os.getloadavg()[0]:.1f}, {platform.system()}, {versions}"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _shown(line: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line).replace("<", "&lt;").replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
