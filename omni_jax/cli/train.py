"""`omni-jax train`: from a config and clips to checkpoints, on one host or as one of several processes."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING

from etils import epath

from omni_jax.cli.config_file import add_config_arguments, read_config
from omni_jax.cli.status import DONE, INTERRUPTED, STOPPED_AND_SAVED
from omni_jax.types import InputError

if TYPE_CHECKING:
    from omni_jax.cli.stopping import Signals

EXAMPLE = "omni-jax train --config omniretriever_7b --config.data.train=shards --workdir runs/omni7b"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--workdir", type=epath.Path, required=True, metavar="DIR", help="output directory; a run that it holds is resumed")
    add_process_arguments(parser)


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options by which the processes of a run find each other."""
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="process 0 of several, 'auto' on a pod (default: $OMNI_JAX_COORDINATOR)")
    parser.add_argument("--processes", type=int, metavar="N", help="number of processes (default: $OMNI_JAX_PROCESSES)")
    parser.add_argument("--process", type=int, metavar="I", help="index of this process, from 0 (default: $OMNI_JAX_PROCESS)")


def join(args: argparse.Namespace) -> None:
    """Joins the other processes of the run, before jax is used. Raises InputError when they cannot connect."""
    from omni_jax.parallel import start

    try:
        start(args.coordinator, args.processes, args.process)
    except (ValueError, RuntimeError) as e:
        raise InputError(f"the processes could not connect: {e}") from None


def run(args: argparse.Namespace) -> int:
    """Trains and returns the exit status: 0, 75 when SIGTERM or 130 when Ctrl-C stopped it after saving."""
    from omni_jax.cli.stopping import signals_noted

    with signals_noted() as signals, contextlib.ExitStack() as shown:
        return _train(args, signals, shown)


def _train(args: argparse.Namespace, signals: Signals, shown: contextlib.ExitStack) -> int:
    """Trains, with lines before the loop begins, and a bar and lines above it from then on."""
    config = read_config(args.config, args.overrides)

    from omni_jax.cli.progress import Progress

    join(args)

    import jax

    from omni_jax.api.training import TrainCallbacks, run_training

    first = jax.process_index() == 0
    bar: Progress | None = None

    def log(line: str) -> None:
        if bar is not None:
            bar.note(line)
        elif first:
            print(line, file=sys.stderr)

    def begin(done: int, total: int, clips: int) -> None:
        nonlocal bar
        bar = shown.enter_context(Progress(total, "train", unit="steps", done=done)) if first else None

    def update(number: int, row: dict[str, float]) -> None:
        if bar is not None:
            parts = ", ".join(f"{name} {row[name]:.3f}" for name in ("L_T", "L_D", "L_A") if name in row)
            bar.detail = f"loss {row['loss']:.3f} ({parts}), grad norm {row['grad_norm']:.2f}, {row['clips_per_second']:.1f} clips/s"
            bar.update(number - bar.done)

    outcome = run_training(config, args.workdir, TrainCallbacks(log, begin, update, lambda: bool(signals.seen)))
    if not outcome.finished:
        where = f"{outcome.step} of {outcome.total} steps are saved in {args.workdir}: run it again to resume"
        if outcome.step == outcome.total:
            where = f"all {outcome.total} steps are saved in {args.workdir}, the last evaluation is missing: run it again for it"
        print(f"stopped by {signals.name}; {where}", file=sys.stderr)
        return INTERRUPTED if signals.interrupted else STOPPED_AND_SAVED
    if first:
        print(f"{args.workdir}: {outcome.step} steps; use it as --model, or write PyTorch files with omni-jax convert to-torch")
    return DONE
