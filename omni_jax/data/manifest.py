"""Manifests in, records, problems and notes out. `data.formats` reads the files, `data.entries` knows what an entry holds."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from omni_jax.data.entries import (
    ASKED,
    BadEntry,
    RemoteMedia,
    interval_fields,
    is_web_address,
    name_of,
    question,
    record_of,
    spelled,
)
from omni_jax.data.formats.entry import Entry, Notes, files_of, media_kind
from omni_jax.data.formats.table import FORMATS, note_sets, sources
from omni_jax.data.paths import absolute
from omni_jax.io import atomic_write
from omni_jax.io.messages import some
from omni_jax.types import FilePart, InputError, Record

_LIST = re.compile(r"""\[\s*(['"]).*\1\s*\]""", re.DOTALL)
NEGATIVES = "negatives"
"""Field of a record that `omni-jax mine` writes: direction -> ids of its hard negatives, hardest first."""

Counts = Mapping[str, int]


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
      remote: id, URL, start and end of the problems whose media are web addresses, for a downloader.
    """

    records: tuple[Record, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()
    remote: tuple[tuple[str, str, str, str], ...] = ()

    @property
    def first_problem(self) -> str:
        """Why there is no record, for the end of an error: the first problem; "" where there is none."""
        return f"; the first: {self.problems[0].reason}" if self.problems else ""


def read_manifest(
    path: os.PathLike[str] | str | Sequence[os.PathLike[str] | str],
    media_root: os.PathLike[str] | str | None = None,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    fetched: os.PathLike[str] | str | None = None,
) -> Manifest:
    """Returns the records of a manifest; a bad entry becomes a problem and never stops the others.

    Args:
      path: JSON lines, or one JSON array, of plain or official entries; or any other of `formats.table.FORMATS`: a file, a folder or a
        pattern, or several of these; may be `gs://...`.
      media_root: folder that relative media paths start from, default the manifest's own. One that is given also confines them: a path that
        leads out of it, by "..", as an absolute path or through a link, is a problem of its record.
      format: a name of `formats.table.FORMATS`; None goes by content and name.
      columns: role -> name of the column, member or field that has it, among `formats.entry.ROLES`.
      fetched: folder of files called by records' ids, which take the place of web addresses.

    Raises:
      InputError: when the manifest is missing, a directory with nothing known in it, unreadable or without a single entry, and for columns
        that a table lacks.
    """
    records: list[Record] = []
    problems: list[Problem] = []
    remote: list[tuple[str, str, str, str]] = []
    notes = Notes()
    first: dict[str, Entry] = {}
    made: list[str] = []
    conversations = True  # are what the ids were made for
    extra, asked, capitals, whole = (collections.Counter[str]() for _ in range(4))
    listed = 0
    paths = [path] if isinstance(path, str | os.PathLike) else path
    found = [source for one in paths for source in sources(one, format)]
    note_sets([file for _, file in found], notes)
    apart = _told_apart([file for kind, file in found if kind == "parquet"])
    read = (
        _one_caption_each(_named(entry, apart)) if kind != "json" or "text" in (columns or {}) else (entry,)
        for kind, file in found
        for entry in FORMATS[kind](file, columns or {}, notes)
    )
    file = root = None
    here = _fetched_files(fetched) if fetched is not None else {}
    for entry in itertools.chain.from_iterable(read):
        if entry.file != file:
            file = entry.file
            root = absolute(media_root) if media_root is not None else absolute(file).parent
        name = entry.id
        try:
            if isinstance(entry.fields, BadEntry):
                raise entry.fields
            fields, renamed = spelled(entry.fields)
            name, new = name_of(fields, entry.nameless)
            if name in first:
                again = "the same entry appears" if new else f"id {name!r} was used"
                raise BadEntry(f"{again} {_place(first[name], entry)} already; give every record its own")
            first[name] = entry._replace(fields={})
            if name in here:
                fields |= {field: _fetched(here[name], field) for field in ("video", "audio") if is_web_address(fields.get(field))}
            records.append(record_of(fields, name, entry.line, root, media_root is not None))
            made += [name] * new
            conversations &= not (new and entry.nameless)
            extra.update(name for name in records[-1].extra if name != NEGATIVES)
            capitals.update(renamed)
            whole.update(interval_fields(records[-1]))
            listed += bool(records[-1].text and _LIST.fullmatch(records[-1].text))
            if (said := question(fields)) is not None and said not in ASKED:
                asked[said] += 1
        except BadEntry as error:
            problems.append(Problem(id=name, line=entry.line, file=str(file), reason=f"{file}:{entry.where}: {error}"))
            if isinstance(error, RemoteMedia):
                remote.append((str(name), error.address, *error.interval))
    if not records and not problems:
        raise InputError(f"{paths[0] if paths else path}: the manifest is empty; give one with records, as one JSON record a line")
    if notes.fields and (absent := [name for name in (columns or {}).values() if name not in notes.fields]):
        what = f"{paths[0]}: no record has {absent[0]!r}, which --columns names"
        raise InputError(f"{what}; they have {some(map(one_line, notes.fields), 20)}")
    if listed:
        notes.add(
            "captions that are lists by their look and are read as one text",
            next(r.id for r in records if _LIST.fullmatch(r.text or "")),
            listed,
        )
    said = (*notes.lines(), *_notes(made, "conversations" if conversations else "records", extra, asked, capitals, whole))
    return Manifest(tuple(records), tuple(problems), said, tuple(remote))


def _fetched_files(folder: os.PathLike[str] | str) -> dict[str, list[str]]:
    """Returns id -> the media files of a folder that are called so, with a suffix of media or none, in subfolders for slashes of an id."""
    root = Path(os.path.abspath(folder))
    found: dict[str, list[str]] = {}
    for file in files_of(root):
        if media_kind(file.name) or not file.suffix:
            found.setdefault(file.relative_to(root).with_suffix("").as_posix(), []).append(os.fspath(file))
    return found


def _fetched(files: Sequence[str], field: str) -> str:
    """Returns the file for a field: a picture, which downloaders write beside a clip, only where there is nothing else."""
    order = (field, "audio" if field == "video" else "video", "image")
    places = [order.index(media_kind(file) or field) for file in files]
    found = [file for file, place in zip(files, places, strict=True) if place == min(places)]
    if len(found) > 1:
        raise BadEntry(f"--fetched holds {' and '.join(PurePath(file).name for file in found)} of one id; keep one of them")
    return found[0]


def _told_apart(files: Sequence[os.PathLike[str] | str]) -> dict[str, str]:
    """Returns file -> the folders before its name that tell it from files of the same name; nothing where all names differ."""
    names = [PurePath(os.path.abspath(file)) if "://" not in os.fspath(file) else PurePath(os.fspath(file)) for file in files]
    if len({name.name for name in names}) == len(names):
        return {}
    shared = os.path.commonpath([name.parent for name in names])
    return {os.fspath(file): name.parent.relative_to(shared).as_posix() for file, name in zip(files, names, strict=True)}


def _named(entry: Entry, apart: Mapping[str, str]) -> Entry:
    """Returns an entry whose id is made of its file's name with the folders in it that tell the file from others."""
    folders = apart.get(os.fspath(entry.file), ".") if entry.numbered else "."
    if folders == "." or isinstance(entry.fields, BadEntry):
        return entry
    return entry._replace(fields={**entry.fields, "id": f"{folders}/{entry.fields['id']}"})


def _one_caption_each(entry: Entry) -> Iterator[Entry]:
    """Yields an entry with a list of captions as one for each of them, called ID-NUMBER."""
    fields = entry.fields
    captions = fields.get("text") if isinstance(fields, dict) else None
    if isinstance(fields, BadEntry) or not isinstance(captions, list) or len(captions) < 2:
        yield entry
        return
    for number, caption in enumerate(captions):
        named = {"id": f"{fields['id']}-{number}"} if fields.get("id") is not None else {}
        yield entry._replace(fields={**fields, "text": "" if caption is None else caption, **named})


def _place(earlier: Entry, entry: Entry) -> str:
    if earlier.file != entry.file:
        return f"in {earlier.file}"
    return f"on line {earlier.line}" if earlier.where[0].isdigit() else f"in {earlier.where}"


def row_of(record: Record, folder: Path) -> dict[str, Any]:
    """Returns a record as a line of a manifest in `folder`, ready for JSON: files within it are named from there."""

    def named(file: Any) -> str:
        return str(file.relative_to(folder) if isinstance(file, Path) and file.is_relative_to(folder) else file)

    row: dict[str, Any] = {"id": record.id}
    for name in ("text", "video", "audio", "timestamps", "prefix"):
        value = getattr(record, name)
        if isinstance(value, FilePart):
            places = ("column", "group", "row") if value.column else ("start", "size")
            value = {"file": named(value.file), "name": value.name, **{place: getattr(value, place) for place in places}}
        elif name in ("video", "audio") and value is not None:
            value = named(value)
        if value is not None:
            row[name] = value
    return {**row, **record.extra}


def _notes(made: list[str], what: str, extra: Counts, asked: Counts, capitals: Counts, whole: Counts) -> Iterator[str]:
    if made:
        yield f"{len(made)} {what} have no id and are called by their file and a digest; the first: {made[0]}"
    if extra:
        yield f"fields that are carried along and not used: {_counted(extra)}"
    if whole:
        yield f"files are used whole, whatever {_counted(whole)} says; to use a part write timestamps: [start, end] in seconds"
    if capitals:
        yield f"fields that are read as those without capitals: {_counted(capitals)}"
    if asked:
        first = one_line(next(iter(asked)))
        yield f"{sum(asked.values())} conversations ask something of their own, where the preset's filler is used; the first: {first!r}"


def _counted(fields: Counts) -> str:
    return ", ".join(f"{one_line(name) or 'one without a name'} ({count} records)" for name, count in fields.items())


def one_line(text: str) -> str:
    """The beginning of a text of other people's, safe to print."""
    return "".join(c if c.isprintable() else " " for c in text)[:60].strip()


def write_jsonl_atomic(path: os.PathLike[str] | str, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes rows as JSON lines and returns their number; the file appears under its name only when it is complete.

    Raises:
      InputError: when it cannot be written.
    """
    count = 0
    with atomic_write(absolute(path)) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count
