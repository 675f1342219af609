"""The formats that a manifest may have, and which of them a file or a folder is."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omni_jax.data.entries import absolute
from omni_jax.data.formats import csv_table, json_entries, parquet, webdataset
from omni_jax.data.formats.entry import Entry, Notes, media_kind
from omni_jax.types import InputError

Reader = Callable[[os.PathLike[str] | str, Mapping[str, str], Notes], Iterator[Entry]]
"""Path, `--columns` and where it notes what else there is to say -> the entries."""


def read_metadata_folder(path: os.PathLike[str] | str, columns: Mapping[str, str], notes: Notes) -> Iterator[Entry]:
    """Yields the entries of the metadata files of a folder, as `audiofolder`, `videofolder` and `imagefolder` of `datasets` read them."""
    for file in _metadata_files(absolute(path)):
        if file.suffix != ".jsonl":
            yield from FORMATS[_SUFFIXES[file.suffix]](file, columns, notes)
            continue
        for entry in json_entries.read(file, columns, notes):
            fields = entry.fields
            yield entry._replace(fields=csv_table.table_fields(fields, {}) if isinstance(fields, dict) else fields, nameless=True)


FORMATS: dict[str, Reader] = {
    "json": json_entries.read,
    "csv": csv_table.read,
    "parquet": parquet.read,
    "webdataset": webdataset.read,
    "metadata": read_metadata_folder,
    "files": webdataset.read_folder,
}
"""Name for `--format` -> what reads it."""

FOLDERS = ("metadata", "files")
"""Those of them that are folders; of another one a folder holds the files."""

_SUFFIXES = {".csv": "csv", ".tsv": "csv", ".tab": "csv", ".parquet": "parquet", ".tar": "webdataset"}
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd", b"PK\x03\x04": "zip"}


def sources(path: os.PathLike[str] | str, chosen: str | None = None) -> Iterator[tuple[str, os.PathLike[str] | str]]:
    """Yields the format and the path of each file, or of the folder, that a source names, in the order of their names.

    Args:
      path: a file, a folder, or a pattern with `*`, `?`, `[...]` or `{000..127}`.
      chosen: the format; None goes by content, then by name.

    Raises:
      InputError: for a pattern that nothing matches, a folder without anything known, a compressed file, a pipe, or an unknown format.
    """
    if chosen is not None and chosen not in FORMATS:
        raise InputError(f"--format {chosen}: unknown format; choose among {', '.join(FORMATS)}")
    for one in _matching(os.fspath(path)):
        place = absolute(one)
        if not place.is_dir():
            if chosen in FOLDERS:
                raise InputError(f"{one}: is a file, and --format {chosen} reads a folder; name the folder")
            if isinstance(place, Path) and place.is_fifo():
                raise InputError(f"{one}: is a pipe, which cannot be read twice; write the manifest into a file")
            yield chosen or _format_of(one), one
            continue
        kind = chosen or _folder_format(place)
        if kind is None:
            known = "metadata.csv or .jsonl, .tar, .parquet and media files"
            raise InputError(f"{one}: is a directory; name the manifest file in it: it holds none of what is known ({known})")
        if kind in FOLDERS:
            yield kind, one
            continue
        found = sorted(file for suffix, name in _SUFFIXES.items() if name == kind for file in place.rglob(f"*{suffix}"))
        if not found:
            raise InputError(f"{one}: holds no file that --format {kind} names; choose another format")
        yield from ((kind, file) for file in found)


def is_source(folder: os.PathLike[str] | str) -> bool:
    """Whether a folder is a source of clips: it has metadata, tars, Parquet or media files."""
    return _folder_format(absolute(folder)) is not None


def _matching(text: str) -> list[Any]:
    """Returns the paths that a pattern names; the path itself where it is none."""
    if not re.search(r"[*?\[{]", text) or absolute(text).exists():
        return [text]
    found: list[str] = []
    for pattern in _braces(text):
        if not re.search(r"[*?\[]", pattern):
            found.append(pattern)
        elif "://" in pattern:
            folder, _, name = pattern.rpartition("/")
            found += sorted(os.fspath(file) for file in absolute(folder).glob(name))
        else:
            found += sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise InputError(f"{text}: no file matches the pattern; check the path")
    return found


def _braces(text: str) -> list[str]:
    """Returns the texts that braces stand for: `{000..127}` and `{a,b}`, as a shell and WebDataset expand them."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
    if found is None:
        return [text]
    first, last, words = found.groups()
    inner = words.split(",") if words is not None else [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
    return [made for word in inner for made in _braces(text[: found.start()] + word + text[found.end() :])]


def _format_of(path: os.PathLike[str] | str) -> str:
    """Returns the format of a file: by its first bytes, then by its name; JSON for everything else."""
    try:
        with absolute(path).open("rb") as file:
            head = file.read(512)
    except (OSError, ImportError):
        head = b""  # the reader says what is wrong
    if head[:4] == b"PAR1":
        return "parquet"
    if head[257:262] == b"ustar":
        return "webdataset"
    if packing := next((name for mark, name in _PACKED.items() if head.startswith(mark)), None):
        raise InputError(f"{path}: is compressed with {packing}, and is not unpacked here; unpack it first")
    return _SUFFIXES.get(os.path.splitext(os.fspath(path))[1].lower(), "json")


def _folder_format(folder: Any) -> str | None:
    if _metadata_files(folder):
        return "metadata"
    kinds: set[str] = set()
    for file in folder.rglob("*"):
        kinds.add(_SUFFIXES.get(file.suffix.lower()) or ("files" if media_kind(file.name) else ""))
    return next((kind for kind in ("webdataset", "parquet", "files") if kind in kinds), None)


def _metadata_files(folder: Any) -> list[Any]:
    """Returns the metadata files of a folder, or those of the folders in it."""
    for depth in ("", "*/"):
        if found := sorted(file for suffix in (".csv", ".jsonl", ".parquet") for file in folder.glob(f"{depth}metadata{suffix}")):
            return found
    return []
