"""Tables of text, with the names of the columns in the first line. Cells are separated as those names are."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping
from typing import Any

from omni_jax.data.entries import BadEntry, absolute
from omni_jax.data.formats.entry import Entry, Notes, check_columns, reading, table_fields
from omni_jax.types import InputError

_LONGEST_CELL = 1 << 24  # characters


def read(path: os.PathLike[str] | str, columns: Mapping[str, str], notes: Notes) -> Iterator[Entry]:
    """Yields the rows of a table. Raises InputError for a table without names of columns, or without those that are needed."""
    csv.field_size_limit(_LONGEST_CELL)
    with reading(path):
        opened: Any = absolute(path).open("r", encoding="utf-8-sig", errors="surrogateescape", newline="")
        with opened as file:
            first = next((line for line in iter(file.readline, "") if line.strip()), "")
            file.seek(0)
            if not _is_text(first):
                raise InputError(f"{path}: is not UTF-8; save the table as UTF-8")
            delimiter = _separator(os.fspath(path), first)
            rows = csv.reader(file, delimiter=delimiter, skipinitialspace=f"{delimiter} " in first)
            try:
                names = [name.strip() for name in next(filter(None, rows), [])]
            except csv.Error as error:
                raise InputError(
                    f"{path}: is not a table ({error}); save it as UTF-8, with the names of the columns in its first line"
                ) from None
            if names:
                check_columns(path, names, columns)
            for line, cells in _rows(rows):
                if cells:
                    fields = cells if isinstance(cells, BadEntry) else _fields(names, cells, columns, rows.line_num - line + 1)
                    yield Entry(path, str(line), fields, line, nameless=True)


def _rows(rows: Any) -> Iterator[tuple[int, list[str] | BadEntry]]:
    """Yields the line that each row begins on, and its cells."""
    while True:
        line = rows.line_num + 1
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            cells = BadEntry(f"is no row of a table ({error}); correct the line")
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
