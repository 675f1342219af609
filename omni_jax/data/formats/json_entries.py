"""JSON lines, or one JSON array, of plain or official entries."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

from omni_jax.data.entries import BadEntry, is_of_a_record, kind
from omni_jax.data.formats.entry import Entry, Notes, reading, renamed
from omni_jax.data.paths import absolute
from omni_jax.io.messages import line_of
from omni_jax.types import InputError

_ABSENT: Callable[[str], None] = lambda name: None  # noqa: E731 - NaN and Infinity, as Python writes what pandas lacks
_MARK = b"\xef\xbb\xbf"  # a byte-order mark, as some editors write
_SPACE = tuple(" \t\r\n")
_LONGEST_ARRAY = 1 << 32  # bytes of a file that is one array: its text is held
_LONGEST_LINE = 1 << 24  # bytes; an honest record has a few hundred, and a line is held in memory several times over


def read(path: os.PathLike[str] | str, columns: Mapping[str, str], notes: Notes) -> Iterator[Entry]:
    """Yields the entries of a file of JSON lines, or of one JSON array."""
    for line, where, fields in _entries(path):
        if isinstance(fields, dict):
            notes.fields.update(dict.fromkeys(fields))
            inner = _records_within(fields) if fields.keys().isdisjoint(columns.values()) else None
            fields = inner or (renamed(fields, columns) if columns else fields)
        yield Entry(path, where, fields, line)


def _records_within(fields: Mapping[str, Any]) -> BadEntry | None:
    """What is wrong with an object that is no record and holds others: {"data": [{...}]}, or {ID: {...}}."""
    if any(map(is_of_a_record, fields)):
        return None
    for name, value in fields.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            return BadEntry(f"is no record: it holds {len(value)} objects under {name[:40]!r}; write these as an array, or one a line")
    if fields and all(isinstance(value, dict) for value in fields.values()):
        return BadEntry(f"is no record: it holds {len(fields)} objects by name; write an array of them, each with its name as its id")
    return None


def _entries(path: os.PathLike[str] | str) -> Iterator[tuple[int, str, dict[str, Any] | BadEntry]]:
    """Yields (line from 1, place for messages, fields) of each entry."""
    with reading(path), absolute(path).open("rb") as file:
        if _is_array(file):
            file.seek(0)
            data = file.read(_LONGEST_ARRAY + 1)
            if len(data) > _LONGEST_ARRAY:
                raise InputError(f"{path}: an array of over {_LONGEST_ARRAY >> 30} GiB; write one JSON record a line (.jsonl)")
            yield from _array(data)
            return
        file.seek(0)
        if next((line for data in _bounded(file) if (line := data.removeprefix(_MARK).strip())), b"") == b"{":
            yield 1, "1", _one_object(path, file)
            return
        file.seek(0)
        for number, data in enumerate(_bounded(file), 1):
            data = data.removeprefix(_MARK) if number == 1 else data
            if data.strip():
                yield number, str(number), parse(data.rstrip(b"\r\n"))


def _one_object(path: os.PathLike[str] | str, file: IO[bytes]) -> dict[str, Any] | BadEntry:
    """Returns the one object that all lines of a file make. Raises InputError where it is not one record."""
    file.seek(0)
    fields = parse(file.read(_LONGEST_LINE + 1).removeprefix(_MARK))
    if isinstance(fields, BadEntry):
        raise InputError(f"{path}: is JSON over several lines, and no array and no single record; write an array, or one record a line")
    return fields


def _is_array(file: IO[bytes]) -> bool:
    """Whether a file is one JSON array: it begins with a bracket, and not with a whole line of JSON above others."""
    lines = (stripped for data in _bounded(file) if (stripped := data.removeprefix(_MARK).strip()))
    first = next(lines, b"")
    if not first.startswith(b"["):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return next(lines, None) is None


def _array(data: bytes) -> Iterator[tuple[int, str, dict[str, Any] | BadEntry]]:
    """Yields the entries of an array one by one, so that only the file's text and one entry are held."""
    try:
        text = data.removeprefix(_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        yield 1, "1", BadEntry(f"byte {error.start + 1} of the file is not UTF-8; save the manifest as UTF-8")
        return
    faults: list[str] = []
    decoder = json.JSONDecoder(object_pairs_hook=_noting_doubles(faults), parse_constant=_ABSENT)
    place, line, counted, number = _past_space(text, text.index("[") + 1), 1, 0, 0
    while text[place : place + 1] != "]":
        number += 1
        line, counted = line + text.count("\n", counted, place), place
        where = f"{line}: entry {number}"
        faults.clear()
        try:
            value, end = decoder.raw_decode(text, place)
            place = _past_space(text, end)
            if text[place : place + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
        except (ValueError, RecursionError) as error:
            lost = "nothing from here on can be read: correct it, or write one record a line"
            yield line, where, BadEntry(f"malformed JSON ({line_of(error)}); {lost}")
            return
        wrong = faults[0] if faults else f"{kind(value)} where a record belongs" if not isinstance(value, dict) else ""
        yield line, where, BadEntry(f"{wrong}; correct the entry") if wrong else value
        if text[place] == ",":
            place = _past_space(text, place + 1)
    place = _past_space(text, place + 1)
    if place < len(text):
        line += text.count("\n", counted, place)
        yield line, str(line), BadEntry("text follows the end of the array, which is not read; write one array, or one record a line")


def _past_space(text: str, place: int) -> int:
    while text[place : place + 1] in _SPACE:
        place += 1
    return place


def _bounded(file: IO[bytes]) -> Iterator[bytes]:
    """Yields lines; of one that is too long the beginning, one byte over the bound, the rest being passed by."""
    while data := file.readline(_LONGEST_LINE + 1):
        whole = len(data) <= _LONGEST_LINE or data.endswith(b"\n")
        while not whole:
            rest = file.readline(1 << 16)
            whole = not rest or rest.endswith(b"\n")
        yield data


def parse(data: bytes) -> dict[str, Any] | BadEntry:
    """Returns the fields of one JSON object, or what is wrong with it."""
    try:
        return _fields(data)
    except BadEntry as error:
        return error


def _fields(data: bytes) -> dict[str, Any]:
    if len(data) > _LONGEST_LINE:
        raise BadEntry(f"a line of over {_LONGEST_LINE >> 20} MiB is no record; write one JSON object a line")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadEntry(f"byte {error.start + 1} of the line is not UTF-8; save the manifest as UTF-8") from None
    faults: list[str] = []
    try:
        value = json.loads(text, object_pairs_hook=_noting_doubles(faults), parse_constant=_ABSENT)
    except json.JSONDecodeError as error:
        raise BadEntry(f"malformed JSON ({error.msg.removesuffix(' at')} at column {error.colno}); write one JSON object a line") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise BadEntry(f"malformed JSON ({error}); write one JSON object a line") from None
    if faults:
        raise BadEntry(f"{faults[0]}; correct the line")
    if not isinstance(value, dict):
        raise BadEntry(f"{kind(value)} where a record belongs; write one JSON object a line")
    return value


def _noting_doubles(faults: list[str]) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """Returns a hook of the JSON reader that makes an object's fields and notes a field that appears twice."""

    def fields_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            faults.append(f"field {next(name for name in names if names.count(name) > 1)!r} appears twice")
        return fields

    return fields_of
