"""`omni-jax embed`: a manifest of clips to one file of embeddings."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, cast

from etils import epath

from omni_jax.cli.argtypes import add_truncate_dim, check_timeout, part, positive, whole
from omni_jax.cli.embedding import add_input_arguments, beside, embed, parse_tables, report, sample_line, usable_tables
from omni_jax.cli.model_arguments import add_preset_arguments, check_preset, choose_preset, load_model, named_model
from omni_jax.cli.on_ray import add_actor_arguments, add_ray_argument, check_ray, embedding_on_ray
from omni_jax.cli.source import read_source
from omni_jax.cli.status import DONE, DONE_WITH_SKIPPED, INTERRUPTED, STOPPED_AND_SAVED
from omni_jax.types import InputError

if TYPE_CHECKING:
    from omni_jax.api import OmniRetriever
    from omni_jax.api.embedding_files import EmbeddingFile
    from omni_jax.engines.ray_embed import RayEmbedding

EXAMPLE = "omni-jax embed --model omni7b --manifest clips.jsonl --out clips.npz --tables text,video,audio,av,tv,at"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_input_arguments(parser)
    parser.add_argument("--out", type=epath.Path, required=True, metavar="FILE.npz", help="embedding file to write")
    add_preset_arguments(parser)
    add_ray_argument(parser)
    add_actor_arguments(parser)
    parser.add_argument(
        "--part", type=part, metavar="I/N", help="embed the I-th of N slices (from 0), written as FILE-I-of-N.npz; eval reads all"
    )
    parser.add_argument(
        "--file-size",
        type=positive(float),
        default=2.0,
        metavar="GIB",
        help="split larger tables into FILE-I-of-N.npz; FILE.npz then lists these files (default: %(default)g)",
    )
    add_truncate_dim(parser)
    parser.add_argument("--no-normalize", action="store_true", help="do not scale vectors to length 1")
    parser.add_argument(
        "--sample",
        type=whole,
        default=256,
        metavar="N",
        help="with --weights int8-dynamic: records also embedded with int8, to measure the loss (default: %(default)s, 0: none)",
    )
    parser.add_argument("--official-keys", action="store_true", help="write '{id}__table' arrays, as the published extractor does")


def run(args: argparse.Namespace) -> int:
    """Returns the exit status: 0, 1 when records were skipped, 75 when SIGTERM and 130 when Ctrl-C stopped it; what is finished is kept."""
    check_timeout(args)
    check_ray(args)
    check_preset(args)
    source = named_model(args)
    chosen = choose_preset(args, source)
    tables = parse_tables(args.tables)
    if args.out.suffix != ".npz":
        raise InputError(f"--out {args.out}: the name of an embedding file ends in .npz")

    from omni_jax.api.embedding_files import Making, embedding_files
    from omni_jax.retrieval.embedding_file import part_path
    from omni_jax.retrieval.npz import check_place

    check_place(first := part_path(args.out, *(args.part or (0, 1))))
    manifest = read_source(args)
    tables = usable_tables(args, manifest, tables, first)
    with contextlib.ExitStack() as held:
        model = load_model(args, source, chosen) if args.ray is None else held.enter_context(embedding_on_ray(args, source, chosen))
        if args.truncate_dim is not None and args.truncate_dim > model.dim:
            raise InputError(f"--truncate-dim {args.truncate_dim}: the model's vectors have {model.dim} dimensions; keep so many at most")
        making = Making(tables, model.dim, model.made_with(normalize=not args.no_normalize), args.truncate_dim, args.official_keys)
        files = embedding_files(args.out, manifest, making, args.part, int(args.file_size * 2**30))
        bad = done = 0
        for file in files:
            stopped, embedded, skipped = _embed_file(args, model, file, tables)
            if stopped:
                return stopped
            bad, done = bad + skipped, done + embedded
    if not done:
        raise InputError(f"{args.manifest}: no record could be embedded; {beside(files[0].out, 'errors')} says why")
    if len(files) > 1:
        print(f"{args.out}: {done} records in {len(files)} files, which this name lists")
    return DONE_WITH_SKIPPED if bad else DONE


def _embed_file(
    args: argparse.Namespace, model: OmniRetriever | RayEmbedding, file: EmbeddingFile, tables: tuple[str, ...]
) -> tuple[int, int, int]:
    """Writes one file. Returns the exit status where it was stopped (else 0), how many records it has, and how many were skipped."""
    from omni_jax.cli.stopping import Terminated, sigterm_raises
    from omni_jax.retrieval.embedding_pass import assemble

    total, problems = len(file.manifest.records), len(file.manifest.problems)
    if (there := file.written()) is not None:
        print(f"{file.out}: {there} records, finished before", file=sys.stderr)
        return DONE, there, total - there + problems
    journal, left = file.journal, file.left
    try:
        with sigterm_raises():
            what = f"embed {file.index + 1}/{file.of}" if file.several else "embed"
            for done in embed(args, model, left, tables, what, done=total - len(left), shapes=journal.shapes):
                journal.add(done)
    except (Terminated, KeyboardInterrupt) as e:
        kept = f"{len(journal.finished())} of {total} records" + (f" of {file.out.name}" if file.several else "")
        by, status = ("SIGTERM", STOPPED_AND_SAVED) if isinstance(e, Terminated) else ("Ctrl-C", INTERRUPTED)
        print(f"\nstopped by {by}; {kept} are kept: run it again to resume", file=sys.stderr)
        return status, 0, 0
    outcome = assemble(file.manifest.records, journal.parts)
    bad = report(file.out, file.manifest, outcome)
    count, names = len(outcome.table.ids), file.finish(outcome.table)
    if names:
        print(f"{file.out}: {count} records, tables {', '.join(names)}; {outcome.padded_share:.0%} of the tokens were padding")
    if args.weights == "int8-dynamic" and args.ray is None and args.sample and count and not file.index:
        print(sample_line(args, cast("OmniRetriever", model), file.manifest.records, outcome.table))
    return DONE, count, bad
