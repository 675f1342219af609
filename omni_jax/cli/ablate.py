"""`omni-jax ablate`: what each loss, or any other field of a config, buys, over several seeds, in one table."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from omni_jax.cli.config_file import add_config_arguments, read_config
from omni_jax.cli.status import DONE, INTERRUPTED, STOPPED_AND_SAVED
from omni_jax.config.extras import lacking
from omni_jax.types import InputError

EXAMPLE = """omni-jax ablate --arms L_A,L_A+L_D,L_A+L_T,all --seeds 5 --start warm --out ablation
omni-jax ablate --arms all --arm "micro=all --config.losses.negatives=micro" --out negatives"""
ARMS = "L_A,L_A+L_D,L_A+L_T,all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser, default="ablation")
    parser.add_argument("--arms", default=None, metavar="A,B", help=f"sums of losses; the first is the baseline (default: {ARMS})")
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="NAME=SETTINGS",
        help="one more arm: a sum of losses, --config.a.b=value, or both, separated by spaces; may be given several times",
    )
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="runs of each arm, with seeds 0 to N-1 (default: %(default)s)")
    parser.add_argument(
        "--start", choices=("random", "base", "warm"), default="random", help="weights that the arms start from (default: %(default)s)"
    )
    parser.add_argument(
        "--equal", choices=("steps", "cpu_time"), default="steps", help="what all arms have in equal amounts (default: %(default)s)"
    )
    parser.add_argument("--warm-steps", type=int, default=1200, metavar="N", help="most steps of a warm start (default: %(default)s)")
    parser.add_argument(
        "--warm-every", type=int, default=100, metavar="N", help="steps between two evaluations of a warm start (default: %(default)s)"
    )
    parser.add_argument("--warm-losses", default="L_A", metavar="A+B", help="losses of a warm start, or all (default: %(default)s)")
    parser.add_argument(
        "--warm-margin",
        type=float,
        default=5.0,
        metavar="POINTS",
        help="R@1 by which two modalities together beat the better of the two in a warm start (default: %(default)g)",
    )
    parser.add_argument("--clips", type=int, nargs=2, metavar=("TRAIN", "TEST"), help="synthetic clips to train on and to score")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of runs and tables; what is finished there is kept")


def run(args: argparse.Namespace) -> int:
    """Makes the runs, writes DIR/START-EQUAL.json, .txt, .md and .html, prints the table and returns the exit status."""
    if advice := lacking():
        raise InputError(advice)
    from omni_jax.ablation.arms import parse_arms

    losses = args.arms if args.arms is not None else "" if args.arm else ARMS
    arms = parse_arms(losses, args.arm)
    configs = {arm.name: read_config(args.config, [*args.overrides, *arm.changes]) for arm in arms}
    if args.seeds < 2:
        raise InputError(f"--seeds {args.seeds}: an interval over seeds needs at least 2")
    from omni_jax.ablation.runs import Ablation, AblationCallbacks, Stopped, carry_out
    from omni_jax.ablation.table import as_markdown, as_page, as_text, result_of
    from omni_jax.cli.progress import Progress
    from omni_jax.cli.stopping import signals_noted
    from omni_jax.data.synthetic_parts import PartsConfig
    from omni_jax.io import atomic_write_text

    parts = PartsConfig(train=args.clips[0], validation=args.clips[1], test=args.clips[1]) if args.clips else PartsConfig()
    given = (args.out, configs, args.seeds, args.start, args.equal, parts, args.warm_steps, args.warm_every, args.warm_losses)
    ablation = Ablation(*given, warm_margin=args.warm_margin)
    args.out.mkdir(parents=True, exist_ok=True)
    with signals_noted() as signals, Progress(ablation.runs, "ablate", unit="runs") as bar:
        what, at, of = "", 0, 0  # what runs now, its step, and of how many

        def begin(name: str, total: int, done: int) -> None:
            nonlocal what, at, of
            what, at, of = name, 0, total
            advance(done)

        def advance(steps: int, runs: int = 0) -> None:
            nonlocal at
            at += steps
            bar.detail = f"{what}: step {at} of {of}"
            bar.update(runs)

        callbacks = AblationCallbacks(begin, advance, lambda: advance(0, 1), lambda: bool(signals.seen))
        try:
            outcome = carry_out(ablation, callbacks)
        except Stopped as stop:
            print(f"stopped by {signals.name} in {stop}; what is finished is kept in {args.out}: run it again to resume", file=sys.stderr)
            return INTERRUPTED if signals.interrupted else STOPPED_AND_SAVED
    result = result_of(ablation, arms, outcome, _command(args))
    stem = args.out / f"{args.start}-{args.equal}"
    text = as_text(result)
    for ending, content in (("json", json.dumps(result, indent=1)), ("txt", text), ("md", as_markdown(result)), ("html", as_page(result))):
        atomic_write_text(Path(f"{stem}.{ending}"), content.rstrip("\n") + "\n")
    print(f"{text}\n\n{stem}.txt, .md, .json and .html")
    return DONE


def _command(args: argparse.Namespace) -> str:
    """Returns the command line that makes the same table."""
    usual = argparse.ArgumentParser()
    add_arguments(usual)
    parts = ["omni-jax", "ablate"]
    for name in ("config", "arms", "arm", "seeds", "start", "equal", "warm_steps", "warm_every", "warm_losses", "warm_margin"):
        if (value := getattr(args, name)) != usual.get_default(name) or name in ("seeds", "start", "equal"):
            for one in value if isinstance(value, list) else [value]:
                parts += [f"--{name.replace('_', '-')}", str(one)]
    parts += ["--clips", *map(str, args.clips)] if args.clips else []
    parts += [f"--config.{change}" for change in args.overrides]
    return shlex.join([*parts, "--out", args.out.name])
