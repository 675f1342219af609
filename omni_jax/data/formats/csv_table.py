"""Tables of text, with the names of the columns in the first line. Cells are separated as those names are."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from omni_jax.data.entries import BadEntry
from omni_jax.data.formats.entry import Entry, Notes, check_columns, reading, table_fields
from omni_jax.data.paths import absolute
from omni_jax.io.messages import as_input_error
from omni_jax.types import InputError

_SEPARATOR = re.compile(r"sep=([,;|\t])\r?\n?")
_MARKED = ("text", "video", "audio", "timestamps")
_ABSENT = ("NaN", "nan", "-nan", "NA", "N/A", "n/a", "#N/A", "<NA>", "None", "NULL", "null")
_LONGEST_CELL = 1 << 24  # characters


def read(path: os.PathLike[str] | str, columns: Mapping[str, str], notes: Notes) -> Iterator[Entry]:
    """Yields the rows of a table. Raises InputError for a table without names of columns, or without those that are needed."""
    csv.field_size_limit(_LONGEST_CELL)
    with reading(path):
        opened: Any = absolute(path).open("r", encoding="utf-8-sig", errors="surrogateescape", newline="")
        with opened as file:
            first = next((line for line in iter(file.readline, "") if line.strip()), "")
            named = _SEPARATOR.fullmatch(first)  # as spreadsheets write it above the names
            start = file.tell() if named else 0
            first = file.readline() if named else first
            file.seek(start)
            if not _is_text(first) or "\0" in first:
                raise InputError(f"{path}: is not UTF-8; save the table as UTF-8")
            delimiter = named[1] if named else _separator(os.fspath(path), first)
            lines = _Lines(file)
            rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=f"{delimiter} " in first, strict=True)
            with as_input_error(f"{path}: is not a table", "save it as UTF-8, with the names of the columns in its first line", csv.Error):
                names = [name.strip().removeprefix("\ufeff") for name in next(filter(None, rows), [])]
            if names:
                check_columns(path, names, columns)
                notes.fields.update(dict.fromkeys(names))
            for line, cells in _rows(rows):
                if not isinstance(cells, BadEntry) and not any(cells):  # a row of separators alone, as spreadsheets leave behind
                    continue
                over = rows.line_num - line + 1
                if lines.ended:
                    end = f"a quote is not closed before the end of the file, {over} lines further: close it"
                    fields: dict[str, Any] | BadEntry = BadEntry(end)
                elif isinstance(cells, BadEntry):
                    fields = cells
                else:
                    fields = _fields(names, cells, columns, over)
                    if over > 1 and not isinstance(fields, BadEntry):
                        notes.add("rows that go over several lines", f"{path}:{line}")
                if isinstance(fields, dict):
                    fields = _without_marks(fields, f"{path}:{line}", notes)
                yield Entry(path, str(line), fields, line, nameless=True)


class _Lines:
    """The lines of a file, and whether its end was come upon: within a row only where a quote is open."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.ended = False

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            self.ended = True
            raise StopIteration
        return line


def _without_marks(fields: dict[str, Any], where: str, notes: Notes) -> dict[str, Any]:
    """Returns the fields of a row without words for what is absent, which `datasets` and pandas read as such."""
    found = {name: value for name, value in fields.items() if name not in _MARKED or value not in _ABSENT}
    if gone := [f"{name} {fields[name]!r}" for name in fields if name not in found]:
        notes.add("cells of a word that says that there is nothing, read so", f"{where} {gone[0]}", len(gone))
    return found


def _rows(rows: Any) -> Iterator[tuple[int, list[str] | BadEntry]]:
    """Yields the line that each row begins on, and its cells."""
    while True:
        line = rows.line_num + 1
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            inner = "expected after" in str(error)  # strict: a text with a quote in it would be read without it, or cut
            what = "text follows a quote that closes a cell; write a quote within a cell twice" if inner else ""
            cells = BadEntry(what or f"is no row of a table ({error}); correct the line")
        yield line, cells


def _separator(path: str, first: str) -> str:
    """Returns what separates the names in the first line: a spreadsheet writes a semicolon where numbers have a decimal comma."""
    if path.lower().endswith((".tsv", ".tab")):
        return "\t"
    return "," if "," in first else max(",;\t|", key=first.count)


def _fields(names: list[str], cells: list[str], columns: Mapping[str, str], lines: int) -> dict[str, Any] | BadEntry:
    if len(cells) != len(names):
        fix = f"it goes over {lines} lines: close the quote" if lines > 1 else "put cells with the separator in them in quotes"
        return BadEntry(f"has {len(cells)} cells where the first line has {len(names)}; {fix}")
    if not _is_text("".join(cells)):
        return BadEntry("is not UTF-8; save the table as UTF-8")
    return table_fields(dict(zip(names, cells, strict=True)), columns)


def _is_text(read: str) -> bool:
    """Whether bytes that were read as UTF-8, with surrogates for what is none, are all text."""
    try:
        read.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
