"""`omni-jax push`: an adapter with its model card to the Hub."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path

from omni_jax.config.hub_name import HUB_NAME
from omni_jax.types import InputError

EXAMPLE = 'omni-jax push --model runs/mine --repo me/my-adapter --base tsinghua-ee/WAVE-7B --data "60,000 clips of my archive"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="workdir of 'omni-jax train', or a converted folder with an adapter")
    parser.add_argument("--step", type=int, metavar="N", help="of a workdir: the checkpoint of step N (default: the newest)")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="repository on the Hub; created if it does not exist")
    parser.add_argument("--base", required=True, metavar="OWNER/NAME", help="base checkpoint on the Hub")
    parser.add_argument("--data", required=True, metavar="TEXT", help="what it was trained on, in words, for the card")
    parser.add_argument("--license", metavar="ID", help="licence of the adapter, as the Hub lists them")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--out", metavar="DIR", help="write adapter and card to this new folder, and upload nothing")


def run(args: argparse.Namespace) -> int:
    """Exports the adapter, writes its card, and uploads both unless --out keeps them here; returns the exit status."""
    for option in ("repo", "base"):
        if HUB_NAME.fullmatch(getattr(args, option)) is None:
            raise InputError(f"--{option} {getattr(args, option)}: is not a name on the Hub; write owner/name")
    if not args.data.strip():
        raise InputError("--data: is empty; say in words what the adapter was trained on")

    from omni_jax.api.publishing import model_card, write_adapter, write_card
    from omni_jax.api.weights import open_model
    from omni_jax.conversion.hub import upload

    source = open_model(args.model, args.step)
    with contextlib.ExitStack() as stack:
        folder = Path(args.out) if args.out else Path(stack.enter_context(tempfile.TemporaryDirectory())) / "adapter"
        write_adapter(source, folder, args.base)
        write_card(folder, model_card(source, repo=args.repo, base=args.base, data=args.data, licence=args.license))
        if args.out:
            print(f"{folder}: adapter and card; upload them with: hf upload {args.repo} {folder}")
            return 0
        print(f"{args.repo}: {upload(folder, args.repo, private=args.private)}")
    return 0
