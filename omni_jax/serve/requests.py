"""From a request's body to items to embed: JSON as OpenAI's API has it, or a form with files. Names of files and URLs are never taken."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.requests import Request

from omni_jax.serve.guards import Refused

MEDIA = ("video", "audio", "image", "file")
"""Fields that hold a file; "file" is one of any kind, which is looked into."""

KEYS = ("text", *MEDIA, "timestamps")
MOST_ITEMS = 128
HEAD = 4096  # bytes of a file that are looked at
_REFERRING = re.compile(rb"#EXTM3U|ffconcat|<MPD|<smil|\A\s*v=0\s", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Query:
    """What a request asks.

    Attributes:
      items: for each thing to embed the fields that `data.items.parse_items` takes; media are bytes or open files.
      options: all other fields.
      many: whether `input` was a list.
    """

    items: list[dict[str, Any]]
    options: Mapping[str, Any]
    many: bool = False


async def read_query(request: Request) -> Query:
    """Returns what a request asks.

    Raises:
      Refused: for a body of another kind, an empty one, media that are no files, or files that may refer to others.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _form(request)
    if kind == "application/json":
        return _parsed(await request.body())
    raise Refused(415, f"the body is {kind[:80] or 'of no type'}; send application/json, or multipart/form-data with files")


async def _form(request: Request) -> Query:
    try:
        form = await request.form(max_files=len(MEDIA), max_fields=16)
    except FormParserError:  # which older versions of starlette let through
        raise Refused(400, "the body is no form of the kind that its header says") from None
    item: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name in item or name in options:
            raise Refused(400, f"{name[:80]!r} appears twice; a form describes one item")
        if isinstance(value, UploadFile):
            if name not in MEDIA:
                raise Refused(400, f"{name[:80]!r} is a file; files are {', '.join(MEDIA)}")
            if value.size:
                _check_head(value.file.read(HEAD), name)
                value.file.seek(0)
                item[name] = value.file
        elif name in MEDIA:
            raise Refused(400, f"{name!r} is text; send the file itself, since names and URLs are not followed")
        elif name == "text":
            item |= {"text": value} if value.strip() else {}
        elif value:
            options[name] = value
    return Query([_item(item)], options)


def _parsed(body: bytes) -> Query:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    if not isinstance(fields, dict) or "input" not in fields:
        raise Refused(400, 'the body has no "input"; give a caption, an object of text, video, audio, image, or a list of these')
    given = fields.pop("input")
    many = isinstance(given, list)
    values = given if many else [given]
    if not 1 <= len(values) <= MOST_ITEMS:
        raise Refused(400, f"input holds {len(values)} items; give 1 to {MOST_ITEMS}")
    return Query([_value(value, number) for number, value in enumerate(values)], fields, many)


def _value(value: Any, number: int) -> dict[str, Any]:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise Refused(400, f"input {number} is a {type(value).__name__}; give a caption, or an object of text, video, audio, image")
    if unknown := sorted(str(key)[:40] for key in value.keys() - {*KEYS})[:5]:
        raise Refused(400, f"input {number} has the unknown keys {', '.join(unknown)}; the keys are {', '.join(KEYS)}")
    item = dict(value)
    for name in MEDIA:
        if item.get(name) is not None:
            item[name] = _decoded(item[name], f"{name} of input {number}")
    return _item(item)


def _decoded(value: Any, what: str) -> bytes:
    text = value.partition(",")[2] if isinstance(value, str) and value.startswith("data:") else value
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise Refused(400, f"the {what} is not base64; send the file itself so, since names and URLs are not followed") from None
    _check_head(content[:HEAD], what)
    return content


def _item(fields: dict[str, Any]) -> dict[str, Any]:
    if "file" in fields:
        fields["item"] = fields.pop("file")
        if fields.keys() & {"video", "audio", "image"}:
            raise Refused(400, "'file' is of any kind; beside video, audio or image it is ambiguous")
    if not fields.keys() - {"timestamps"}:
        raise Refused(400, "there is nothing to embed; give a text or a file")
    return fields


def _check_head(head: bytes, what: str) -> None:
    """Raises Refused for text: playlists and lists of files lead a decoder to other files, and no picture, sound or video is text."""
    line = head[:64].partition(b"\n")[0]
    if head and (_REFERRING.search(head) or all(32 <= byte < 127 or byte in b"\t\r" for byte in line)):
        raise Refused(422, f"the {what} is text, and no picture, sound or video")
