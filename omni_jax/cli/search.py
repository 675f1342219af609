"""`omni-jax search`: the records of an embedding file nearest to a text, a sound, a video or both."""

from __future__ import annotations

import argparse
import functools
import json
import sys
import warnings

from omni_jax.cli.argtypes import add_truncate_dim, positive
from omni_jax.cli.model_arguments import add_index_arguments, check_preset, model_for_index
from omni_jax.cli.printing import one_line
from omni_jax.cli.status import DONE, DONE_WITH_SKIPPED
from omni_jax.config import TABLES
from omni_jax.types import InputError

EXAMPLE = 'omni-jax search --model omni7b --index clips.npz --text "a whistle over a gradient sky" -k 5'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_index_arguments(parser)
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--text", metavar="TEXT", help="search by a caption")
    query.add_argument("--audio", metavar="FILE", help="search by a sound, or by the sound of a video")
    query.add_argument("--video", metavar="FILE", help="search by the pictures of a video")
    query.add_argument("--av", metavar="FILE", help="search by the pictures and the sound of a video")
    query.add_argument("--queries", metavar="FILE", help="one caption per line, or a manifest (.jsonl, .csv, .parquet or .tar)")
    parser.add_argument("--media-root", metavar="DIR", help="folder that the media paths of --queries start from and must stay in")
    parser.add_argument("-k", type=positive(int), default=10, metavar="N", help="results to print (default: %(default)s)")
    parser.add_argument(
        "--table", choices=TABLES, help="table to search in (default: the first of av, video, audio for a text; what other queries lack)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a query instead of lines")
    add_truncate_dim(parser, "index and query")


def run(args: argparse.Namespace) -> int:
    """Prints rank, cosine and id of the nearest records of each query and returns the exit status: 0, or 1 when queries were skipped."""
    check_preset(args)
    if args.media_root is not None and args.queries is None:
        raise InputError(f"--media-root {args.media_root}: is for --queries; omit it")

    import numpy as np

    from omni_jax.cli.inputs import read_tables
    from omni_jax.cli.queries import read_queries
    from omni_jax.retrieval.rows import truncated
    from omni_jax.retrieval.search import TARGETS, Index, target_table

    queries = read_queries(args)
    if args.prefix and not any(item.get("text") for item in queries.items):
        raise InputError(f"--prefix {args.prefix}: applies to captions; omit it with --{queries.kind}")
    if args.table is None and queries.kind not in TARGETS:
        raise InputError(
            f"--queries {args.queries}: the queries are of several kinds or modalities; choose the table to search with --table"
        )
    index = read_tables(args.index, functools.partial(target_table, queries.kind or "text", chosen=args.table), incomplete=True)
    index = truncated(index, args.truncate_dim)
    (table,) = index.tables
    if not index.ids:
        raise InputError(f"{args.index[0]}: holds no records")
    _, chosen, model = model_for_index(args, index.made_with)
    with warnings.catch_warnings(record=args.queries is not None) as caught:
        vectors = model.encode(
            queries.items,
            # A text is what is searched with, whatever the captions of the index are.
            prompt_name=args.prefix or "query" if chosen.prefix else None,
            on_error="raise" if args.queries is None else "nan",
            truncate_dim=args.truncate_dim,
        )
    for warning in caught or ():
        print(one_line(str(warning.message)), file=sys.stderr)
    good = np.flatnonzero(np.isfinite(vectors).all(axis=1))
    if not len(good):
        raise InputError(f"--queries {args.queries}: none of {len(vectors)} queries can be embedded")
    ids = index.ids_of(table)
    scores, rows = Index(index.tables[table], table, ids, made_with=index.made_with).search(vectors[good], args.k)
    for place, number in enumerate(good.tolist()):
        found = [(ids[row], float(score)) for row, score in zip(rows[place].tolist(), scores[place], strict=True)]
        _show(args, queries.kind, queries.names[number], table, len(ids), found)
    return DONE_WITH_SKIPPED if queries.problems or len(good) < len(vectors) else DONE


def _show(args: argparse.Namespace, kind: str | None, name: str, table: str, records: int, found: list[tuple[str, float]]) -> None:
    if args.json:
        asked = {"query": kind} if args.queries is None else {"query": name}
        print(json.dumps({**asked, "table": table, "records": records, "results": [{"id": i, "score": s} for i, s in found]}))
        return
    print(f"{kind if args.queries is None else one_line(name)} in table {table} of {records} records, by cosine:")
    for rank, (name, score) in enumerate(found, 1):
        print(f"{rank:4d}  {score:7.4f}  {one_line(name)}")
