"""`omni-jax convert`: PyTorch checkpoints in, PyTorch checkpoints and PEFT adapters out."""

from __future__ import annotations

import argparse
import contextlib
import sys

from omni_jax.cli import stopping
from omni_jax.cli.status import TERMINATED

EXAMPLE = """omni-jax convert to-jax --base WAVE-7B --adapter OmniRetriever-7B --out omni7b
omni-jax convert to-torch --model omni7b --base-out wave --adapter-out adapter"""

_TO_JAX = "write a folder that every other command reads, from a WAVE-7B checkpoint and a LoRA adapter"
_TO_TORCH = "give the PyTorch checkpoint and the PEFT adapter back, bit for bit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    to_jax = _direction(directions, "to-jax", _TO_JAX, EXAMPLE.splitlines()[0])
    to_jax.add_argument("--base", required=True, metavar="DIR", help="folder with config.json and weights, safetensors or .bin")
    to_jax.add_argument("--adapter", metavar="DIR", help="PEFT adapter folder; kept apart from the base unless --merge-adapter")
    to_jax.add_argument("--beats", metavar="FILE.pt", help="BEATs weights and settings to use instead of the base's; read, never executed")
    to_jax.add_argument("--out", required=True, metavar="DIR", help="new folder; it appears only when complete")
    to_jax.add_argument(
        "--dtype",
        choices=("keep", "bfloat16", "float32"),
        default="keep",
        help="type of the stored weights (default: keep, which makes the way back bit-equal)",
    )
    to_jax.add_argument(
        "--weights",
        choices=("keep", "int8"),
        default="keep",
        help="int8 rounds the base's large matrices: half the size, and no way back to a base checkpoint (default: keep)",
    )
    to_jax.add_argument(
        "--merge-adapter", action="store_true", help="fold the adapter into the base; only a merged base can be exported then"
    )
    to_jax.add_argument(
        "--backbone",
        choices=("auto", "wave", "nemotron"),
        default="auto",
        help="how to read a plain Qwen2.5-Omni thinker: with WAVE's fusion head, freshly initialised (auto), or as Omni-Embed-Nemotron",
    )
    to_torch = _direction(directions, "to-torch", _TO_TORCH, EXAMPLE.splitlines()[1])
    to_torch.add_argument(
        "--model", required=True, metavar="DIR", help="folder written by 'omni-jax convert to-jax', or workdir of 'omni-jax train'"
    )
    to_torch.add_argument("--step", type=int, metavar="N", help="of a workdir: the checkpoint of step N (default: the newest)")
    to_torch.add_argument("--base-out", metavar="DIR", help="new folder for the base checkpoint, split and typed as the source was")
    to_torch.add_argument(
        "--format",
        choices=("keep", "safetensors", "bin"),
        default="keep",
        help="of the base's weight files (default: keep, as they were read)",
    )
    to_torch.add_argument(
        "--weight-norm",
        choices=("keep", "old", "new"),
        default="keep",
        help="names of the weight norm of BEATs' pos_conv: weight_g and weight_v (old) or parametrizations.weight.original0 and 1 (new); "
        "README.omni_jax.md beside the weights says which a model loads (default: keep)",
    )
    to_torch.add_argument("--adapter-out", metavar="DIR", help="new folder for the PEFT adapter; float32 where it was trained here")


def run(args: argparse.Namespace) -> int:
    try:
        with stopping.sigterm_raises():
            return _convert(args)
    except stopping.Terminated:  # past new_folder, which has removed what was begun
        print("omni-jax: stopped by SIGTERM, nothing is left of the conversion", file=sys.stderr)
        return TERMINATED


def _convert(args: argparse.Namespace) -> int:
    from omni_jax import conversion
    from omni_jax.cli.progress import Progress

    with contextlib.ExitStack() as stack:
        bars: list[Progress] = []

        def progress(done: int, total: int) -> None:
            if not bars:  # made with the first tensor, so that bad input is answered by its one line alone
                unit = "MB" if args.direction == "to-jax" else "M values"
                bars.append(stack.enter_context(Progress(total // 1_000_000, f"convert {args.direction}", unit=unit)))
            bars[0].update(done // 1_000_000 - bars[0].done)

        if args.direction == "to-jax":
            asked = {name: getattr(args, name) for name in ("adapter", "beats", "dtype", "weights", "merge_adapter", "backbone")}
            made = conversion.to_jax(args.base, args.out, **asked, progress=progress)
            how = [f"dtype {args.dtype}", *(["weights int8"] if args.weights == "int8" else [])]
            what = f"{args.out} ({', '.join([*how, *(['adapter merged'] if args.merge_adapter else [])])})"
        else:
            from omni_jax.api.weights import open_model

            source = open_model(args.model, args.step)
            outputs = {"base_out": args.base_out, "adapter_out": args.adapter_out}
            form = {"file_format": args.format, "weight_norm": args.weight_norm}
            made = source.to_torch(args.base_out, **outputs, **form, progress=progress)
            what = " and ".join(out for out in outputs.values() if out) + (f" (step {source.step})" if source.step is not None else "")
    for note in made.notes:
        print(f"note: {note}", file=sys.stderr)
    if made.left_out:
        from omni_jax.train.trainable import group_of

        groups: dict[str, int] = {}
        for path, values in made.left_out.items():
            groups[group_of(path)] = groups.get(group_of(path), 0) + values
        parts = ", ".join(f"{group} ({values:,} values)" for group, values in groups.items())
        flag = "--adapter-out" if args.adapter_out is None else "--base-out"
        print(f"trained too, and not written: {parts}; {flag} writes them", file=sys.stderr)
    print(f"{what}: {made.tensors} tensors, {made.parameters:,} parameters, {made.nbytes:,} bytes, {made.seconds:.1f} s")
    if made.fresh:
        print(f"freshly initialised, because {args.base} has none: {', '.join(made.fresh)}; embeddings mean nothing until they are trained")
    return 0


def _direction(directions: argparse._SubParsersAction, name: str, text: str, example: str) -> argparse.ArgumentParser:
    return directions.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
