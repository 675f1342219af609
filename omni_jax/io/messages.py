"""Words of a message that other people's text goes into: one line, however long that is."""

from __future__ import annotations

from collections.abc import Iterable


def line_of(error: object) -> str:
    """Returns what a library's error says, cut to one line; the name of its class where it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def some(names: Iterable[object], most: int = 3) -> str:
    """Returns the first `most` of some names, and dots where there are more."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")


def stands_for(head: bytes) -> str | None:
    """Returns what a file is that lies in the place of another one, by how it begins, and what to do; None for any other file."""
    start = head.lstrip().lower()
    if start.startswith(_POINTER):
        return "is a Git LFS pointer, not the file that it stands for; fetch that with git lfs pull"
    if start.startswith((b"<!doctype", b"<html")):
        return "is a web page, not the file that it stands for; fetch it again"
    return None


_POINTER = b"version https://git-lfs"
