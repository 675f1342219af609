"""`omni-jax manifest from`: tars, Parquet, tables and folders to a manifest of JSON lines."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from omni_jax.cli.argtypes import check_apart
from omni_jax.cli.printing import one_line
from omni_jax.cli.source import add_format_arguments, check_jsonl, read_source, write_fetch_list
from omni_jax.cli.status import DONE, DONE_WITH_SKIPPED
from omni_jax.types import InputError

EXAMPLE = "omni-jax manifest from 'shards/{000..127}.tar' --out clips.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("from",), help="make a manifest from SOURCE")
    parser.add_argument(
        "manifest", nargs="+", metavar="SOURCE", help="WebDataset tar, Parquet, CSV, JSON, or a folder; a pattern names several"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="manifest to write")
    add_format_arguments(parser)
    parser.add_argument("--media-root", metavar="DIR", help="folder that media paths start from and must stay in (default: the source's)")
    parser.add_argument("--fetch-list", metavar="FILE", help="write id, URL, start and end of media at web addresses, tab-separated")
    parser.add_argument("--fetched", metavar="DIR", help="folder of files named after the ids of that list, used in place of the addresses")


def run(args: argparse.Namespace) -> int:
    """Writes the manifest and returns the exit status: 0, or 1 when entries were skipped."""
    if not (args.out or args.fetch_list):
        raise InputError("nothing to do: give --out FILE.jsonl or --fetch-list FILE")
    if args.out:
        check_jsonl(args.out)
    if args.fetched and not Path(args.fetched).is_dir():
        raise InputError(f"--fetched {args.fetched}: no such folder; name the one that the downloader wrote")

    from omni_jax.data.formats.entry import files_of
    from omni_jax.data.formats.table import sources
    from omni_jax.data.manifest import row_of, write_jsonl_atomic

    read = [file for source in args.manifest for _, file in sources(source, args.format)]
    read += [file for folder in read if os.path.isdir(folder) for file in files_of(Path(folder)) if file.suffix == ".jsonl"]
    for flag, out in (("--out", args.out), ("--fetch-list", args.fetch_list)):
        if out:
            check_apart(flag, out, read)
    found = read_source(args)
    for note in found.notes:
        print(one_line(note), file=sys.stderr)
    if args.fetch_list:
        _write_fetch_list(args.fetch_list, found.remote)
    if not args.out:
        return DONE
    errors = args.out.with_name(f"{args.out.stem}.errors.jsonl")
    errors.unlink(missing_ok=True)
    if found.problems:
        write_jsonl_atomic(errors, (problem.row() for problem in found.problems))
        first = one_line(found.problems[0].reason)
        print(f"skipped entries: {len(found.problems)}, listed in {errors}; the first: {first}", file=sys.stderr)
    if not found.records:
        raise InputError(f"{args.manifest[0]}: no entry can be used{found.first_problem}")
    write_jsonl_atomic(args.out, (row_of(record, args.out.absolute().parent) for record in found.records))
    counts = {name: sum(getattr(record, name) is not None for record in found.records) for name in ("text", "video", "audio")}
    held = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    print(f"{args.out}: {len(found.records)} records ({held}), the first: {one_line(found.records[0].id)}")
    return DONE_WITH_SKIPPED if found.problems else DONE


def _write_fetch_list(path: str, remote: tuple[tuple[str, str, str, str], ...]) -> None:
    if not remote:
        raise InputError("--fetch-list: no media of this source are at web addresses")
    print(write_fetch_list(path, remote))
