"""Tables of text, separated by commas (.csv) or tabs (.tsv), with the names of the columns in the first line."""

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
    """Yields the rows of a table.

    Raises:
      InputError: for a table without names of columns, or without those that are needed.
    """
    csv.field_size_limit(_LONGEST_CELL)
    delimiter = "\t" if os.fspath(path).lower().endswith((".tsv", ".tab")) else ","
    with reading(path):
        opened: Any = absolute(path).open("r", encoding="utf-8-sig", errors="surrogateescape", newline="")
        with opened as file:
            rows = csv.reader(file, delimiter=delimiter)
            try:
                names = next(rows, [])
            except csv.Error as error:
                raise InputError(
                    f"{path}: is no table ({error}); save it as UTF-8, with the names of the columns in its first line"
                ) from None
            if twice := [name for name in names if name and names.count(name) > 1]:
                raise InputError(f"{path}: two columns are called {twice[0]!r}; rename one")
            if names:
                check_columns(path, names, columns)
            for line, cells in _rows(rows):
                if cells:
                    fields = cells if isinstance(cells, BadEntry) else _fields(names, cells, columns)
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


def _fields(names: list[str], cells: list[str], columns: Mapping[str, str]) -> dict[str, Any] | BadEntry:
    if len(cells) != len(names):
        return BadEntry(f"has {len(cells)} cells where the first line has {len(names)}; put cells with the separator in them in quotes")
    try:
        "".join(cells).encode("utf-8")
    except UnicodeEncodeError:
        return BadEntry("is not UTF-8; save the table as UTF-8")
    return table_fields(dict(zip(names, cells, strict=True)), columns)
