"""One entry of a manifest: its fields to a record (SPEC section 9).

Two forms are known; each entry shows which it has:
  plain     {"id", "text", "video", "audio", "timestamps", "prefix"}, every field but `id` optional
  official  {"id", "conversations": [{"from": "human", ...}, {"from": "gpt", "value": CAPTION}], "video", "audio", "timestamps"}, as
            OmniRetriever and WAVE train on: the id may be missing, a system turn may come first, a file may be in a list of its own, and
            `pos_image` may hold the video that belongs to a sound.
Other fields are carried along in `Record.extra`.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from omni_jax.config import PREFIXES
from omni_jax.data.paths import is_inside, media_path
from omni_jax.data.times import interval
from omni_jax.types import FilePart, InputError, Record

PLAIN = ("id", "text", "video", "audio", "timestamps", "prefix")
OFFICIAL = ("id", "conversations", "video", "audio", "timestamps", "prefix", "pos_image")
ASKED = ("Please describe the video.", "Please describe the audio.")  # what the official manifests ask, and what presets write themselves
_NEAR = 0.8  # likeness of two names above which one is taken for a slip of the other
_SPELLED: dict[str, tuple[type, ...]] = {
    "id": (str, int),
    "text": (str, list),
    "video": (str, list),
    "audio": (str, list),
    "timestamps": (list, str),
    "conversations": (list,),
}
"""Fields that are read in capitals too, and what they may hold."""

_OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "text": ("caption", "captions", "txt", "description", "sentence"),
    "video": (
        "video_path",
        "video_file",
        "mp4",
        "clip",
        "frame_dir",
        "frames",
        "picture",
        "image",
        "path",
        "file",
        "file_path",
        "filename",
        "file_name",
    ),
    "audio": ("audio_path", "audio_file", "wav", "sound", "path", "file", "file_path", "filename", "file_name"),
    "timestamps": ("interval", "start", "end", "start_time", "end_time", "begin", "segment", "time_range"),
    "conversations": ("conversation", "messages", "dialog"),
}
_BY_COLUMNS = ("text", "video", "audio")
_VAGUE = ("clip", "frames", "picture", "image", "sound", "path", "file", "file_path", "filename", "file_name")
"""Those of them that may as well describe something else: of the source, say, of a record that has media."""


def is_of_a_record(name: str) -> bool:
    """Whether a field of this name says that an object is a record: one that is read, or one that is likely meant for it."""
    plain = _plain(name)
    return plain in (*PLAIN, *OFFICIAL) or plain.endswith("file_name") or any(plain in others for others in _OTHER_NAMES.values())


class BadEntry(Exception):
    """One entry cannot be used; the message completes "FILE:LINE: ..."."""


_ID_LIKE = re.compile(r"[a-z_]*(id|key)_*|index")
"""Fields that may be meant as the id of a record."""


class RemoteMedia(BadEntry):
    """An entry whose media lie at a web address, which is never asked."""

    address: str = ""
    interval: tuple[str, str] = ("", "")  # start and end in seconds, as text


def spelled(fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns an entry with its fields under their own names where only capitals differ ("Audio"), and the names that it had for them.

    A name that two fields might be meant by, or whose value no such field holds, as a date is no interval, stays as it is.
    """
    renamed: dict[str, list[str]] = {}
    for name, value in fields.items():
        plain = name.lower()
        known = name != plain and plain in _SPELLED and fields.get(plain) is None and isinstance(value, _SPELLED[plain])
        if known and not (plain == "timestamps" and isinstance(value, str) and interval(value) is None):
            renamed.setdefault(plain, []).append(name)
    found = {names[0]: plain for plain, names in renamed.items() if len(names) == 1}
    kept = {name: value for name, value in fields.items() if name not in found.values()}
    return {found.get(name, name): value for name, value in kept.items()}, list(found)


def name_of(fields: Mapping[str, Any], nameless: bool = False) -> tuple[str, bool]:
    """Returns an entry's id, and whether it was made here.

    A conversation without one, or a plain entry that may be `nameless`, is called by its file and a digest of what it holds, so that the
    same entry has the same name in every manifest and in every order.

    Raises:
      BadEntry: for an id that cannot be used, or a plain entry without one.
    """
    value = fields.get("id")
    if value is None and (nameless or fields.get("conversations") is not None):
        kept = OFFICIAL if fields.get("conversations") is not None else PLAIN
        held = {name: fields.get(name) for name in kept if name not in ("id", "prefix")}
        held["timestamps"] = _numbers(held["timestamps"])
        try:
            digest = hashlib.blake2b(json.dumps(held, sort_keys=True).encode(), digest_size=8).hexdigest()
        except RecursionError:
            raise BadEntry("its fields are nested too deeply; write plain values") from None
        file = next((one for name in ("video", "audio") if isinstance(one := _alone(fields.get(name)), str) and one), "text")
        stem = PurePath(file.replace("\\", "/")).stem
        return f"{_encodable(stem, 'the file name') or 'clip'}-{digest}", True
    value = "" if value is None else value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value), False
    if not isinstance(value, str):
        raise BadEntry(f"id is {kind(value)}; make it a string")
    if not value:
        other = next((field for field, held in fields.items() if _ID_LIKE.fullmatch(field.lower()) and isinstance(held, str | int)), None)
        raise BadEntry("has no id; give every record its own" + (f", or name the field of it: --columns id={other}" if other else ""))
    if "\0" in value:
        raise BadEntry("id holds a zero character, which tables of embeddings cannot keep; write another one")
    return _encodable(value, "id"), False


