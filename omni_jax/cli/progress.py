"""Progress of long work: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import queue
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, ClassVar, TextIO

WIDTH = 24  # characters of the bar
BAR_SECONDS = 0.1
LINE_SECONDS = 5.0


class Progress:
    """Reports how many of `total` items are done, the rate and the time left, on stderr.

    Use it as a context manager and call `update` as items finish; the closing line is printed on leaving. Items that were done before
    (a resumed run) are given as `done` and do not count in the rate. While a `Whole` is entered, this is one of its parts and shows there.

    Attributes:
      done: items finished so far.
      detail: what else there is to say about the work, shown behind the rest; "" for nothing.
      whole: what all progress of this process is part of.
    """

    whole: ClassVar[Whole | None] = None

    def __init__(
        self,
        total: int | None,
        what: str,
        *,
        unit: str = "clips",
        done: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.what, self.unit, self.done, self.detail = total, what, unit, done, ""
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._clock = clock
        self._already = done
        self._shown = -1  # items at the last line, so that none comes twice
        self._start = self._last = clock()
        if self.whole is not None:
            self.whole.show(self)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.whole is not None:
            self.whole.clear()
        elif self._terminal or self._shown != self.done:
            self._show(self._clock(), final=True)

    def update(self, items: int = 1) -> None:
        """Counts `items` as done and shows it when it is time."""
        self.done += items
        now = self._clock()
        if now - self._last >= (BAR_SECONDS if self._terminal else LINE_SECONDS):
            self._last = now
            self._show(now)

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        self._stream.write(f"\r\x1b[K{text}\n" if self._terminal else f"{text}\n")
        self._stream.flush()

    def line(self, now: float) -> str:
        """Returns the plain line: what is done, count, rate and time left."""
        elapsed = max(now - self._start, 1e-9)
        rate = (self.done - self._already) / elapsed
        text = f"{self.counted()}, {_rate(rate)} {self.unit}/s"
        detail = f"; {self.detail}" if self.detail else ""
        if self.total is None or self.done >= self.total:
            return f"{text}, {duration(elapsed)}{detail}"
        left = duration((self.total - self.done) / rate) if rate > 0 else "?"
        return f"{text}, {left} left{detail}"

    def counted(self) -> str:
        """Returns what is done and how much of it."""
        return f"{self.what}: {self.done}{'' if self.total is None else f'/{self.total}'} {self.unit}"

    @property
    def share(self) -> float:
        """How much of the work is done, from 0 to 1; 0 where the total is not known."""
        return min(self.done / self.total, 1.0) if self.total else 0.0

    def _show(self, now: float, final: bool = False) -> None:
        if self.whole is not None:
            self.whole.show(self)
            return
        self._shown = self.done
        text = self.line(now)
        if self._terminal:
            text = f"\r\x1b[K{_bar(self.share) if self.total else ''}{text}"
        self._stream.write(text + ("\n" if final or not self._terminal else ""))
        self._stream.flush()


class Waiting:
    """Shows work that cannot say how far it is, as compilations: one bar for all, begun with the first. Use it as a context manager."""

    def __init__(self, what: str, unit: str):
        self._make = lambda: Progress(None, what, unit=unit)
        self._bar: Progress | None = None

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.__exit__(*error)

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        """Returns what `work` gives or raises its error. It runs in a thread, so that Ctrl-C is heard: the thread ends with the process."""
        bar = self._bar = self._bar or self._make()
        done: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                done.put((work(), None))
            except BaseException as e:  # handed to the caller
                done.put((None, e))

        threading.Thread(target=run, daemon=True).start()
        start = time.monotonic()
        while True:
            bar.detail = f"{name}, {duration(time.monotonic() - start)}"
            try:
                result, error = done.get(timeout=BAR_SECONDS)
            except queue.Empty:
                bar.update(0)
                continue
            bar.update()
            if error is not None:
                raise error
            return result


class Whole:
    """One bar for work of several parts, each of which reports by `Progress` objects as it does alone.

    Use it as a context manager, and `part` for each part in turn. What the parts print appears above the bar.
    """

    def __init__(
        self, what: str, parts: Mapping[str, float], *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Takes what the whole is called, and the seconds that each part is expected to take compared with the others, by name."""
        self.what, self._parts = what, dict(parts)
        self._stream = sys.stderr if stream is None else stream
        self._terminal, self._clock, self._start = self._stream.isatty(), clock, clock()
        self._before, self._size, self._share = 0.0, 0.0, 0.0  # of the parts that are done; of this one; how far this one is
        self._of_all = sum(self._parts.values())

    def __enter__(self) -> Whole:
        Progress.whole = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        Progress.whole = None
        self.clear()

    def part(self, name: str) -> None:
        """Begins a part; the one before it is done."""
        self._before += self._size
        self._size, self._share = self._parts[name], 0.0

    def show(self, progress: Progress) -> None:
        """Shows the whole, and in it the work of `progress`, which belongs to the part that was begun."""
        self._share = max(self._share, progress.share)  # a part may report more than one piece of work
        share = (self._before + self._size * self._share) / self._of_all
        elapsed = self._clock() - self._start
        left = f"{duration(elapsed / share - elapsed)} left" if share > 0 else "? left"
        detail = f"; {progress.detail}" if progress.detail else ""
        text = f"{self.what}: {share:.0%}, {left}; {progress.counted()}{detail}"
        # A line that wraps could not be taken back.
        columns = shutil.get_terminal_size().columns - 1
        self._stream.write(f"\r\x1b[K{f'{_bar(share)}{text}'[:columns]}" if self._terminal else f"{text}\n")
        self._stream.flush()

    def clear(self) -> None:
        """Takes the bar away, until a part shows it again."""
        if self._terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def duration(seconds: float) -> str:
    """Returns a length of time as people write it: 8 s, 3:05, 2:10:00."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _bar(share: float) -> str:
    return f"[{'#' * round(WIDTH * share):<{WIDTH}}] "


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
