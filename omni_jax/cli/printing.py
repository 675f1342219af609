"""What a command writes on a terminal: text of other people's making, and the library's log."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

LIBRARY = logging.getLogger("omni_jax")


def one_line(text: str) -> str:
    """Returns text as one line that a terminal shows and never obeys: what is not printable, escape sequences among it, is written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in " ".join(text.split()))


class _Stderr(logging.Handler):
    """Prints the message of a record alone, to what sys.stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr, flush=True)


@contextlib.contextmanager
def log_on_stderr() -> Iterator[None]:
    """Shows what the library logs as lines on stderr while the block runs, whatever other libraries do to the root logger."""
    handler, propagated = _Stderr(), LIBRARY.propagate
    LIBRARY.addHandler(handler)
    LIBRARY.propagate = False
    try:
        yield
    finally:
        LIBRARY.propagate = propagated
        LIBRARY.removeHandler(handler)
