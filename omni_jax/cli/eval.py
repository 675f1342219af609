"""`omni-jax eval`: the 12-direction table of an embedding file."""

from __future__ import annotations

import argparse
import functools
import json
import sys

from omni_jax.cli.argtypes import add_truncate_dim, check_apart
from omni_jax.types import InputError

EXAMPLE = "omni-jax eval bench.npz --ties worst --json bench.json --html bench.html --compare published --compare wave7b.npz"

TIES = ("optimistic", "average", "worst")  # those of omni_jax.retrieval, which is imported late


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="embedding file (.npz); several are parts of one set and are read together. Also TABLE=FILE.npy, one a table, and the two "
        "arrays of the published scorer (.npz or .bin)",
    )
    parser.add_argument(
        "--captions", metavar="FILE", help="embedding file of the captions, ids CLIP#NUMBER, where clips have several (see bench-data)"
    )
    parser.add_argument(
        "--storage",
        choices=("float32", "bfloat16"),
        default="float32",
        help="type of the tables in memory; also prints what it changes (default: float32)",
    )
    parser.add_argument(
        "--ties", choices=TIES, default="optimistic", help="how candidates of equal similarity count (default: %(default)s)"
    )
    parser.add_argument("--incomplete", action="store_true", help="score some parts of a set (embed --part) without the others")
    add_truncate_dim(parser, "the files that are scored; those of --compare stay as they are")
    parser.add_argument("--json", metavar="OUT", help="also write the result as JSON")
    parser.add_argument(
        "--compare",
        metavar="FILE",
        action="append",
        default=[],
        help="compare with an embedding file, a result written with --json, or 'published' (published:NAME for another "
        "benchmark, as published:clotho); may be repeated. Over the same records, differences get intervals and p-values. Files of one "
        "table each are joined by commas",
    )
    parser.add_argument("--html", metavar="OUT", help="also write a report as one self-contained page")
    parser.add_argument(
        "--manifest",
        metavar="FILE.jsonl",
        action="append",
        default=[],
        help="captions for the report, and with --media the names of its files; may be repeated (clips and their captions)",
    )
    parser.add_argument(
        "--media",
        metavar="DIR",
        help="show pictures and sounds in the report: the folder that the manifest's paths start from, or, without --manifest, a folder of "
        "files named after their records (clip7.mp4)",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the table and returns the exit status."""
    for flag, value in (("--manifest", " ".join(args.manifest)), ("--media", args.media)):
        if value and not args.html:
            raise InputError(f"{flag} {value}: is for the report; name its file with --html")
    compared = [file for path in args.compare for file in (path, *path.split(","))]
    inputs = [*args.files, *filter(None, [args.captions]), *compared, *args.manifest]
    for flag, out in (("--json", args.json), ("--html", args.html)):
        if out:
            check_apart(flag, out, inputs)
    if args.json and args.json == args.html:
        raise InputError(f"--json {args.json}: is the page of --html, too; name two files")
    import jax
    import numpy as np
    from jax.sharding import Mesh

    from omni_jax.cli.comparing import set_beside
    from omni_jax.cli.inputs import read_captioned
    from omni_jax.cli.report import page, records_of
    from omni_jax.retrieval import format_comparison, format_table, score
    from omni_jax.retrieval.npz import check_place, output_file
    from omni_jax.retrieval.rows import truncated
    from omni_jax.retrieval.storage import changes, format_changes, stored
    from omni_jax.retrieval.table import format_left_out

    for out in filter(None, (args.json, args.html)):
        check_place(out)
    records = records_of(args.manifest, args.media)
    score_of = functools.partial(score, ties=args.ties, mesh=Mesh(np.array(jax.devices()), ("rows",)))

    embeddings, relevance, left_out = read_captioned(args.files, args.captions, incomplete=args.incomplete)
    embeddings = truncated(embeddings, args.truncate_dim)
    if records and not embeddings.named:
        raise InputError(f"{args.files[0]}: has no ids, by which --manifest and --media find its records; add ids=FILE, one id a line")
    notes: list[str] = []
    kept = stored(embeddings, args.storage)
    scores = score_of(kept, relevance=relevance)
    result = scores.result
    if args.storage != "float32":
        change = changes(score_of(embeddings, relevance=relevance).result, result)
        result["storage"] = {"dtype": args.storage, "change": change}
        notes.append(format_changes(change, args.storage))
    if any(left_out.values()):
        result["left_out"] = {name: len(ids) for name, ids in left_out.items()}
        notes.append(format_left_out(left_out, captions=len((relevance or {})["text"]), clips=len(embeddings.ids)))
    if embeddings.made_with is not None:
        result["made_with"] = embeddings.made_with
    beside = set_beside(args, scores, score_of)
    if jax.process_index() != 0:
        return 0
    if args.json:
        with output_file(args.json) as file:
            file.write(json.dumps(result, indent=2, allow_nan=False).encode() + b"\n")
    print(format_table(result))
    for text in ([format_comparison(beside.columns)] if args.compare else []) + notes + beside.notes:
        print("\n" + text)
    if args.html:  # last: whatever its pictures and sounds meet with, the figures have been printed
        sys.stdout.flush()
        text = page(next(iter(beside.columns)), kept, scores, beside.others, records, with_media=args.media is not None)
        with output_file(args.html) as file:
            file.write(text.encode())
    return 0
