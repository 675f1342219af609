"""Progress: what is printed, how often, and to what kind of stream."""

from __future__ import annotations

import io
import os
import re
import signal
import threading

import pytest

from omni_jax.cli.progress import LINE_SECONDS, Progress, Waiting, Whole, duration


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


# ----------------------------------------------------------------------------------------------------- work that cannot say how far it is


def test_waiting_returns_what_the_work_gives_and_counts_it(capsys: pytest.CaptureFixture[str]):
    with Waiting("compile", "programs") as waiting:
        assert [waiting("one", lambda: 1), waiting("two", lambda: 2)] == [1, 2]
    assert re.fullmatch(r"compile: 2 programs, \S+ programs/s, 0 s; two, 0 s\n", capsys.readouterr().err)


def test_nothing_is_shown_of_work_that_never_began(capsys: pytest.CaptureFixture[str]):
    with Waiting("compile", "programs"):
        pass
    assert capsys.readouterr().err == ""


def test_an_error_of_the_work_is_its_callers():
    with Waiting("compile", "programs") as waiting, pytest.raises(ZeroDivisionError):
        waiting("one", lambda: 1 // 0)


def test_ctrl_c_is_heard_while_the_work_cannot_be():
    """The work holds on until it is let go, as a compiler does; the caller is free at once."""
    let_go, begun = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        let_go.wait()

    def interrupt() -> None:
        begun.wait()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt), Waiting("compile", "programs") as waiting:
            waiting("one", work)
        assert not let_go.is_set()
    finally:
        let_go.set()


def test_parts_of_a_whole_share_one_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    clock, stream = Clock(), Terminal()
    with Whole("demo", {"make": 10.0, "train": 30.0}, stream=stream, clock=clock) as whole:
        whole.part("make")
        with Progress(4, "clips", stream=stream, clock=clock) as progress:
            clock.now += 10
            progress.update(4)
        whole.part("train")
        with Progress(30, "train", unit="updates", stream=stream, clock=clock) as progress:
            clock.now += 5
            progress.detail = "loss 1.0"
            progress.update(10)
            progress.note("one thing to know")
    shown = stream.getvalue().split("\r\x1b[K")
    assert shown[1] == "[                        ] demo: 0%, ? left; clips: 0/4 clips"
    assert shown[2] == "[######                  ] demo: 25%, 30 s left; clips: 4/4 clips"
    assert "[############            ] demo: 50%, 15 s left; train: 10/30 updates; loss 1.0" in shown
    # What is printed between and after the parts finds an empty line.
    assert "one thing to know\n" in shown and shown[3] == "" and shown[-1] == ""
    assert Progress.whole is None


def test_the_bar_of_a_whole_never_steps_back_nor_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    clock, stream = Clock(), Terminal()
    with Whole("demo", {"score": 1.0}, stream=stream, clock=clock) as whole:
        whole.part("score")
        for what in ("embed", "previews"):
            with Progress(2, what, stream=stream, clock=clock) as progress:
                for _ in range(2):
                    clock.now += 1
                    progress.update()
    shown = [line for line in stream.getvalue().split("\r\x1b[K") if line]
    filled = [line.count("#") for line in shown]
    assert filled == sorted(filled) and filled[-1] == 24
    assert max(map(len, shown)) == 39


def test_a_whole_prints_plain_lines_elsewhere_and_ends_when_a_part_fails() -> None:
    clock, stream = Clock(), io.StringIO()
    with pytest.raises(KeyError), Whole("demo", {"make": 1.0}, stream=stream, clock=clock) as whole:
        whole.part("make")
        with Progress(None, "clips", stream=stream, clock=clock) as progress:
            clock.now += LINE_SECONDS
            progress.update(3)
            raise KeyError
    assert stream.getvalue() == "demo: 0%, ? left; clips: 0 clips\ndemo: 0%, ? left; clips: 3 clips\n"
    with Progress(1, "embed", stream=stream, clock=clock) as progress:
        progress.update()
    assert stream.getvalue().splitlines()[-1].startswith("embed: 1/1 clips")
