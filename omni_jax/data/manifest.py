"""Manifests: JSON lines or one JSON array in, records, problems and notes out. `data.entries` knows what an entry holds."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any

from omni_jax.data.entries import ASKED, BadEntry, absolute, interval_fields, kind, name_of, question, record_of, spelled
from omni_jax.io import replacing
from omni_jax.types import InputError, Record

_MARK = b"\xef\xbb\xbf"  # a byte-order mark, as some editors write
_SPACE = tuple(" \t\r\n")
_LONGEST_ARRAY = 1 << 32  # bytes of a file that is one array: its text is held
_LONGEST_LINE = 1 << 24  # bytes; an honest record has a few hundred, and a line is held in memory several times over


@dataclasses.dataclass(frozen=True)
class Problem:
    """A line of a manifest, or a clip, that cannot be used.

    Attributes:
      id: the record's id; None where it is not known.
      line: line of the manifest, from 1.
      file: the file at fault: the manifest, or a media file.
      reason: one line: what is wrong and what to do.
    """

    id: str | None
    line: int
    file: str
    reason: str

    def row(self) -> dict[str, Any]:
        """The problem as a line of `*.errors.jsonl`."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a manifest holds.

    Attributes:
      records: its usable records, in the order of the file.
      problems: its unusable entries, likewise.
      notes: one line each for what was made up or is not used: ids, fields, questions.
    """

    records: tuple[Record, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()

    @property
    def first_problem(self) -> str:
        """Why there is no record, for the end of an error: the first problem; "" where there is none."""
        return f"; the first: {self.problems[0].reason}" if self.problems else ""


def read_manifest(path: os.PathLike[str] | str, media_root: os.PathLike[str] | str | None = None) -> Manifest:
    """Returns the records of a manifest; a bad entry becomes a problem and never stops the others.

    Args:
      path: JSON lines, or one JSON array, of plain or official entries; may be `gs://...`.
      media_root: folder that relative media paths start from, default the manifest's own. One that is given also confines them: a path that
        leads out of it, by "..", as an absolute path or through a link, is a problem of its record.

    Raises:
      InputError: when the manifest is missing, a directory, unreadable or without a single entry.
    """
    root = absolute(media_root) if media_root is not None else absolute(path).parent
    records: list[Record] = []
    problems: list[Problem] = []
    first_line: dict[str, int] = {}
    made: list[str] = []
    extra: collections.Counter[str] = collections.Counter()
    asked: collections.Counter[str] = collections.Counter()
    capitals: collections.Counter[str] = collections.Counter()
    whole: collections.Counter[str] = collections.Counter()
    for line, where, content in _entries(path):
        name: str | None = None
        try:
            if isinstance(content, BadEntry):
                raise content
            fields, renamed = spelled(content if isinstance(content, dict) else _fields(content))
            name, new = name_of(fields)
            if name in first_line:
                again = "the same entry stands" if new else f"id {name!r} was used"
                raise BadEntry(f"{again} on line {first_line[name]} already; give every record its own")
            first_line[name] = line
            records.append(record_of(fields, name, line, root, media_root is not None))
            made += [name] * new
            extra.update(records[-1].extra.keys())
            capitals.update(renamed)
            whole.update(interval_fields(records[-1]))
            if (said := question(fields)) is not None and said not in ASKED:
                asked[said] += 1
        except BadEntry as error:
            problems.append(Problem(id=name, line=line, file=str(path), reason=f"{path}:{where}: {error}"))
    if not records and not problems:
        raise InputError(f"{path}: the manifest is empty; write one JSON record a line")
    return Manifest(tuple(records), tuple(problems), tuple(_notes(made, extra, asked, capitals, whole)))


def _notes(
    made: list[str], extra: Mapping[str, int], asked: Mapping[str, int], capitals: Mapping[str, int], whole: Mapping[str, int]
) -> Iterator[str]:
    if made:
        yield f"{len(made)} conversations have no id and are called by their file and a digest; the first: {made[0]}"
    if extra:
        yield f"fields that are carried along and not used: {_counted(extra)}"
    if whole:
        yield f"files are used whole, whatever {_counted(whole)} says; to use a part write timestamps: [start, end] in seconds"
    if capitals:
        yield f"fields that are read as those without capitals: {_counted(capitals)}"
    if asked:
        first = one_line(next(iter(asked)))
        yield f"{sum(asked.values())} conversations ask something of their own, where the preset's filler is used; the first: {first!r}"


def _counted(fields: Mapping[str, int]) -> str:
    return ", ".join(f"{one_line(name)} ({count} records)" for name, count in fields.items())


def one_line(text: str) -> str:
    """The beginning of a text of other people's, safe to print."""
    return "".join(c if c.isprintable() else " " for c in text)[:60].strip()