def _numbers(times: Any) -> Any:
    """What is written as text as JSON would hold it: one way to write times must not give an entry another name."""
    if isinstance(times, str):
        with contextlib.suppress(ValueError, RecursionError):
            times = json.loads(times)
    written = isinstance(times, str) or (isinstance(times, list) and any(isinstance(time, str) for time in times))
    return (interval(times) or times) if written else times


def record_of(fields: Mapping[str, Any], name: str, line: int, root: Any, confined: bool) -> Record:
    """Returns the record of an entry.

    Args:
      root: folder that relative media paths start from; `confined`: and must stay in.

    Raises:
      BadEntry: for an entry that cannot be used, or has a field that looks like a slip of one that it lacks.
    """
    known, extra = _sorted_out(fields)
    known = {key: _alone(value) if key in ("text", "video", "audio") else value for key, value in known.items()}
    paired = _paired_video(known, name)
    if "conversations" in known:
        text = _caption(known["conversations"])
        text = None if text == "" and paired is not None else text
    else:
        text = known.get("text")
    if text is not None:
        if not isinstance(text, str):
            advice = f"; it holds {len(text)} captions: give each a record of its own" if isinstance(text, list) else "; make it a string"
            advice = " without a caption; write one, or leave the field out to use the media alone" if text == [] else advice
            raise BadEntry(f"record {name!r}: text is {kind(text)}{advice}")
        if not text.strip():
            raise BadEntry(f"record {name!r}: the caption is empty; write one, or leave the field out to use the media alone")
        _encodable(text, "the caption")
    if paired is not None:
        known["video"] = paired
    video, audio = (_media_path(known, key, name, root, confined) for key in ("video", "audio"))
    if text is None and video is None and audio is None:
        raise BadEntry(f"record {name!r}: has no text, video or audio; give it at least one")
    prefix = known.get("prefix")
    if prefix is not None and prefix not in PREFIXES:
        raise BadEntry(f"record {name!r}: prefix {json.dumps(prefix)[:80]} must be one of {', '.join(PREFIXES)}")
    times = _timestamps(known.get("timestamps"), name)
    return Record(id=name, text=text, video=video, audio=audio, timestamps=times, line=line, prefix=prefix, extra=extra)


def question(fields: Mapping[str, Any]) -> str | None:
    """Returns what the human of a conversation asks, its media tag left out; None for a plain entry or no question."""
    turns = fields.get("conversations")
    said = (
        next((t.get("value") for t in turns if isinstance(t, dict) and t.get("from") == "human"), None) if isinstance(turns, list) else None
    )
    if not isinstance(said, str):
        return None
    for tag in ("<image>", "<video>", "<audio>"):
        said = said.replace(f"{tag}\n", "").replace(tag, "")
    return said.strip() or None


def _sorted_out(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the fields that are read and those that are carried along; null means absent."""
    present = {name: value for name, value in fields.items() if value is not None}
    allowed = OFFICIAL if "conversations" in present else PLAIN
    has_media = not {"video", "audio"}.isdisjoint(present)
    for name, value in present.items():
        if name in allowed:
            continue
        likely = [field for field in _resembled(name, value) if field in allowed or field == "conversations"]
        lacking = bool(likely) and not any(field in present for field in likely)
        if (has_media and _plain(name) in _VAGUE) or ("timestamps" in likely and not has_media):
            lacking = False
        if "conversations" in likely and "text" in present:
            lacking = False
        if lacking or (name == "text" and allowed is OFFICIAL):
            advice = f"; did you mean {' or '.join(map(repr, likely))}?" if lacking else ""
            advice += f" --columns {likely[0]}={name} reads it so" if lacking and likely[0] in _BY_COLUMNS else ""
            raise BadEntry(f"unknown field {name!r}; the fields are {', '.join(allowed)}{advice}")
    return {n: v for n, v in present.items() if n in allowed}, {n: v for n, v in present.items() if n not in allowed}


def interval_fields(record: Record) -> list[str]:
    """Names of fields that may say which part of its files a record without `timestamps` is: they are not read."""
    if record.timestamps is not None or (record.video is None and record.audio is None):
        return []
    return [name for name in record.extra if _plain(name) in _OTHER_NAMES["timestamps"]]


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")


def _resembled(name: str, value: Any) -> list[str]:
    """Names of fields that another name may stand for, going by the value too."""
    plain = _plain(name)
    found = [field for field, others in _OTHER_NAMES.items() if plain in others]
    if not isinstance(value, str | list):
        return []
    names = dict.fromkeys((*PLAIN, *OFFICIAL))
    if not found and plain in names:  # in capitals, and not read for that: twice, for one
        return [plain] if plain in _SPELLED else []
    if not found and len(plain) > 3 and not plain.endswith("id"):
        found = difflib.get_close_matches(plain, names, 1, _NEAR)
    # One number alone, or a date, says nothing of an interval.
    return [field for field in found if field != "timestamps" or (isinstance(value, list) and len(value) == 2)]


def _paired_video(known: Mapping[str, Any], name: str) -> Any:
    """The video of `pos_image`, which WAVE's sound-to-video entries hold; None where there is none or the entry has a video of its own."""
    pair = known.get("pos_image")
    if pair is None:
        return None
    video = _alone(pair.get("video")) if isinstance(pair, Mapping) else None
    if not isinstance(video, str) or known.get("video") is not None:
        raise BadEntry(f"record {name!r}: pos_image must hold the video of an entry that has none itself; pictures are not embedded")
    if known.get("timestamps") is not None:
        raise BadEntry(f"record {name!r}: timestamps would cut the video of pos_image too; cut the sound, or write two records")
    return video


def _caption(turns: Any) -> str:
    """The caption of an official entry: what the last of its turns says, without the end token that the training code would add."""
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and turns[0].get("from") == "system":
        turns = turns[1:]
    if (
        not isinstance(turns, list)
        or not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns)
        or [turn.get("from") for turn in turns] != ["human", "gpt"]
    ):
        raise BadEntry(
            'conversations must be [{"from": "human", "value": "..."}, {"from": "gpt", "value": CAPTION}], a system turn before it or not'
        )
    return turns[1]["value"].removesuffix("<|im_end|>")


