"""OmniRetriever-Bench: a public CSV of source, interval and caption (SPEC section 9).

Its exact column names are not fixed, so each role has aliases, `columns` overrides them, and an error names the roles without a column.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from urllib.parse import parse_qs, urlparse

from omni_jax.data.benchmarks.captioned import YOUTUBE
from omni_jax.data.benchmarks.coverage import without_ending
from omni_jax.data.benchmarks.items import Annotations, Item, PathLike, columns_for, read_csv
from omni_jax.data.times import seconds
from omni_jax.types import InputError

ALIASES: dict[str, tuple[str, ...]] = {
    "id": ("id", "clip_id", "sample_id", "record_id", "uid", "clip_name", "file_name", "filename", "name"),
    "source": (
        *("url", "source_url", "video_url", "youtube_url", "link", "video_link", "source", "webpage_url"),
        *("youtube_id", "ytid", "yt_id", "video_id", "source_id", "video"),
    ),
    "start": ("start", "start_time", "start_sec", "start_seconds", "start_s", "begin", "clip_start", "onset", "t_start", "from"),
    "end": ("end", "end_time", "end_sec", "end_seconds", "end_s", "stop", "clip_end", "offset", "t_end", "to"),
    "interval": ("interval", "clip_interval", "timestamps", "timestamp", "segment", "clip", "time", "time_range", "span"),
    "caption": ("caption", "text", "description", "sentence", "captions", "omni_caption", "query"),
}
_NUMBER = re.compile(r"\d+(?::\d+){0,2}(?:\.\d+)?")


def omni_bench(path: PathLike, columns: Mapping[str, str] | None = None) -> Annotations:
    """Returns the clips of the CSV.

    A clip without an id is called SOURCE_START_END. A file named after the id is taken for the cut clip, one named after the source for
    the whole recording, of which the interval is used.

    Args:
      columns: role -> column name, where the aliases do not serve.

    Raises:
      InputError: when a needed column cannot be found, naming it, what it may be called and what is there.
    """
    table = read_csv(path)
    names = table.columns
    roles = columns_for(path, names, ALIASES, columns or {})
    wanted = ["source", "caption", *([] if "interval" in roles else ["start", "end"])]
    absent = [role for role in wanted if role not in roles]
    if absent:
        missing = "; ".join(f"{role} ({', '.join(ALIASES[role][:6])}, ...)" for role in absent)
        raise InputError(f"{path}: no column for {missing}; its columns are {', '.join(names)}; give --column {absent[0]}=NAME")
    items: dict[str, Item] = {}
    problems = list(table.problems)
    for place, row in table.rows:
        cells = {role: row[column] for role, column in roles.items()}
        try:
            item = _item(cells)
            if item.id in items:
                raise ValueError(f"id {item.id!r} was given already")
            items[item.id] = item
        except ValueError as e:
            problems.append(f"{path}: {place}: {e}")
    if not items:
        raise InputError(f"{path}: holds no row that can be used; the first: {problems[0]}")
    return Annotations(tuple(items.values()), tuple(problems))


def _item(cells: Mapping[str, str]) -> Item:
    if not cells["source"]:
        raise ValueError("names no source")
    caption = " ".join(cells["caption"].split())
    if not caption:
        raise ValueError("has no caption")
    start, end = _interval(cells)
    url, name = _source(cells["source"])
    made = f"{name}_{start:g}_{end:g}"
    record = cells.get("id") or made
    # A file called as the source is the whole recording, even where the record is called so too.
    files = tuple(file for file in (record, made) if without_ending(file) != without_ending(name))
    return Item(record, (caption,), files, (name,), (start, end), url)


def _source(text: str) -> tuple[str, str]:
    """(URL, name) of a source given by its URL or its YouTube id."""
    if "://" not in text:
        return YOUTUBE + text, text
    url = urlparse(text)
    name = parse_qs(url.query).get("v", [""])[0] or PurePosixPath(url.path).stem
    if not name:
        raise ValueError(f"source {text[:80]!r} names no recording")
    return text, name


def _interval(cells: Mapping[str, str]) -> tuple[float, float]:
    text = (
        cells["interval"] if not (cells.get("start") and cells.get("end")) and "interval" in cells else f"{cells['start']} {cells['end']}"
    )
    found = _NUMBER.findall(text)
    if len(found) != 2:
        raise ValueError(f"interval {text.strip()[:80]!r} is not two times in seconds or hours:minutes:seconds")
    start, end = map(seconds, found)
    if not start < end:
        raise ValueError(f"interval {text.strip()[:80]!r} ends before it starts")
    return start, end
