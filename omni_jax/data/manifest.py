"""Manifests: JSON lines in, records and a list of problems out (SPEC section 9).

Two forms of a line are read, told apart line by line:
  plain     {"id", "text", "video", "audio", "timestamps", "prefix"}, every field but `id` optional
  official  {"id", "conversations": [{"from": "human", ...}, {"from": "gpt", "value": CAPTION}], "video", "audio", "timestamps"}
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from omni_jax.config import PREFIXES
from omni_jax.types import InputError, Record

_LONGEST_LINE = 1 << 24  # bytes; an honest record has a few hundred, and a line is held in memory several times over
_LONGEST_SECONDS = 1e9  # some thirty years: beyond it a number is a mistake
_PLAIN = ("id", "text", "video", "audio", "timestamps", "prefix")
_OFFICIAL = ("id", "conversations", "video", "audio", "timestamps")


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
    """What a manifest holds: its usable records and its unusable lines, both in the order of the file."""

    records: tuple[Record, ...]
    problems: tuple[Problem, ...]


def read_manifest(path: os.PathLike[str] | str, media_root: os.PathLike[str] | str | None = None) -> Manifest:
    """Returns the records of a manifest; a bad line becomes a problem and never stops the others.

    Args:
      path: JSON lines, plain or official; may be `gs://...`.
      media_root: folder that relative media paths start from, default the manifest's own. One that is given also confines them: a path that
        leads out of it, by "..", as an absolute path or through a link, is a problem of its record.

    Raises:
      InputError: when the manifest is missing, a directory, unreadable or without a single line.
    """
    root = _absolute(media_root) if media_root is not None else _absolute(path).parent
    records: list[Record] = []
    problems: list[Problem] = []
    first_line: dict[str, int] = {}
    for line, data in _lines(path):
        name: str | None = None
        try:
            fields = _fields(data)
            name = _id(fields)
            if name in first_line:
                raise _BadLine(f"id {name!r} was used on line {first_line[name]} already; give every record its own")
            first_line[name] = line
            records.append(_record(_known(fields), name, line, root, media_root is not None))
        except _BadLine as error:
            problems.append(Problem(id=name, line=line, file=str(path), reason=f"{path}:{line}: {error}"))
    if not records and not problems:
        raise InputError(f"{path}: the manifest is empty; write one JSON record a line")
    return Manifest(tuple(records), tuple(problems))


def write_jsonl_atomic(path: os.PathLike[str] | str, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes rows as JSON lines and returns their number; the file appears under its name only when it is complete.

    Raises:
      InputError: when it cannot be written.
    """
    target = _absolute(path)
    # An object store shows an object only when it is closed; a local file is written beside its place and renamed.
    remote = not isinstance(target, Path)
    written = target if remote else target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    count = 0
    try:
        with written.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
            if not remote:
                file.flush()
                os.fsync(file.fileno())
        if not remote:
            os.replace(written, target)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); check that the folder exists and has room") from None
    finally:
        if not remote:
            written.unlink(missing_ok=True)
    return count


class _BadLine(Exception):
    """One line cannot be used; the message completes "FILE:LINE: ..."."""


def _absolute(path: os.PathLike[str] | str) -> Any:
    """Returns an absolute pathlib.Path, or an epath.Path for an object store."""
    if "://" in os.fspath(path):
        from etils import epath  # reading gs:// alone needs it

        try:
            return epath.Path(os.fspath(path))
        except KeyError:
            raise InputError(f"{path}: not a kind of storage that is known; use a local path or gs://") from None
    return Path(os.path.abspath(path))


def _lines(path: os.PathLike[str] | str) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, bytes) of each line that is not blank."""
    manifest = _absolute(path)
    try:
        if manifest.is_dir():
            raise InputError(f"{path}: is a directory; name the manifest file in it")
        with manifest.open("rb") as file:
            for number, data in enumerate(_bounded(file), 1):
                data = data.removeprefix(b"\xef\xbb\xbf") if number == 1 else data  # a byte-order mark, as some editors write
                if data.strip():
                    yield number, data.rstrip(b"\r\n")
    except FileNotFoundError:
        raise InputError(f"{path}: manifest not found; check the path") from None
    except OSError as error:
        raise InputError(f"{path}: the manifest cannot be read ({error.strerror or error}); check its permissions") from None
    except ImportError as error:  # the client of an object store
        raise InputError(f"{path}: the manifest cannot be read ({error})") from None


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
        raise _BadLine(f"a line of over {_LONGEST_LINE >> 20} MiB is no record; write one JSON object a line")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadLine(f"byte {error.start + 1} of the line is not UTF-8; save the manifest as UTF-8") from None
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise _BadLine(f"malformed JSON ({error.msg} at column {error.colno}); write one JSON object a line") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise _BadLine(f"malformed JSON ({error}); write one JSON object a line") from None
    if not isinstance(value, dict):
        raise _BadLine(f"{_kind(value)} where a record belongs; write one JSON object a line")
    return value


def _known(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields that are present; null means absent."""
    allowed = _OFFICIAL if "conversations" in fields else _PLAIN
    unknown = [name for name in fields if name not in allowed]
    if unknown:
        raise _BadLine(f"unknown field {', '.join(map(repr, unknown))}; the fields are {', '.join(allowed)}")
    return {name: value for name, value in fields.items() if value is not None}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _BadLine(f"field {twice!r} stands twice; keep one")
    return fields


