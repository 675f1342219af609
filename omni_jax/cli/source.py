"""The manifest of a command, in any format: its arguments and its records."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omni_jax.types import InputError

if TYPE_CHECKING:
    from omni_jax.data.manifest import Manifest

FORMATS = ("json", "csv", "parquet", "webdataset", "metadata", "files")  # those of omni_jax.data.formats.table, imported late
ROLES = ("id", "text", "video", "audio", "image", "timestamps", "start", "end", "prefix")  # of omni_jax.data.formats.entry, likewise


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --manifest, and how it is read."""
    parser.add_argument(
        "--manifest", required=True, metavar="SOURCE", help="JSON lines, CSV, Parquet, WebDataset tars or a folder; a pattern names several"
    )
    add_format_arguments(parser)


def add_format_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=FORMATS, help="format of the manifest (default: detected from its content and name)")
    parser.add_argument(
        "--columns",
        type=columns,
        action="extend",
        default=[],
        metavar="ROLE=NAME,...",
        help="names of columns, members or fields, as in text=caption,video=path",
    )


def read_source(args: argparse.Namespace) -> Manifest:
    """Returns the records that the arguments name. Raises InputError when they cannot be read."""
    from omni_jax.data.manifest import read_manifest

    fetched, roles = getattr(args, "fetched", None), [role for role, _ in args.columns]
    if twice := next((role for role in roles if roles.count(role) > 1), None):
        raise InputError(f"--columns: {twice} is given {roles.count(twice)} names; give each role one")
    return read_manifest(args.manifest, args.media_root, format=args.format, columns=dict(args.columns), fetched=fetched)


def columns(text: str) -> list[tuple[str, str]]:
    """Returns (role, name) of each part of "ROLE=NAME,..."."""
    found = []
    for part in text.split(","):
        role, sign, name = (word.strip() for word in part.partition("="))
        if role not in ROLES or not sign or not name:
            raise InputError(f"--columns {text}: {part!r} is not ROLE=NAME; the roles are {', '.join(ROLES)}")
        found.append((role, name))
    return found


def check_jsonl(out: Path) -> None:
    """Raises InputError for a manifest to write that is not called so."""
    if out.suffix != ".jsonl":
        raise InputError(f"--out {out}: the name of a manifest ends in .jsonl")


def write_fetch_list(path: str, rows: Sequence[tuple[str, str, str, str]]) -> str:
    """Writes (id, URL, start, end) of media to be fetched, tab-separated, and returns a line on them."""
    from omni_jax.retrieval.npz import output_file

    with output_file(path) as file:
        file.write("".join("\t".join(row) + "\n" for row in (("id", "url", "start", "end"), *rows)).encode())
    return f"{path}: {len(rows)} clips of {len({url for _, url, _, _ in rows})} sources to fetch"