def write_jsonl_atomic(path: os.PathLike[str] | str, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes rows as JSON lines and returns their number; the file appears under its name only when it is complete.

    Raises:
      InputError: when it cannot be written.
    """
    count = 0
    with replacing(absolute(path)) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _entries(path: os.PathLike[str] | str) -> Iterator[tuple[int, str, bytes | dict[str, Any] | BadEntry]]:
    """Yields (line from 1, place for messages, the line's bytes or an array's entry) of each entry."""
    manifest = absolute(path)
    try:
        if manifest.is_dir():
            raise InputError(f"{path}: is a directory; name the manifest file in it")
        with manifest.open("rb") as file:
            if _is_array(file):
                file.seek(0)
                data = file.read(_LONGEST_ARRAY + 1)
                if len(data) > _LONGEST_ARRAY:
                    raise InputError(f"{path}: an array of over {_LONGEST_ARRAY >> 30} GiB; write one JSON record a line (.jsonl)")
                yield from _array(data)
                return
            file.seek(0)
            for number, data in enumerate(_bounded(file), 1):
                data = data.removeprefix(_MARK) if number == 1 else data
                if data.strip():
                    yield number, str(number), data.rstrip(b"\r\n")
    except FileNotFoundError:
        raise InputError(f"{path}: manifest not found; check the path") from None
    except OSError as error:
        raise InputError(f"{path}: the manifest cannot be read ({error.strerror or error}); check its permissions") from None
    except ImportError as error:  # the client of an object store
        raise InputError(f"{path}: the manifest cannot be read ({error})") from None


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
    decoder = json.JSONDecoder(object_pairs_hook=_noting_doubles(faults), parse_constant=_noting_constants(faults))
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
            reason = " ".join(str(error).split())
            yield (
                line,
                where,
                BadEntry(f"malformed JSON ({reason}); nothing from here on can be read: correct it, or write one record a line"),
            )
            return
        wrong = faults[0] if faults else f"{kind(value)} where a record belongs" if not isinstance(value, dict) else ""
        yield line, where, BadEntry(f"{wrong}; correct the entry") if wrong else value
        if text[place] == ",":
            place = _past_space(text, place + 1)
    place = _past_space(text, place + 1)
    if place < len(text):
        line += text.count("\n", counted, place)
        yield line, str(line), BadEntry("text stands behind the end of the array, which is not read; write one array, or one record a line")


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


def _fields(data: bytes) -> dict[str, Any]:
    """Parses one line into its fields."""
    if len(data) > _LONGEST_LINE:
        raise BadEntry(f"a line of over {_LONGEST_LINE >> 20} MiB is no record; write one JSON object a line")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadEntry(f"byte {error.start + 1} of the line is not UTF-8; save the manifest as UTF-8") from None
    faults: list[str] = []
    try:
        value = json.loads(text, object_pairs_hook=_noting_doubles(faults), parse_constant=_noting_constants(faults))
    except json.JSONDecodeError as error:
        raise BadEntry(f"malformed JSON ({error.msg} at column {error.colno}); write one JSON object a line") from None
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


def _noting_constants(faults: list[str]) -> Callable[[str], None]:
    return lambda name: faults.append(f"malformed JSON ({name} is not a JSON value)")
