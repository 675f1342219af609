"""Parquet files, in the layout of Hugging Face's `datasets` or any other. Captions are read here, media stay where they are.

A column of media holds paths, bytes, or both: struct<bytes, path>, as the features Audio, Video and Image of `datasets` are stored.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from omni_jax.data.entries import BadEntry
from omni_jax.data.formats.entry import Entry, Notes, check_columns, media_kind, reading, table_fields
from omni_jax.data.paths import absolute
from omni_jax.io.messages import as_input_error, line_of
from omni_jax.media.parts import open_binary, parquet_module
from omni_jax.media.workers import Guarded, goes_on
from omni_jax.types import ClipError, FilePart, InputError

_LIMIT_S = 120.0  # without progress in reading what cells there are
_ROWS = 1024  # read together; their media are not


class _Media(NamedTuple):
    """A column of media: its name, and its leaves that hold bytes and paths, "" for none."""

    name: str
    bytes: str
    path: str


def read(path: os.PathLike[str] | str, columns: Mapping[str, str], notes: Notes) -> Iterator[Entry]:
    """Yields the rows of a file; bytes in it are parts of the file.

    Raises:
      InputError: for a file that is no Parquet, lacks a column that is asked for, or has none that can be read; and where pyarrow is
        missing.
    """
    parquet = parquet_module()
    with reading(path):
        opened: Any = absolute(path).open("rb")
    with opened as file:
        # The errors of pyarrow have no class of their own.
        with as_input_error(f"{path}: is not a complete Parquet file", "fetch it again", Exception):
            table = parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
        yield from _rows(path, table, columns, notes)


def _rows(path: os.PathLike[str] | str, table: Any, columns: Mapping[str, str], notes: Notes) -> Iterator[Entry]:
    schema = table.schema_arrow
    scalars = [field.name for field in schema if _is_plain(field.type)]
    media = [found for field in schema if (found := _media(field)) is not None]
    roles = _roles(path, schema, media, columns)
    check_columns(path, schema.names, columns, list(roles.values()))
    notes.fields.update(dict.fromkeys(schema.names))
    used = [column for column in media if column.name in roles or column.name in columns.values()]
    idle = [name for name in schema.names if name not in scalars and name not in {column.name for column in used}]
    if asked := [name for name in idle if name in columns.values()]:
        kind = str(schema.field(asked[0]).type)[:80]
        raise InputError(f"{path}: column {asked[0]!r}, which --columns names, is {kind}; text, numbers, bytes or paths are read")
    if idle:
        notes.add(f"files with columns that are not read ({', '.join(idle)})", path)
    wanted = scalars + [column.path for column in used if column.path]
    # "ID" is read as "id" where it holds what an id may be (`entries.spelled`).
    texts = ("string", "large_string", "int", "uint")
    own = [name for field in schema if (name := field.name).lower() == "id" and str(_decoded(field.type)).startswith(texts)]
    names_itself = "id" in (*schema.names, *columns) or len(own) == 1
    leaves = tuple(column.bytes for column in used if column.bytes)
    try:
        there = _apart()((path, leaves), name=str(path)) if leaves else []
    except ClipError:
        raise InputError(f"{path}: is not a complete Parquet file (which cells hold bytes cannot be read); fetch it again") from None
    first = 0
    for group in range(table.metadata.num_row_groups):
        count = table.metadata.row_group(group).num_rows
        try:
            held = there[group] if leaves else {}
            for row, cells in enumerate(_cells(table, group, wanted, count)):
                fields: Any = {name: cells.get(name) for name in scalars}
                for column in used:
                    value = _value(absolute(path), column, cells, held, (first + row, group, row))
                    fields[column.name if column.name in columns.values() else roles[column.name]] = value
                fields = table_fields(fields, columns)
                number = first + row
                numbered = not names_itself and isinstance(fields, dict)
                if numbered:
                    fields["id"] = f"{PurePath(os.fspath(path)).stem}-{number}"
                yield Entry(path, f"row {number + 1}", fields, number + 1, numbered=numbered)
        except Exception as error:
            yield Entry(
                path,
                f"row {first + 1}",
                BadEntry(f"its {count} rows cannot be read ({line_of(error)}); fetch the file again"),
                first + 1,
            )
        first += count


def _roles(path: os.PathLike[str] | str, schema: Any, media: list[_Media], columns: Mapping[str, str]) -> dict[str, str]:
    """Returns column -> role of media that `columns` does not name: by the feature of `datasets`, or by the name.

    Raises:
      InputError: where two columns have one role.
    """
    features: Mapping[str, Any] = {}
    with contextlib.suppress(KeyError, ValueError, TypeError):
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    found: dict[str, str] = {}
    for column in media:
        feature = features.get(column.name)
        feature = feature.get("_type") if isinstance(feature, dict) else None
        role = {"Audio": "audio", "Video": "video", "Image": "image"}.get(str(feature))
        name = column.name.lower()
        role = role or (name if name in ("video", "audio", "image") else media_kind(name))
        if role is None or role in columns or column.name in columns.values():
            continue
        if role in found.values():
            other = next(name for name, known in found.items() if known == role)
            raise InputError(
                f"{path}: columns {other!r} and {column.name!r} both hold {role}; choose one with --columns {role}={column.name}"
            )
        found[column.name] = role
    if "image" in found.values():
        name = next(name for name, role in found.items() if role == "image")
        if "video" in found.values() or "video" in columns:
            del found[name]
        else:
            found[name] = "video"  # a picture is a video of one frame
    return found


def _media(field: Any) -> _Media | None:
    if _is_bytes(field.type):
        return _Media(field.name, field.name, "")
    if not hasattr(field.type, "get_field_index"):
        return None
    leaves = {leaf.name: leaf.type for leaf in field.type}
    held = f"{field.name}.bytes" if "bytes" in leaves and _is_bytes(leaves["bytes"]) else ""
    if not held and leaves.keys() != {"path"}:
        return None
    return _Media(field.name, held, f"{field.name}.path" if "path" in leaves else "")


def _value(
    path: Path, column: _Media, cells: Mapping[str, Any], held: Mapping[str, list[bool] | bool], place: tuple[int, int, int]
) -> FilePart | str | None:
    """Returns a cell of media: a part of the file where it has bytes, else its path, else None."""
    number, group, row = place
    named = (cells.get(column.name) or {}).get("path") if column.path else None
    there = held.get(column.bytes, False)
    if there if isinstance(there, bool) else there[row]:
        name = "/".join([str(number), column.name, *([PurePath(named).name] if named else [])])
        return FilePart(path, name, column=column.bytes, group=group, row=row)
    return named


def cells_with_bytes(item: tuple[os.PathLike[str] | str, tuple[str, ...]]) -> list[dict[str, list[bool] | bool]]:
    """Returns, for each row group, leaf -> whether its cells hold bytes: all at once where the file's statistics know, else each.

    Runs in a process of its own: pyarrow ends the process that asks it for the statistics of a damaged footer.
    """
    path, leaves = item
    with open_binary(path) as file:
        table = parquet_module().ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
        numbers = {table.schema.column(i).path: i for i in range(len(table.schema))}
        groups = range(table.metadata.num_row_groups)
        return [{leaf: _held(table, group, leaf, numbers[leaf]) for leaf in leaves} for group in groups]


def _held(table: Any, group: int, leaf: str, number: int) -> list[bool] | bool:
    metadata = table.metadata.row_group(group)
    statistics: Any = metadata.column(number).statistics
    if statistics is not None and statistics.has_null_count and statistics.null_count in (0, metadata.num_rows):
        return statistics.null_count == 0
    found: list[bool] = []
    for batch in table.iter_batches(batch_size=1, row_groups=[group], columns=[leaf], use_threads=False):
        goes_on()
        value = batch.column(0)
        while value.type.num_fields:
            value = value.flatten()[0]
        found += value.is_valid().to_pylist()
    return found


@functools.cache
def _apart() -> Guarded:
    return Guarded(cells_with_bytes, _LIMIT_S)


def _cells(table: Any, group: int, columns: list[str], count: int) -> Iterator[Mapping[str, Any]]:
    """Yields the rows of a row group as column -> value."""
    if not columns:
        yield from ({} for _ in range(count))
        return
    for batch in table.iter_batches(batch_size=_ROWS, row_groups=[group], columns=columns, use_threads=False):
        yield from batch.to_pylist()


def _is_plain(kind: Any) -> bool:
    """Whether a column holds texts, numbers, or lists of them or of objects of them, which JSON can hold too."""
    kind = _decoded(kind)
    if str(kind).startswith(("list<", "large_list<", "fixed_size_list<")):
        turns = kind.value_type if str(kind.value_type).startswith("struct<") else None  # conversations
        return all(_is_plain(leaf.type) for leaf in turns) if turns is not None else _is_plain(kind.value_type)
    return str(kind).startswith(("string", "large_string", "int", "uint", "float", "double", "bool", "halffloat"))


def _is_bytes(kind: Any) -> bool:
    return str(_decoded(kind)) in ("binary", "large_binary", "binary_view")


def _decoded(kind: Any) -> Any:
    """The type of the values of a dictionary-coded column, any other type as it is."""
    return kind.value_type if str(kind).startswith("dictionary<") else kind
