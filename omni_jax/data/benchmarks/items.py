"""One clip of a benchmark with its captions, and the reading of the files they are published in."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from omni_jax.io.torch_pickle import read_pickle
from omni_jax.types import InputError

PathLike = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Item:
    """A clip of a benchmark.

    Attributes:
      id: of the clip.
      captions: what describes it, in the order of the file.
      files: names, with or without ending, that a file of exactly this clip may have.
      sources: names that a file of the whole recording may have, which the clip is an interval of.
      interval: (start, end) in seconds within the source; None: the whole of it.
      url: where the source is to be had; None where the annotations do not say.
    """

    id: str
    captions: tuple[str, ...]
    files: tuple[str, ...]
    sources: tuple[str, ...] = ()
    interval: tuple[float, float] | None = None
    url: str | None = None


@dataclasses.dataclass(frozen=True)
class Annotations:
    """What an annotation file holds: clips in its order, one line for each entry that cannot be used, and how many captions are empty."""

    items: tuple[Item, ...]
    problems: tuple[str, ...] = ()
    empty_captions: int = 0


@dataclasses.dataclass(frozen=True)
class Table:
    """A file of comma-separated values: its columns, (lines, cells by column) of its rows, one line for each row of another width."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, dict[str, str]], ...]
    problems: tuple[str, ...]


def read_text(path: PathLike) -> str:
    """Returns the text of a UTF-8 file, its byte-order mark removed."""
    file = epath.Path(path)
    if not file.is_file():
        raise InputError(f"{path}: {'is a folder; name a file in it' if file.is_dir() else 'no such file'}")
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: is not UTF-8 text (byte {e.start + 1}); save it as UTF-8") from e
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror or e}") from e


def read_csv(path: PathLike) -> Table:
    """Returns a table of comma-separated values, or of tab-separated ones where the head has no comma.

    A row with more or fewer cells than there are columns is a problem: a caption with a comma and no quotes would be cut, and what comes
    after it would move to other columns.

    Raises:
      InputError: for a file that is no such table, names a column twice or has no row.
    """
    text = read_text(path)
    head = text.split("\n", 1)[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in head and "," not in head else ",")
    rows: list[tuple[str, dict[str, str]]] = []
    problems: list[str] = []
    try:
        columns = [name.strip() for name in next(reader, [])]
        before = reader.line_num
        for row in reader:
            first, before = before + 1, reader.line_num
            place = f"line {first}" if first == before else f"lines {first} to {before}"
            while len(row) > len(columns) and not row[-1].strip():  # a separator at the end of the line
                row.pop()
            if len(row) == len(columns):
                rows += [(place, dict(zip(columns, map(str.strip, row), strict=True)))] if any(map(str.strip, row)) else []
            elif any(map(str.strip, row)):
                why = "is a quote left open?" if first < before else "put a cell that holds a comma in quotes"
                problems.append(f"{path}: {place}: {len(row)} cells where the head has {len(columns)}; {why}")
    except csv.Error as e:
        raise InputError(f"{path}:{reader.line_num}: not a table of comma-separated values ({e})") from e
    twice = next((name for name in columns if name and columns.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{path}: column {twice!r} appears twice; keep one")
    if not columns or not rows:
        raise InputError(f"{path}: holds no rows; " + (f"the first: {problems[0]}" if problems else "expected a head and one line a clip"))
    return Table(tuple(columns), tuple(rows), tuple(problems))


def read_json(path: PathLike) -> Any:
    """Returns what a JSON file holds."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: not JSON ({e})") from e


def columns_for(
    path: PathLike, columns: Iterable[str], aliases: Mapping[str, tuple[str, ...]], chosen: Mapping[str, str]
) -> dict[str, str]:
    """Returns role -> column for the roles that have one: as chosen, or the first alias that is a column (case and marks aside).

    Raises:
      InputError: for a chosen role that is not known or a column that is not there.
    """
    plain = {_plain(name): name for name in reversed(list(columns))}
    found = {}
    for role, column in chosen.items():
        if role not in aliases:
            raise InputError(f"--column {role}={column}: the roles are {', '.join(aliases)}")
        if _plain(column) not in plain:
            raise InputError(f"{path}: has no column {column!r} for the {role}; its columns are {', '.join(columns)}")
    for role, names in aliases.items():
        names = (chosen[role],) if role in chosen else names
        column = next((plain[_plain(name)] for name in names if _plain(name) in plain), None)
        if column is not None:
            found[role] = column
    return found


def captions_by_id(path: PathLike, content: Any) -> dict[str, tuple[str, ...]]:
    """Returns id -> captions from a mapping whose values are a caption, a list of captions, or a list of captions cut into words.

    Raises:
      InputError: for content of another form.
    """
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{path}: holds a {type(content).__name__}; expected captions by clip id")
    found = {}
    for name, value in content.items():
        entries = [value] if isinstance(value, str) else value
        if not isinstance(name, str) or not isinstance(entries, list | tuple):
            raise InputError(f"{path}: entry {name!r} is a {type(value).__name__}; expected a caption or a list of captions")
        captions = [" ".join(entry) if _words(entry) else entry for entry in entries]
        if not all(isinstance(caption, str) for caption in captions):
            raise InputError(f"{path}: entry {name!r} holds something other than captions")
        found[name] = tuple(caption.strip() for caption in captions)
    return found


def read_captions(path: PathLike) -> dict[str, tuple[str, ...]]:
    """Returns id -> captions of a `.pkl` (through the restricted reader) or `.json` file."""
    if os.fspath(path).endswith((".pkl", ".pickle")):
        return captions_by_id(path, read_pickle(path))
    return captions_by_id(path, read_json(path))


def _words(entry: Any) -> bool:
    return isinstance(entry, list | tuple) and all(isinstance(word, str) for word in entry)


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