def _no_constant(name: str) -> None:
    raise _BadLine(f"malformed JSON ({name} is not a JSON value); write one JSON object a line")


def _id(fields: Mapping[str, Any]) -> str:
    value = fields.get("id")
    value = "" if value is None else value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise _BadLine(f"id is {_kind(value)}; make it a string")
    if not value:
        raise _BadLine("has no id; give every record its own")
    return _encodable(value, "id")


def _record(fields: Mapping[str, Any], name: str, line: int, root: Any, confined: bool) -> Record:
    text = _caption(fields["conversations"]) if "conversations" in fields else fields.get("text")
    if text is not None:
        if not isinstance(text, str):
            raise _BadLine(f"record {name!r}: text is {_kind(text)}; make it a string")
        if not text.strip():
            raise _BadLine(f"record {name!r}: the caption is empty; write one, or leave the field out to use the media alone")
        _encodable(text, "the caption")
    video, audio = (_media_path(fields, key, name, root, confined) for key in ("video", "audio"))
    if text is None and video is None and audio is None:
        raise _BadLine(f"record {name!r}: has no text, video or audio; give it at least one")
    prefix = fields.get("prefix")
    if prefix is not None and prefix not in PREFIXES:
        raise _BadLine(f"record {name!r}: prefix {json.dumps(prefix)[:80]} must be one of {', '.join(PREFIXES)}")
    times = _timestamps(fields.get("timestamps"), name)
    return Record(id=name, text=text, video=video, audio=audio, timestamps=times, line=line, prefix=prefix)


def _caption(turns: Any) -> str:
    """The caption of an official record: what the second of its two turns says."""
    if (
        not isinstance(turns, list)
        or not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns)
        or [turn.get("from") for turn in turns] != ["human", "gpt"]
    ):
        raise _BadLine('conversations must be [{"from": "human", "value": "..."}, {"from": "gpt", "value": CAPTION}]')
    return turns[1]["value"]


def _media_path(fields: Mapping[str, Any], key: str, name: str, root: Any, confined: bool) -> Any:
    value = fields.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not value or "\0" in value:
        raise _BadLine(f"record {name!r}: {key} is {_kind(value)}; make it the path of a file")
    _encodable(value, key)
    try:
        path = _absolute(value) if "://" in value else root / value
    except InputError as error:
        raise _BadLine(f"record {name!r}: {key} {error}") from None
    if confined and not _inside(path, root):
        raise _BadLine(f"record {name!r}: {key} {value!r} leads out of the media root {root}; move the file there or choose another root")
    return path


def _inside(path: Any, root: Any) -> bool:
    """Whether a path, its links followed, lies under a folder. An object store has no links, and ".." there is a plain name or refused."""
    if "://" in os.fspath(path) or "://" in os.fspath(root):
        text = os.fspath(path)
        return text.startswith(os.fspath(root).rstrip("/") + "/") and ".." not in text.split("/")
    folder, name = os.path.split(path)
    real = os.path.join(_real(folder), name)
    if os.path.islink(real) or name in ("", ".", ".."):
        real = os.path.realpath(real)
    return real.startswith(_real(os.fspath(root)).rstrip("/") + "/")


@functools.lru_cache(maxsize=4096)  # a folder holds many clips
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _timestamps(value: Any, name: str) -> tuple[float, float] | None:
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2 and all(isinstance(x, int | float) and not isinstance(x, bool) for x in value):
        start, end = value
        if 0 <= start < end <= _LONGEST_SECONDS:
            return float(start), float(end)
    raise _BadLine(f"record {name!r}: timestamps {json.dumps(value)[:80]} must be [start, end] in seconds with 0 <= start < end")


def _encodable(text: str, what: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _BadLine(f"{what} holds half of a surrogate pair (character {error.start + 1}), which is no text; write it anew") from None
    return text


def _kind(value: Any) -> str:
    """A JSON value's type in words."""
    if isinstance(value, str):
        return "an empty string" if not value else "a string"
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
