"""What a part of the torture reports: what was tried, how many times, and what was lost."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path


@dataclasses.dataclass
class Outcome:
    """The result of one part.

    Attributes:
      part: its name.
      seed: everything random follows from it.
      tried: (what, how many times).
      lost: one line each; the part has passed where there are none.
      notes: figures and remarks, one line each.
      seconds: how long the part took.
    """

    part: str
    seed: int
    tried: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    lost: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def expect(self, kept: bool, otherwise: str) -> None:
        """Notes a loss where something that must hold does not."""
        if not kept:
            self.lost.append(otherwise)


class Clock:
    """A budget of seconds."""

    def __init__(self, seconds: float) -> None:
        self._start, self._seconds = time.monotonic(), seconds

    @property
    def spent(self) -> float:
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        return self._seconds - self.spent


@contextlib.contextmanager
def begun(part: str, seed: int, minutes: float) -> Iterator[tuple[Outcome, Clock, Path]]:
    """Yields the outcome of a part that begins, to be filled, its time, and a folder that is removed at its end."""
    outcome, clock = Outcome(part, seed), Clock(60 * minutes)
    with tempfile.TemporaryDirectory() as folder:
        yield outcome, clock, Path(folder)
    outcome.seconds = clock.spent
