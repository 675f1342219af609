"""Text of other people's making, on a terminal."""

from __future__ import annotations


def one_line(text: str) -> str:
    """Returns text as one line that a terminal shows and never obeys: what is not printable, escape sequences among it, is written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in " ".join(text.split()))
