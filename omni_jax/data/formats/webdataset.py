"""Files that are grouped by their names: members of a tar by what precedes the first dot, as WebDataset has it, files of a folder by
what precedes the last, as people name their clips ("Mr. Bean.mp4").

`clip1.mp4`, `clip1.wav`, `clip1.txt` and `clip1.json` are one record, clip1. Text is the caption, JSON its other fields.
"""

from __future__ import annotations

import dataclasses
import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from omni_jax.data.entries import BadEntry
from omni_jax.data.formats.entry import Entry, Notes, files_of, media_kind, reading, renamed
from omni_jax.data.formats.json_entries import parse
from omni_jax.data.paths import absolute
from omni_jax.types import FilePart, InputError

_LONGEST_TEXT = 1 << 20  # bytes of a member that holds a caption or fields
_BLOCK = 1 << 20  # bytes of what follows a tar


@dataclasses.dataclass
class _Group:
    """Files of one key: what each is by its extension (a media file, or the bytes of a text), and what is wrong with one of them."""

    files: dict[str, FilePart | str | bytes] = dataclasses.field(default_factory=dict)
    wrong: str = ""

    def add(self, extension: str, held: FilePart | str | bytes) -> None:
        if extension in self.files:
            self.wrong = self.wrong or f"has two files .{extension}; keep one"
        self.files[extension] = held


def read(path: os.PathLike[str] | str, columns: Mapping[str, str], notes: Notes) -> Iterator[Entry]:
    """Yields the records of a tar, which is listed and not unpacked: media are parts of it.

    Raises:
      InputError: for a file that is no tar, or a compressed one, whose members have no place in it.
    """
    groups: dict[str, _Group] = {}
    damaged = ""
    with reading(path):
        opened: Any = absolute(path).open("rb")
        with opened as file:
            try:
                for name, extension, held in _members(file, absolute(path), columns.get("text")):
                    group = groups.setdefault(name, _Group())
                    if isinstance(held, BadEntry):
                        group.wrong = group.wrong or str(held)
                    else:
                        group.add(extension, held)
            except tarfile.TarError as error:
                if not groups:
                    raise InputError(f"{path}: cannot be read as a tar ({error}); fetch it again") from None
                damaged = f"the tar is truncated or damaged after {len(groups)} records ({error}); fetch it again"
            else:
                if any(block.strip(b"\0") for block in iter(lambda: file.read(_BLOCK), b"")):
                    damaged = f"bytes that are not read follow the end of the tar, after {len(groups)} records: tars that were "
                    damaged += "joined byte by byte must be in files of their own"
    groups = _with_dots(groups, columns)
    yield from _records(path, groups, columns, notes)
    if damaged:
        yield Entry(path, "end", BadEntry(damaged), len(groups) + 1)


def read_folder(path: os.PathLike[str] | str, columns: Mapping[str, str], notes: Notes) -> Iterator[Entry]:
    """Yields the records of a folder of media files, with texts of the same names beside them or not."""
    folder = absolute(path)
    groups: dict[str, _Group] = {}
    for file in files_of(folder):
        name = os.fspath(file)[len(os.fspath(folder).rstrip("/")) + 1 :]
        if file.exists() and not file.is_file():
            continue
        key, extension = _key_in_folder(name, columns)
        is_text = _is_text(extension, columns.get("text"))
        group = groups.setdefault(key, _Group())
        try:
            group.add(extension, _text(file) if is_text else os.fspath(file))
        except OSError as error:
            group.wrong = f".{extension}: cannot be read ({error.strerror or error}); check the file, or what it is a link to"
    kept = {key: group for key, group in groups.items() if any(media_kind(extension) for extension in group.files)}
    if kept and (
        others := [f"{key}.{extension}".rstrip(".") for key, group in groups.items() if key not in kept for extension in group.files]
    ):
        notes.add("files that belong to no media file by their names, and are not read", f"{path}/{others[0]}", len(others))
    yield from _records(path, kept, columns, notes)


