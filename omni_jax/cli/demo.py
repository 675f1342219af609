"""`omni-jax demo`: parity with PyTorch on a tiny checkpoint, then a small model that learns from clips made on the spot."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from omni_jax.cli.status import INTERRUPTED, STOPPED_AND_SAVED
from omni_jax.cli.stopping import Signals, interrupts_noted
from omni_jax.config.extras import lacking
from omni_jax.io.messages import as_input_error

EXAMPLE = "omni-jax demo --out demo_out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo_out"), metavar="DIR", help="folder for the results (default: %(default)s)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--parity", action="store_true", help="the comparison with PyTorch alone")
    only.add_argument("--ablation", action="store_true", help="what each loss buys: omni-jax ablate --out DIR/ablation")


def run(args: argparse.Namespace) -> int:
    """Runs the demo and returns the exit status."""
    # Before NumPy is imported. Its threads would fight with the step for the cores: features are small and many.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    _check_place(args.out)
    if args.ablation:
        from omni_jax.cli.main import main

        return main(["ablate", "--out", str(args.out / "ablation")])
    try:
        with interrupts_noted() as signals:
            status = _parts(args, signals)
    except KeyboardInterrupt:
        status = INTERRUPTED
    if status in (INTERRUPTED, STOPPED_AND_SAVED):
        kept = ", ".join(sorted(str(path) for path in args.out.iterdir() if not path.name.startswith("."))) or "nothing yet"
        print(f"the demo was stopped; what is finished stays ({kept}): run it again to resume", file=sys.stderr)
    return status


def _parts(args: argparse.Namespace, signals: Signals) -> int:
    from omni_jax.cli import demo_training, parity

    missing = None if args.parity else lacking()
    try:
        status = parity.compare_with_reference(args.out)
        if signals.seen:
            return INTERRUPTED
        if missing and not status:
            print(f"The second part, which trains, is left out: {missing}")
        return status if status or args.parity or missing else demo_training.learn(args.out, demo_training.DEMO, signals)
    except demo_training.Stopped as stop:
        return stop.status


def _check_place(out: Path) -> None:
    """Makes the folder. Raises InputError at once where nothing can be written into it: the first file would come minutes later."""
    with as_input_error(f"--out {out}: cannot be written", "choose another place"):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
