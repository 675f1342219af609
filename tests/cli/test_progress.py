"""Progress: what is printed, how often, and to what kind of stream."""

from __future__ import annotations

import io

import pytest

from omni_jax.cli.progress import LINE_SECONDS, Progress, duration


class Clock:
    """Time that tests move."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_come_every_few_seconds_and_at_the_end() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(100, "embed", stream=stream, clock=clock) as progress:
        for _ in range(100):
            clock.now += LINE_SECONDS / 10
            progress.update()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10  # the last of them is the closing one
    assert lines[0] == "embed: 10/100 clips, 2.0 clips/s, 45 s left"
    assert lines[-1] == "embed: 100/100 clips, 2.0 clips/s, 50 s"
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_terminal_gets_one_line_that_is_redrawn() -> None:
    clock, stream = Clock(), Terminal()
    with Progress(4, "convert", unit="tensors", stream=stream, clock=clock) as progress:
        clock.now += 1
        progress.update(2)
        progress.note("one thing to know")
    shown = stream.getvalue()
    assert "[############            ] convert: 2/4 tensors, 2.0 tensors/s, 1 s left" in shown
    assert "one thing to know\n" in shown and shown.count("\n") == 2


def test_resumed_items_do_not_count_in_the_rate() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress(100, "embed", done=90, stream=stream, clock=clock)
    clock.now += 5
    progress.update(5)
    assert stream.getvalue() == "embed: 95/100 clips, 1.0 clips/s, 5 s left\n"


def test_unknown_total_shows_no_time_left() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress(None, "read", stream=stream, clock=clock)
    clock.now += 10
    progress.update(5)
    assert stream.getvalue() == "read: 5 clips, 0.50 clips/s, 10 s\n"


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0 s"), (59.4, "59 s"), (60, "1:00"), (185, "3:05"), (7800, "2:10:00")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