def _members(file: IO[bytes], path: Path, caption: str | None) -> Iterator[tuple[str, str, FilePart | bytes | BadEntry]]:
    """Yields key, extension and content of each member that is a file. Raises TarError where the tar ends too soon."""
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
        known: list[Any] = getattr(tar, "members")  # noqa: B009 - not in the types of the standard library
        while (member := tar.next()) is not None:
            known.clear()  # it keeps every one of them otherwise
            if member.isdir():
                continue
            name = "/" * member.name.startswith("/") + "/".join(part for part in member.name.split("/") if part not in ("", "."))
            if _is_hidden(name):
                continue
            key, extension = _key(name)
            start, size = member.offset_data, member.size
            if member.issym() or member.islnk():
                yield key, extension, BadEntry(f"member {name!r} is a link, which is not followed; put the file itself into the tar")
            elif not member.isreg() or member.issparse():
                yield key, extension, BadEntry(f"member {name!r} is not a plain file; put the file itself into the tar")
            elif name.startswith("/") or ".." in name.split("/"):
                yield key, extension, BadEntry(f"member {name!r} has a name that leads out of the tar; rename it")
            elif start + size > length:
                yield key, extension, BadEntry(f"member {name!r} is truncated: the tar ends within it; fetch the tar again")
            elif _is_text(extension, caption):
                file.seek(start)
                yield key, extension, file.read(min(size, _LONGEST_TEXT + 1))
            else:
                yield key, extension, FilePart(path, name, start, size)
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0") or length < tar.offset + tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"no header and no end mark at byte {tar.offset}")


def _key(name: str) -> tuple[str, str]:
    """Returns what a file's name has before and after the first dot of its last part, in small letters the latter."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _key_in_folder(name: str, columns: Mapping[str, str]) -> tuple[str, str]:
    """Returns what a file's name has before and after its last dot, or before and after an extension that `columns` names."""
    asked = next((f".{value}" for value in columns.values() if "." in value and name.lower().endswith(f".{value.lower()}")), None)
    stem, extension = (name[: -len(asked)], asked) if asked else os.path.splitext(name)
    return stem, extension[1:].lower()


def _with_dots(groups: Mapping[str, _Group], columns: Mapping[str, str]) -> dict[str, _Group]:
    """Returns the groups, those divided in which a clip and its text agree beyond the first dot: `v1.0_a.mp4` and `v1.0_a.txt`."""
    found: dict[str, _Group] = {}
    for key, group in groups.items():
        kinds: dict[str, set[bool]] = {}
        names: dict[str, str] = {}
        for extension, held in group.files.items():
            inner = extension.rpartition(".")[0]
            if inner and extension not in columns.values() and (_is_text(extension, None) or media_kind(extension)):
                kinds.setdefault(inner, set()).add(isinstance(held, bytes))
                names |= {inner: held.name.rpartition(".")[0]} if isinstance(held, FilePart) else {}
        apart = {inner for inner, both in kinds.items() if len(both) == 2} if not group.wrong else set()
        for extension, held in group.files.items():
            inner, _, suffix = extension.rpartition(".")
            own = inner in apart
            found.setdefault(names[inner] if own else key, _Group()).add(suffix if own else extension, held)
        if group.wrong:
            found[key] = group
    return found


def _is_hidden(name: str) -> bool:
    """Whether a file is one that systems put beside others: `.DS_Store`, `._clip1.mp4`, `__MACOSX/...`."""
    return any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in name.split("/"))


def _is_text(extension: str, caption: str | None) -> bool:
    return extension == caption or extension.rpartition(".")[2] in ("txt", "json")


def _text(file: Any) -> bytes:
    with file.open("rb") as opened:
        return opened.read(_LONGEST_TEXT + 1)


