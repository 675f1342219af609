"""Where an instruction of a program's text comes from: file and line of the model, from the tables that the text begins with."""

from __future__ import annotations

import re
from pathlib import PurePath

from omni_jax.planning.hlo import Instruction

DEPTH = 3  # lines that a source names
_LINE = re.compile(r"^(\d+) (.*)$")
_PASSES = (("rematted_computation", "again"), ("transpose(", "backward"))


class Sources:
    """Frames of a module; `of` names an instruction."""

    def __init__(self, text: str):
        names = {n: PurePath(value.strip('"')).name for n, value in _table(text, "FileNames")}
        places = {n: (names.get(_field(value, "file_name_id"), "?"), _field(value, "line")) for n, value in _table(text, "FileLocations")}
        # A frame's parent is written one too high, so that its own number says that it has none.
        frames = _table(text, "StackFrames")
        self._frames = {n: (places.get(_field(v, "file_location_id"), ("?", 0)), _field(v, "parent_frame_id") - 1) for n, v in frames}

    def of(self, item: Instruction) -> str:
        """Returns "decoder.py:63 > layers.py:150 > layers.py:106 dot_general backward": lines from a caller in another file in, pass."""
        found = re.search(r'op_name="([^"]*)"', item.rest)
        path = found[1] if found else ""
        operation = path.split("/")[-1] or item.op
        made = next((f" {name}" for mark, name in _PASSES if mark in path), "")
        frame = re.search(r"stack_frame_id=(\d+)", item.rest)
        lines = self._lines(int(frame[1])) if frame else []
        outer = next((n for n, line in enumerate(lines) if line[0] != lines[0][0]), len(lines) - 1)
        place = " > ".join(f"{file}:{line}" for file, line in reversed(lines[: outer + 1][:DEPTH]))
        return f"{place} {operation}{made}".strip()

    def _lines(self, frame: int) -> list[tuple[str, int]]:
        """From the innermost out."""
        lines = []
        while frame in self._frames and len(lines) < 64:
            place, frame = self._frames[frame]
            lines.append(place)
        return lines


def _table(text: str, name: str) -> list[tuple[int, str]]:
    start = text.find(f"\n{name}\n")
    if start < 0:
        return []
    rows = []
    for line in text[start + len(name) + 2 :].splitlines():
        if not (found := _LINE.match(line)):
            break
        rows.append((int(found[1]), found[2]))
    return rows


def _field(value: str, name: str) -> int:
    found = re.search(rf"\b{name}=(\d+)", value)
    return int(found[1]) if found else 0
