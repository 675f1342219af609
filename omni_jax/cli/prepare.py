"""`omni-jax prepare`: a manifest of clips to shards that training reads without decoding."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from omni_jax.cli.argtypes import add_decoding_arguments, check_timeout, positive
from omni_jax.cli.model_arguments import add_override_argument
from omni_jax.cli.on_ray import add_ray_argument, check_ray, local_cpus
from omni_jax.cli.source import add_source_arguments, read_source
from omni_jax.cli.status import DONE, DONE_WITH_SKIPPED, STOPPED_AND_SAVED
from omni_jax.config import PRESETS, preset
from omni_jax.types import InputError

if TYPE_CHECKING:
    from omni_jax.data.prepare import Preparation

EXAMPLE = "omni-jax prepare --manifest clips.jsonl --out shards --workers 16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_source_arguments(parser)
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder to write, local or at gs:// or s3://; an interrupted preparation continues"
    )
    parser.add_argument("--shards", type=positive(int), metavar="N", help="files to write (default: one for every 256 clips)")
    parser.add_argument("--preset", default="training", help=f"one of {', '.join(PRESETS)} (default: %(default)s)")
    add_override_argument(parser)
    parser.add_argument("--media-root", metavar="DIR", help="folder that media paths start from (default: the manifest's)")
    add_decoding_arguments(parser)
    add_ray_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Prepares and returns the exit status: 0, 1 when records were skipped, 75 when SIGTERM stopped it after saving."""
    chosen = preset(args.preset).override(args.overrides)
    check_timeout(args)
    check_ray(args)

    from omni_jax.data.prepare import Preparation
    from omni_jax.data.shards import TEXT_FIELDS
    from omni_jax.io import scratch_folder
    from omni_jax.io.remote import RemoteFolder, StoreError, is_remote

    idle = [text for text in args.overrides if text.partition("=")[0] in TEXT_FIELDS]
    if idle:
        print(
            f"--set {', '.join(idle)}: changes prompts alone, which shards do not hold; set it in the run's data.preset_fields",
            file=sys.stderr,
        )

    manifest = read_source(args)
    for note in manifest.notes:
        print(f"{args.manifest}: {note}", file=sys.stderr)
    store = RemoteFolder(args.out) if is_remote(args.out) else None
    with contextlib.ExitStack() as held:
        # Shards are written on the local disk and go to the store when they are whole.
        out = held.enter_context(scratch_folder("omni_jax-prepare")) if store else Path(args.out)
        try:
            work = Preparation(out, manifest.records, manifest.problems, chosen, args.shards, store)
        except StoreError:
            raise
        except InputError as error:
            raise InputError(f"{args.manifest}: {error}") from None
        return _prepare(args, work, args.out if store else None)


def _prepare(args: argparse.Namespace, work: Preparation, store: str | None) -> int:
    """Runs a preparation, whose folder may be in a store, and says what came of it; returns the exit status."""
    from omni_jax.cli.progress import Progress
    from omni_jax.cli.stopping import Terminated, sigterm_raises
    from omni_jax.data.prepare import ERRORS

    done = work.done
    try:
        with sigterm_raises(), Progress(work.total, "prepare", done=done) as progress:
            if args.ray is None:
                workers = args.workers if args.workers is not None else local_cpus(args)
                counts = work.run(workers, args.timeout)
            else:
                from omni_jax.engines.ray_prepare import write_shards

                counts = write_shards(work.begin(), args.ray, local_cpus(args), args.timeout, progress, store)
            with contextlib.closing(counts):
                for count in counts:
                    progress.update(count)
    except Terminated:
        print(f"stopped by SIGTERM; finished shards in {args.out} are kept: run it again to resume", file=sys.stderr)
        return STOPPED_AND_SAVED
    summary = work.finish()
    if summary.errors:
        listed = f"{args.out}/{ERRORS}"
        print(f"skipped records: {len(summary.errors)}, listed in {listed}; the first: {summary.errors[0].reason}", file=sys.stderr)
    if summary.warnings:
        print(f"repaired records: {len(summary.warnings)}; the first: {summary.warnings[0]}", file=sys.stderr)
    if not summary.clips:
        raise InputError(f"{args.manifest}: no record could be prepared; {args.out}/{ERRORS} says why")
    silent = f", {summary.silent} of them with silence for a missing audio track" if summary.silent else ""
    print(f"{args.out}: {summary.clips} clips{silent}")
    return DONE_WITH_SKIPPED if summary.errors else DONE