def _records(path: os.PathLike[str] | str, groups: Mapping[str, _Group], columns: Mapping[str, str], notes: Notes) -> Iterator[Entry]:
    """Yields an entry for each group; says which lack what others have, and which files are not read."""
    for key, group in groups.items():
        for extension in group.files:
            if not _kind(extension) and extension not in columns.values():
                notes.add(f"files .{extension} that are not read", f"{path}:{key}")
    read = {key: group for key, group in groups.items() if group.wrong or any(_kind(e) or e in columns.values() for e in group.files)}
    groups = read or groups  # a README beside clips is no record; where there is nothing else, each is one that lacks everything
    held = {key: {_kind(extension) for extension in group.files} for key, group in groups.items() if not group.wrong}
    for kind in sorted({kind for kinds in held.values() for kind in kinds if kind}):
        if lacking := [key for key, kinds in held.items() if kind not in kinds]:
            notes.add(f"records without a file of {kind}, which others have", f"{path}:{lacking[0]}", len(lacking))
    if {"video"} in held.values() or {"video", "text"} in held.values():
        _note_sound(path, groups, held, columns, notes)
    notes.fields.update((extension, None) for group in groups.values() for extension in group.files)
    for number, (key, group) in enumerate(groups.items(), 1):
        yield Entry(path, key, BadEntry(group.wrong) if group.wrong else _fields(key, group.files, columns, notes), number, id=key)


def _note_sound(
    path: os.PathLike[str] | str,
    groups: Mapping[str, _Group],
    held: Mapping[str, set[str | None]],
    columns: Mapping[str, str],
    notes: Notes,
) -> None:
    if "audio" in columns or any("audio" in kinds for kinds in held.values()):
        return
    first = next(e for key in held for e in groups[key].files if _kind(e) == "video")
    notes.add(f"sources whose videos may have sound, which --columns audio={first} uses", path)


def _kind(extension: str) -> str | None:
    """Returns what a file is by its extension: "text", "fields", "video", "audio", "image", or None for what is not read."""
    return {"txt": "text", "json": "fields"}.get(extension) or media_kind(extension)


def _fields(key: str, files: Mapping[str, FilePart | str | bytes], columns: Mapping[str, str], notes: Notes) -> dict[str, Any] | BadEntry:
    """Returns the fields of a record from its files. A file overrides a field of JSON, and `columns` overrides both."""
    fields: dict[str, Any] = {}
    contents: dict[str, Any] = {}
    for extension, held in files.items():
        if not isinstance(held, bytes):
            contents[extension] = held
        elif len(held) > _LONGEST_TEXT:
            return BadEntry(f".{extension}: over {_LONGEST_TEXT >> 20} MiB of text is no caption; shorten it")
        elif extension == "json":
            read = parse(held)
            if isinstance(read, BadEntry):
                return BadEntry(f".json: {read}")
            fields = read
            notes.fields.update(dict.fromkeys(fields))
        else:
            try:
                contents[extension] = held.decode("utf-8-sig").strip("\r\n")
            except UnicodeDecodeError as error:
                return BadEntry(f".{extension}: byte {error.start + 1} is not UTF-8; save it as UTF-8")
    found = renamed({**fields, **contents}, columns)
    if isinstance(found, BadEntry):
        return found
    taken = {role for role, name in columns.items() if name in fields or name in contents}
    found = {name: value for name, value in found.items() if name in taken or name not in contents}
    if "txt" in contents and "text" not in taken:
        found["text"] = contents["txt"]
    for kind in ("video", "audio", "image"):
        choice = [extension for extension in files if _kind(extension) == kind] if kind not in taken else []
        for better in (lambda e: e not in columns.values(), lambda e: "." not in e):
            choice = [extension for extension in choice if better(extension)] or choice if len(choice) > 1 else choice
        if len(choice) > 1:
            listed = ", ".join(f".{extension}" for extension in choice)
            advice = f"choose one with --columns {kind}={choice[0]}"
            advice += ", or rename the files: what follows the first dot is no part of a key" if "." in choice[0] else ""
            return BadEntry(f"has several files of {kind} ({listed}); {advice}")
        if choice and (kind != "image" or found.get("video") is None):
            found["video" if kind == "image" else kind] = contents[choice[0]]
    return {**found, "id": found.get("id") if "id" in taken else key}
