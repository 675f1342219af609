"""The formats that a manifest may have, and which of them a file or a folder is."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_jax.data.formats import csv_table, json_entries, parquet, webdataset
from omni_jax.data.formats.entry import Entry, Notes, files_of, media_kind
from omni_jax.data.paths import absolute, media_path
from omni_jax.io.messages import stands_for
from omni_jax.types import InputError

Reader = Callable[[os.PathLike[str] | str, Mapping[str, str], Notes], Iterator[Entry]]
"""Path, `--columns` and where it notes what else there is to say -> the entries."""


def read_metadata_folder(path: os.PathLike[str] | str, columns: Mapping[str, str], notes: Notes) -> Iterator[Entry]:
    """Yields the entries of the metadata files of a folder, as `audiofolder`, `videofolder` and `imagefolder` of `datasets` read them.

    `path` may be one such file of JSON lines.
    """
    folder, named = absolute(path), set()
    there = files_of(folder) if folder.is_dir() else [folder]
    files = [file for file in there if file.name in _METADATA] if folder.is_dir() else there
    note_sets(files, notes)
    for file in files:
        for entry in FORMATS[_SUFFIXES.get(file.suffix, "json")](file, columns, notes):
            if file.suffix == ".jsonl" and isinstance(entry.fields, dict):
                entry = entry._replace(fields=csv_table.table_fields(entry.fields, {}), nameless=True)
            for name in entry.fields.values() if isinstance(entry.fields, dict) else ():
                if isinstance(name, str) and media_kind(name):
                    with contextlib.suppress(InputError):  # an address
                        named.add(os.path.normpath(media_path(name, file.parent)))
            yield entry
    if left := [file for file in there if media_kind(file.name) and os.path.normpath(file) not in named]:
        notes.add("media files that no metadata file names, and are not read", min(left), len(left))


def read_media_folder(path: os.PathLike[str] | str, columns: Mapping[str, str], notes: Notes) -> Iterator[Entry]:
    """Yields the entries of a folder of media files."""
    note_sets([item for item in absolute(path).iterdir() if item.is_dir()], notes)
    yield from webdataset.read_folder(path, columns, notes)


FORMATS: dict[str, Reader] = {
    "json": json_entries.read,
    "csv": csv_table.read,
    "parquet": parquet.read,
    "webdataset": webdataset.read,
    "metadata": read_metadata_folder,
    "files": read_media_folder,
}
"""Name for `--format` -> what reads it."""

FOLDERS = ("metadata", "files")
"""Those of them that are folders; of another one a folder holds the files."""

_SUFFIXES = {".csv": "csv", ".tsv": "csv", ".tab": "csv", ".parquet": "parquet", ".tar": "webdataset"}
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_SPLITS = {word: word for word in ("train", "test", "validation")}
_SPLITS |= {"training": "train", "val": "validation", "valid": "validation", "dev": "validation", "eval": "test", "testing": "test"}
_MOST_OF_A_SET = 100_000  # files
_SHEETS = (".xlsx", ".xls", ".ods")
_FOREIGN = {
    b"ARROW1": "is an Arrow file; write it as Parquet: Dataset.from_file(FILE).to_parquet(...) in datasets",
    b"SQLite format 3": "is a database; write its table as CSV or JSON lines",
    b"\x80\x04\x95": "is a pickle, which is never opened; write its records as JSON lines",
}
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
            yield chosen or ("metadata" if place.name == "metadata.jsonl" else _format_of(one)), one
            continue
        kind = chosen or _folder_format(place)
        if kind is None:
            names = [file.name for file in files_of(place)]
            if any(".array_record-" in name for name in names):
                raise InputError(
                    f"{one}: holds shards of 'omni-jax prepare', which runs train on; name the manifest that they were made of"
                )
            if any(name.endswith(".arrow") for name in names):
                raise InputError(
                    f"{one}: was written by save_to_disk of datasets; write it as Parquet: load_from_disk(...).to_parquet(FILE)"
                )
            known = "metadata.csv or .jsonl, .tar, .parquet and media files"
            raise InputError(f"{one}: is a directory; name the manifest file in it: it holds none of what is known ({known})")
        if kind in FOLDERS:
            yield kind, one
            continue
        found = sorted(file for file in files_of(place) if _SUFFIXES.get(file.suffix.lower()) == kind)
        if not found:
            raise InputError(f"{one}: holds no file that --format {kind} names; choose another format")
        yield from ((kind, file) for file in found)


def note_sets(files: Sequence[os.PathLike[str] | str], notes: Notes) -> None:
    """Notes files that the names of others say exist (`train-00000-of-00002.parquet`), and splits of a set that are read as one."""
    sets: dict[tuple[str, str, str], set[int]] = {}
    splits: dict[str, str] = {}
    for file in [os.fspath(one) for one in files]:
        if match := re.fullmatch(r"(.*?)-(\d+)-of-(\d+)(\.\w+)", file):
            sets.setdefault((match[1], match[3], match[4]), set()).add(int(match[2]))
        words = re.split(r"[^a-z]+", "/".join(file.lower().split("/")[-2:]))
        if split := next((word for word in reversed(words) if word in _SPLITS), None):
            splits.setdefault(_SPLITS[split], file)
    for (name, total, suffix), there in sets.items():
        if absent := [number for number in range(int(total)) if number not in there] if int(total) <= _MOST_OF_A_SET else []:
            first = f"{name}-{absent[0]:0{len(total)}}-of-{total}{suffix}"
            notes.add("files that the names of others say exist, and are not here", first, len(absent))
    if len(splits) > 1:
        notes.add(
            f"splits that are read as one ({', '.join(splits)}); a pattern names the files of one", next(iter(splits.values())), len(splits)
        )


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
    suffix = os.path.splitext(os.fspath(path))[1].lower()
    if suffix in _SHEETS:
        raise InputError(f"{path}: is a spreadsheet; save it as CSV in UTF-8")
    if packing := next((name for mark, name in _PACKED.items() if head.startswith(mark)), None):
        raise InputError(f"{path}: is compressed with {packing}, and is not unpacked here; unpack it first")
    if what := stands_for(head) or next((what for mark, what in _FOREIGN.items() if head.startswith(mark)), None):
        raise InputError(f"{path}: {what}")
    if media_kind(os.fspath(path)):
        raise InputError(f"{path}: is a media file; name the folder that holds it, or a manifest that names it")
    return _SUFFIXES.get(suffix, "json")


def _folder_format(folder: Any) -> str | None:
    files = files_of(folder)
    if any(file.name in _METADATA for file in files):
        return "metadata"
    kinds = {_SUFFIXES.get(file.suffix.lower()) or ("files" if media_kind(file.name) else "") for file in files}
    return next((kind for kind in ("webdataset", "parquet", "files") if kind in kinds), None)