def _alone(value: Any) -> Any:
    """What a list of one holds; any other value as it is."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _media_path(fields: Mapping[str, Any], key: str, name: str, root: Any, confined: bool) -> Any:
    value = fields.get(key)
    if value is None:
        return None
    if isinstance(value, FilePart):
        return value
    if isinstance(value, Mapping):
        return _part(value, key, name, root, confined)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        raise BadEntry(f"record {name!r}: {key} lists {len(value)} files; a record has one: write one record a file, or join them")
    if not isinstance(value, str) or not value or "\0" in value:
        raise BadEntry(f"record {name!r}: {key} is {kind(value)}; make it the path of a file")
    _encodable(value, key)
    if is_web_address(value):
        found = RemoteMedia(
            f"record {name!r}: {key} {value[:80]}: is a web address, and nothing is fetched; 'omni-jax manifest from SOURCE --fetch-list "
            f"FILE' writes the list for a downloader, and --fetched DIR takes the files of these ids"
        )
        found.address = value
        if times := interval(fields.get("timestamps")):
            found.interval = str(times[0]), str(times[1])
        raise found
    try:
        path = media_path(value, root)
    except InputError as error:
        raise BadEntry(f"record {name!r}: {key} {error}") from None
    if confined and not is_inside(path, root):
        raise BadEntry(f"record {name!r}: {key} {value!r} leads out of the media root {root}; move the file there or choose another root")
    return path


def is_web_address(value: Any) -> bool:
    return isinstance(value, str) and value.lower().startswith(("http://", "https://", "ftp://"))


def _part(value: Mapping[str, Any], key: str, name: str, root: Any, confined: bool) -> FilePart:
    """Returns the part of a file that an object of "file", "name" and a place stands for, as `manifest.row_of` writes it."""
    places = ("column", "group", "row") if "column" in value else ("start", "size")
    numbers = [value.get(place) for place in places if place != "column"]
    if set(value) != {"file", "name", *places} or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise BadEntry(
            f'record {name!r}: {key} is an object, and no part of a file: {{"file", "name", "start", "size"}} of a tar, or '
            f'{{"file", "name", "column", "group", "row"}} of Parquet; make it with \'omni-jax manifest\''
        )
    called, column = value["name"], value.get("column", "")
    if not (isinstance(called, str) and called and "\0" not in called and isinstance(column, str)):
        raise BadEntry(f"record {name!r}: {key} is a part of a file without a name; make it with 'omni-jax manifest'")
    file = _media_path({"file": _encodable(value["file"], key) if isinstance(value["file"], str) else None}, "file", name, root, confined)
    if file is None:
        raise BadEntry(f"record {name!r}: {key} is a part of no file; make it with 'omni-jax manifest'")
    return FilePart(file, _encodable(called, key), **{place: value[place] for place in places})


def _timestamps(value: Any, name: str) -> tuple[float, float] | None:
    times = interval(value)
    if times is None and value is not None:
        said = json.dumps(value)[:80]
        raise BadEntry(f"record {name!r}: timestamps {said} must be [start, end] in seconds or HH:MM:SS with 0 <= start < end")
    return times


def _encodable(text: str, what: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadEntry(f"{what} holds half of a surrogate pair (character {error.start + 1}), which is no text; write it again") from None
    return text


def kind(value: Any) -> str:
    """A JSON value's type in words."""
    if isinstance(value, str):
        return "an empty string" if not value else "a string"
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
