"""Times of a clip, as people write them: seconds, or hours, minutes and seconds."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any

_CLOCK = re.compile(r"\s*(?:(\d+):)?(\d+):([0-5]?\d(?:[.,]\d*)?)\s*")  # HH:MM:SS.fff or MM:SS.fff
_TIME = r"((?:\d+:)+\d+,\d+|[\d:.]+)"  # SubRip has a comma where others have a point
_PAIR = re.compile(rf"[\[(]? ?{_TIME} ?(?:,|;|-->|-|–|to| ) ?{_TIME} ?[\])]?")
_LONGEST_TEXT = 100  # characters
_LONGEST_SECONDS = 1e9  # some thirty years: beyond it a number is a mistake


def seconds(value: Any) -> float:
    """Returns a time in seconds of a number, its text, or a text HH:MM:SS(.fff) or MM:SS(.fff). Raises ValueError or TypeError."""
    if not isinstance(value, str):
        return float(value)
    if len(value) > _LONGEST_TEXT:
        raise ValueError(f"a text of {len(value):,} characters is no time")
    if clock := _CLOCK.fullmatch(value):
        hours, minutes, rest = clock.groups()
        if hours is None or int(minutes) < 60:
            return 3600 * int(hours or 0) + 60 * int(minutes) + float(rest.replace(",", "."))
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{value[:80]!r} is not a time in seconds or HH:MM:SS") from None


def interval(value: Any) -> tuple[float, float] | None:
    """Returns (start, end) in seconds of two times, or of a text of them; None for what is not 0 <= start < end."""
    if isinstance(value, str):
        value = " ".join(value.split())
        if len(value) > _LONGEST_TEXT:
            return None
        pair = _PAIR.fullmatch(value)
        with contextlib.suppress(ValueError):
            value = pair.groups() if pair else json.loads(value)
    if isinstance(value, str | Mapping):
        return None
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        start, end = (None if isinstance(time, bool) else seconds(time) for time in value)
        if start is not None and end is not None and 0 <= start < end <= _LONGEST_SECONDS:
            return start, end
    return None
