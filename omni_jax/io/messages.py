"""Messages that other people's text goes into: one line, however long that is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from omni_jax.types import InputError

MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What comes of reading fields in text that is damaged."""


def line_of(error: object) -> str:
    """Returns what a library's error says, cut to one line; the name of its class where it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def lines_of_text(data: bytes) -> list[str]:
    """Returns the lines of a file of UTF-8 without a byte-order mark, ended as files end lines; what else Unicode breaks lines at is text.

    Raises:
      UnicodeDecodeError: it is not UTF-8.
    """
    lines = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines[:-1] if not lines[-1] else lines


def some(names: Iterable[object], most: int = 3) -> str:
    """Returns the first `most` of some names, and dots where there are more."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")


def stands_for(head: bytes) -> str | None:
    """Returns what a file is that lies in the place of another one, by how it begins, and what to do; None for any other file."""
    start = head.lstrip().lower()
    if start.startswith(_POINTER):
        return "is a Git LFS pointer, not the file that it stands for; run git lfs pull"
    if start.startswith((b"<!doctype", b"<html")):
        return "is a web page, not the file that it stands for; fetch it again"
    return None


_POINTER = b"version https://git-lfs"


@contextlib.contextmanager
def as_input_error(what: str, advice: str = "", *kinds: type[BaseException]) -> Iterator[None]:
    """Raises an InputError for errors of the block: of `kinds`, OSError by default. An InputError of the block stays as it is.

    It says "WHAT (the error's own words); ADVICE", without advice "WHAT: the error's own words".
    """
    kinds = kinds or (OSError,)
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        words = getattr(error, "strerror", None) or line_of(error)
        raise InputError(f"{what} ({words}); {advice}" if advice else f"{what}: {words}") from error
