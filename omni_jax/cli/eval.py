"""`omni-jax eval`: the 12-direction table of an embedding file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni_jax.cli.argtypes import add_truncate_dim
from omni_jax.config.made_with import listed, made_otherwise
from omni_jax.types import EmbeddingTable, InputError

if TYPE_CHECKING:
    from omni_jax.retrieval.metrics import Scores

EXAMPLE = "omni-jax eval bench.npz --ties worst --json bench.json --html bench.html --compare published --compare wave7b.npz"

TIES = ("optimistic", "average", "worst")  # those of omni_jax.retrieval, which is imported late
PUBLISHED = "published"


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
        help=f"compare with an embedding file, a result written with --json, or {PUBLISHED!r} ({PUBLISHED}:NAME for another "
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
    import jax
    import numpy as np
    from jax.sharding import Mesh

    from omni_jax.cli.inputs import read_captioned, read_result, read_tables
    from omni_jax.cli.report import page, records_of
    from omni_jax.retrieval import compare, format_comparison, format_differences, format_table, score
    from omni_jax.retrieval.embedding_file import check_place, output_file
    from omni_jax.retrieval.published import BENCH, published, sources
    from omni_jax.retrieval.report import Other
    from omni_jax.retrieval.rows import truncated
    from omni_jax.retrieval.storage import changes, format_changes, stored
    from omni_jax.retrieval.table import format_left_out

    for out in filter(None, (args.json, args.html)):
        check_place(out)
    records = records_of(args.manifest, args.media)
    mesh = Mesh(np.array(jax.devices()), ("rows",))

    def scored(table: EmbeddingTable, relevance: dict[str, list[str]] | None = None) -> Scores:
        # A file without ids has row numbers, which are not held against another file's ids.
        if relevance is None and table.own:
            relevance = {name: list(table.ids_of(name)) for name in table.tables}
        ids = table.ids if relevance is None and table.named else None
        return score(table.tables, ids=ids, relevance=relevance, ties=args.ties, mesh=mesh)

    embeddings, relevance, left_out = read_captioned(args.files, args.captions, incomplete=args.incomplete)
    embeddings = truncated(embeddings, args.truncate_dim)
    if records and not embeddings.named:
        raise InputError(f"{args.files[0]}: has no ids, by which --manifest and --media find its records; add ids=FILE, one id a line")
    notes: list[str] = []
    kept = dataclasses.replace(embeddings, tables=stored(embeddings.tables, args.storage))
    scores = scored(kept, relevance)
    if args.storage != "float32":
        change = changes(scored(embeddings, relevance).result, scores.result)
        scores.result["storage"] = {"dtype": args.storage, "change": change}
        notes.append(format_changes(change, args.storage))
    if any(left_out.values()):
        scores.result["left_out"] = {name: len(ids) for name, ids in left_out.items()}
        notes.append(format_left_out(left_out, captions=len((relevance or {})["text"]), clips=len(embeddings.ids)))
    result = scores.result
    if embeddings.made_with is not None:
        result["made_with"] = embeddings.made_with
    columns: dict[str, dict[str, Any]] = {}
    own = _add(columns, args.files[0] if len(args.files) == 1 else f"{args.files[0]} +{len(args.files) - 1}", result)
    asked = [path.partition(":")[2] or BENCH for path in args.compare if path.partition(":")[0] == PUBLISHED]
    known = [Other(name, row, True) for benchmark in asked or [BENCH][: not args.captions] for name, row in published(benchmark).items()]
    others: list[Other] = []
    for path in args.compare:
        if path.partition(":")[0] == PUBLISHED:
            rows = published(path.partition(":")[2] or BENCH)
            columns |= rows
            notes.append(sources(rows))
        elif path.endswith(".json"):
            read = read_result(path)
            name = _add(columns, path, read)
            notes += _made_otherwise(own, result, name, read)
            others.append(Other(name, read))
        else:
            if args.captions:
                raise InputError(f"--compare {path}: with --captions, score it alone with --json and compare with that file")
            table = read_tables(path.split(",") if "=" in path else [path], incomplete=args.incomplete)
            theirs = scored(dataclasses.replace(table, tables=stored(table.tables, args.storage)))
            name = _add(columns, path, theirs.result)
            notes += _made_otherwise(own, result, name, {"made_with": table.made_with, "storage": result.get("storage")})
            try:
                differences = compare(scores.hit_counts, theirs.hit_counts)
                result.setdefault("comparisons", {})[name] = {key: found.row() for key, found in differences.items()}
                notes.append(format_differences(own, name, differences))
            except InputError as e:
                differences = None
                notes.append(f"No paired test with {name}: {e}.")
            others.append(Other(name, theirs.result, differences=differences))
    if jax.process_index() != 0:
        return 0
    if args.json:
        with output_file(args.json) as file:
            file.write(json.dumps(result, indent=2, allow_nan=False).encode() + b"\n")
    print(format_table(result))
    for text in ([format_comparison(columns)] if args.compare else []) + notes:
        print("\n" + text)
    if args.html:  # last: whatever its pictures and sounds meet with, the figures have been printed
        sys.stdout.flush()
        text = page(own, kept, scores, [*known, *others], records, with_media=args.media is not None)
        with output_file(args.html) as file:
            file.write(text.encode())
    return 0


def _made_otherwise(own: str, result: Mapping[str, Any], name: str, other: Mapping[str, Any]) -> list[str]:
    """Lines about what two results shown side by side do not have in common, besides their vectors."""
    lines = []
    ours, theirs = result.get("made_with"), other.get("made_with")
    if ours is not None and theirs is not None:
        found = made_otherwise(theirs, ours)
        lines += [f"Made otherwise: {name} there, {own} here: {listed(found)}."] if found else []
    elif ours is not None or theirs is not None:
        lines.append(f"What {own if ours is None else name} was made with is not recorded: whether both were made alike is unknown.")
    kept, other_kept = ((row.get("storage") or {}).get("dtype", "float32") for row in (result, other))
    if kept != other_kept:
        lines.append(f"Note: {own} was scored with tables kept as {kept}, {name} as {other_kept}.")
    return lines


def _add(columns: dict[str, dict[str, Any]], path: str, result: dict[str, Any]) -> str:
    """Adds a column and returns its heading: the file's name, or its path where two names are equal."""
    name = path if Path(path).name in columns else Path(path).name
    columns[name] = result
    return name
