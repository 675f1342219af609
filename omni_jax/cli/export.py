"""`omni-jax export`: an embedding file in another form."""

from __future__ import annotations

import argparse
import os
import sys

from omni_jax.cli.argtypes import add_truncate_dim, check_apart, whole
from omni_jax.types import InputError

EXAMPLE = "omni-jax export clips.npz --to int8 --out clips-int8.npz"

QUERIES = 4096  # that of omni_jax.retrieval.export, which is imported late
FORMS = ("faiss", "npy", "int8", "parquet")
ENDINGS = {"int8": ".npz", "parquet": ".parquet"}  # of forms that are one file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="embedding file (.npz); several are parts of one set")
    parser.add_argument(
        "--to", choices=FORMS, required=True, help="faiss and npy write a folder, one file a table and ids.txt; int8 and parquet a file"
    )
    parser.add_argument("--out", required=True, metavar="PATH", help="folder to write, or file: .npz for int8, .parquet")
    parser.add_argument(
        "--factory", metavar="STRING", help="faiss: index to make, as faiss.index_factory reads it: IVF4096,PQ64 (default: Flat, exact)"
    )
    parser.add_argument(
        "--manifest", metavar="FILE.jsonl", action="append", default=[], help="parquet: adds captions and paths of media; may be repeated"
    )
    add_truncate_dim(parser)
    parser.add_argument(
        "--queries", type=whole, metavar="N", help=f"int8: records used as queries to measure the loss (default: {QUERIES}; 0: none)"
    )


def run(args: argparse.Namespace) -> int:
    """Writes the export and returns the exit status."""
    ending = ENDINGS.get(args.to)
    if ending and not args.out.endswith(ending):
        raise InputError(f"--out {args.out}: {args.to} is one embedding file; its name ends in {ending}")
    for flag, value, form in (
        ("queries", args.queries, "int8"),
        ("factory", args.factory, "faiss"),
        ("manifest", args.manifest, "parquet"),
    ):
        if value not in (None, []) and args.to != form:
            raise InputError(f"--{flag}: is for --to {form}, and has no effect with --to {args.to}; leave it out")
    folders = [os.path.dirname(file.rpartition("=")[2]) or "." for file in args.files if not ending]
    check_apart("--out", args.out, [*args.files, *args.manifest, *folders])
    args.queries = QUERIES if args.queries is None else args.queries

    from omni_jax.cli.inputs import read_tables
    from omni_jax.cli.report import captions_of, records_of
    from omni_jax.retrieval.export import FACTORY, export_faiss, export_int8, export_npy, export_parquet, format_loss, recall_loss
    from omni_jax.retrieval.rows import truncated

    table = truncated(read_tables(args.files, incomplete=True), args.truncate_dim)
    if args.to == "int8":
        held = export_int8(table, args.out)
        before, after = (sum(rows.nbytes for rows in table.tables.values()) * share / 1e6 for share in (1, 0.25))
        print(f"{args.out}: {len(table.ids)} records x {len(table.tables)} tables, {before:.1f} MB of float32 became {after:.1f} MB")
        if not args.queries:
            return 0
        try:
            if args.queries < len(table.ids):
                print(f"Recall with {args.queries} of the records, drawn with seed 0, as queries:")
            print(format_loss(recall_loss(table, held, queries=args.queries)))
        except InputError as e:
            print(f"the loss of recall was not measured: {e}", file=sys.stderr)
        return 0
    if args.to == "parquet":
        records = records_of(args.manifest, None)
        paths = {name: str(record.video or record.audio) for name, record in records.items() if record.video or record.audio}
        texts = {"captions": captions_of(records.values()), "paths": paths} if args.manifest else {}
        export_parquet(table, args.out, **texts)
        print(f"{args.out}: {len(table.ids)} records, tables {', '.join(table.tables)}")
        return 0
    made = export_npy(table, args.out) if args.to == "npy" else export_faiss(table, args.out, factory=args.factory or FACTORY)
    print(f"{args.out}: {', '.join(made)}; {len(table.ids)} records")
    return 0
