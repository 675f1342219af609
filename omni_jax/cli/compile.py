"""`omni-jax compile`: what a run needs on a topology, asked of the TPU compiler before anything is rented."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from etils import epath

from omni_jax.cli.argtypes import positive
from omni_jax.cli.config_file import add_config_arguments, planned_model, read_config
from omni_jax.cli.progress import Waiting
from omni_jax.cli.status import BAD_INPUT, DONE
from omni_jax.config import ConfigError

EXAMPLE = "omni-jax compile --config omniretriever_7b --topology v5e:4x4 --config.losses.negatives=global"

PROGRAMS = ("train", "embed", "evaluate")
SHORT = {"eval": "evaluate"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--topology", required=True, metavar="CHIP:GRID", help="chips of a slice, as v5e:4x4, v5p:4x4x4, v6e:64")
    parser.add_argument("--slices", type=int, metavar="N", help="slices of that size (default: the config's)")
    parser.add_argument(
        "--mesh", metavar="AXES", help="within a slice, as data=1,fsdp=16,tensor=1 (default: the config's; --sweep: several)"
    )
    parser.add_argument(
        "--programs", default=",".join(PROGRAMS), metavar="LIST", help="comma-separated, among train,embed,evaluate (default: all)"
    )
    parser.add_argument("--kinds", default="0,1,2", metavar="LIST", help="indices in the period-3 cycle of step kinds (default: all)")
    parser.add_argument(
        "--weights",
        choices=("int8", "int8-dynamic"),
        help="hold large matrices in int8; in training, the frozen ones (default: the config's)",
    )
    parser.add_argument(
        "--caption-tokens",
        type=positive(int),
        default=128,
        metavar="N",
        help="longest caption to plan for, in tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--utilisation",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="share of peak arithmetic to assume where libtpu is missing (default: %(default)s)",
    )
    parser.add_argument("--price", type=positive(float), metavar="MONEY", help="price of a chip-hour; prints the cost as well")
    parser.add_argument("--sweep", action="store_true", help="try batch, remat and mesh for the first of --kinds, and recommend")
    parser.add_argument("--full-effort", action="store_true", help="compile as a run would: predicts time and cost (minutes a program)")
    parser.add_argument("--table", type=epath.Path, metavar="FILE.json", help="add the plan to a table, also written as FILE.md")
    parser.add_argument("--json", type=epath.Path, metavar="OUT.json", help="write everything found")


def run(args: argparse.Namespace) -> int:
    """Prints the plan and returns 0, or 2 where something does not fit."""
    chosen = _among(args.programs, PROGRAMS, "--programs")
    counts = [int(c) for c in _among(args.kinds, ("0", "1", "2"), "--kinds")]
    if not 0 < args.utilisation <= 1:
        raise ConfigError(f"--utilisation {args.utilisation}: must be above 0 and at most 1")
    if args.sweep and args.programs != ",".join(PROGRAMS):
        raise ConfigError(f"--programs {args.programs}: --sweep tries the step of training alone; leave one of them out")
    if args.sweep and args.price:
        raise ConfigError(f"--price {args.price:g}: --sweep counts no costs; leave one of them out, and compile what it recommends")
    if args.sweep and args.table:
        raise ConfigError("--table takes plans, and --sweep makes none: leave one out, or write --json")

    from omni_jax.planning.devices import prepare_environment

    prepare_environment()  # before jax is loaded
    from omni_jax.planning import plan, report, sweep, table

    for file in filter(None, (args.table, args.json)):
        file.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written is said before minutes of compiling
    if args.table:
        table.read(args.table)
    config = read_config(args.config, args.overrides)
    model, note = planned_model(config.model)
    slices = config.mesh.slices if args.slices is None else args.slices
    with Waiting("compile", "programs") as waiting:
        asked = {name: getattr(args, name) for name in ("mesh", "caption_tokens", "utilisation", "price", "full_effort", "weights")}
        request = plan.Request(config, model, args.topology, slices, **asked, watch=waiting)
        if args.sweep:
            tried = plan.swept(request, counts[0], _say)
            found: dict[str, Any] = {"sweep": tried}
        else:
            found = plan.make(request, chosen, counts, _say)
    if args.sweep:
        best = found["sweep"][0]
        print("\n".join(sweep.choice_line(record) for record in found["sweep"]))
        fits = best["status"] == "fits"
        print(f"\nrecommended: {plan.flags(best['choice'])}" if fits else f"\nnothing fits: {best['out_of_memory']['change']}")
    else:
        if note:
            found["notes"].insert(0, note)
        print(report.text(found))
        if args.table:
            table.add(args.table, found, plan.command(request, chosen, counts))
        fits = all(program["status"] != "out of memory" for program in found["programs"])
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return DONE if fits else BAD_INPUT


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _among(given: str, allowed: tuple[str, ...], flag: str) -> list[str]:
    names = [SHORT.get(name.strip(), name.strip()) for name in given.split(",") if name.strip()]
    if not names or any(name not in allowed for name in names):
        raise ConfigError(f"{flag} {given!r}: give one or more of {', '.join(allowed)}")
    return names
