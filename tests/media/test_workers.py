"""The pool of decoding processes: order, bounds, and functions that hang, crash and raise."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from omni_jax.media import workers as workers_module
from omni_jax.media.workers import ALIKE, IN_FLIGHT, CannotStart, Guarded, run_guarded
from omni_jax.types import ClipError, InputError
from tests.media import worker_functions as functions

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """Every test must end with the child processes it began with."""
    before = {child.pid for child in psutil.Process().children()}
    yield
    left = [child for child in psutil.Process().children() if child.pid not in before]
    assert not left


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    assert list(run_guarded(functions.square, range(50), workers, 60)) == [(i, i * i) for i in range(50)]


def test_a_slow_item_does_not_change_the_order() -> None:
    assert [got for _, got in run_guarded(functions.slow_first, range(9), 2, 60)] == list(range(9))


def test_processes_keep_the_memory_of_a_clip_for_the_next() -> None:
    ((_, taken),) = run_guarded(functions.pages_taken, [24 << 20], 1, 60)
    assert isinstance(taken, int)
    assert taken < 200


def test_no_items() -> None:
    assert list(run_guarded(functions.square, [], 2, 60)) == []


def test_arrays_arrive_whole() -> None:
    size = 3_000_000
    ((_, got),) = run_guarded(functions.arrays, [size], 1, 60)
    assert not isinstance(got, ClipError)
    assert np.array_equal(got["floats"], np.arange(size, dtype=np.float32))
    assert np.array_equal(got["strided"], np.arange(2 * size)[::2])
    assert got["empty"].shape == (0, 3)
    got["floats"][0] = 7.0  # the receiver owns its arrays


def test_children_import_neither_jax_nor_the_main_script() -> None:
    for _, got in run_guarded(functions.environment, range(4), 2, 60):
        assert not isinstance(got, ClipError)
        assert (got["jax"], got["torch"]) == (False, False)
        assert got["pid"] != os.getpid()


def test_items_are_pulled_only_a_little_ahead() -> None:
    pulled = 0

    def items() -> Iterator[int]:
        nonlocal pulled
        while pulled < 1000:
            pulled += 1
            yield pulled

    results = run_guarded(functions.square, items(), 2, 60)
    for count, _ in zip(range(1, 21), results, strict=False):
        assert pulled <= count + 2 * IN_FLIGHT
    results.close()  # type: ignore[attr-defined]


def test_a_hang_in_c_code_costs_its_item_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    items = ["a", "hang", "b", f"fifo:{tmp_path / 'pipe'}", "c", "d"]
    got = [result for _, result in run_guarded(functions.misbehave, items, 2, 1.0, name=lambda item: f"{item[:4]}.mp4")]
    assert [r for r in got if not isinstance(r, ClipError)] == ["a", "b", "c", "d"]
    assert str(got[1]) == "hang.mp4: decoding took longer than 1 s and was stopped; re-encode the file or raise --timeout"
    assert str(got[3]).startswith("fifo.mp4: decoding took longer than 1 s")


@pytest.mark.costly
def test_the_limit_begins_again_while_an_item_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "LONGEST", 3)
    (_, went), (_, endless) = run_guarded(functions.misbehave, ["slow", "slow600"], 2, 2.0)
    assert went == "slow"
    assert str(endless) == "slow600: decoding took longer than 6 s and was stopped; re-encode the file or raise --timeout"


@pytest.mark.jit
@pytest.mark.parametrize(("what", "words"), [("segfault", "SIGSEGV"), ("killed", "SIGKILL"), ("exit", "ended with status 3")])
def test_a_process_that_dies_costs_its_item_only(what: str, words: str) -> None:
    got = [result for _, result in run_guarded(functions.misbehave, ["a", what, "b", what, "c"], 1, 60)]
    assert [r for r in got if not isinstance(r, ClipError)] == ["a", "b", "c"]
    for error in (got[1], got[3]):
        assert str(error).startswith(f"{what}: the decoding process ")
        assert words in str(error)


def test_an_item_whose_process_was_killed_from_outside_is_tried_again(tmp_path: Path) -> None:
    items = [f"killed once:{tmp_path / name}" for name in ("x", "y")]
    assert [result for _, result in run_guarded(functions.misbehave, items, 1, 60)] == items
    assert Guarded(functions.misbehave, 60)(f"killed once:{tmp_path / 'z'}", "z") == f"killed once:{tmp_path / 'z'}"


@pytest.mark.parametrize("workers", [0, 1])
def test_whatever_is_raised_becomes_one_line(workers: int) -> None:
    items = ["clip error", "input error", "memory", "bug", "fine"]
    got = dict(run_guarded(functions.misbehave, items, workers, 60))
    assert all(isinstance(got[item], ClipError) and "\n" not in str(got[item]) for item in items[:-1])
    assert str(got["clip error"]) == "clip.mp4: truncated; fetch it again"
    assert str(got["input error"]) == "clip.mp4: no"
    assert "memory" in str(got["memory"])
    assert "KeyError at worker_functions.py:" in str(got["bug"])
    assert got["fine"] == "fine"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("count", [2, ALIKE, ALIKE + 3])
def test_a_fault_of_our_own_is_not_one_of_every_file(count: int, workers: int) -> None:
    got: list[object] = []
    with pytest.raises(InputError, match=rf"the first {min(count, ALIKE)} records failed alike \(TypeError at .*not of the files; install"):
        got.extend(result for _, result in run_guarded(functions.misbehave, ["own bug"] * count, workers, 60))
    assert len(got) == (count if count < ALIKE else ALIKE - 1)


@pytest.mark.parametrize("start", [["fine"], ["clip error"], ["bug"], ["memory"]])
def test_files_that_fail_unlike_or_later_are_reported_each(start: list[str]) -> None:
    items = [*start, *["own bug"] * (ALIKE + 1)]
    got = [result for _, result in run_guarded(functions.misbehave, items, 0, 60)]
    assert len(got) == len(items) and all("fault of omni-jax" in str(error) for error in got[1:])


def test_files_of_one_odd_kind_at_the_start_do_not_stop_the_others() -> None:
    got = [result for _, result in run_guarded(functions.misbehave, ["bug"] * (ALIKE + 1) + ["fine"], 0, 60)]
    assert all("re-encode the file" in str(error) for error in got[:-1]) and got[-1] == "fine"


def test_a_single_record_says_whose_fault_it_is() -> None:
    ((_, got),) = run_guarded(functions.misbehave, ["own bug"], 0, 60)
    assert isinstance(got, ClipError) and str(got).endswith("a fault of omni-jax or of a library below it: report it")


def test_a_result_that_cannot_be_sent_costs_its_item_only() -> None:
    got = [result for _, result in run_guarded(functions.misbehave, ["unsendable", "fine"], 1, 60)]
    assert isinstance(got[0], ClipError)
    assert "cannot be handed over" in str(got[0])
    assert got[1] == "fine"


def test_a_function_that_cannot_be_imported_is_no_clips_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions.square, "__module__", "tests.media.not_there")
    monkeypatch.setitem(sys.modules, "tests.media.not_there", functions)
    with pytest.raises(RuntimeError, match="a decoding process could not start: ModuleNotFoundError"):
        list(run_guarded(functions.square, [1], 1, 60))


@pytest.mark.parametrize(("module", "name", "code"), [(subprocess, "Popen", errno.EAGAIN), (socket, "socketpair", errno.EMFILE)])
def test_a_process_that_the_system_refuses_is_tried_again(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, code: int) -> None:
    given, left = getattr(module, name), [1]

    def refused(*args: Any, **kwargs: Any) -> Any:
        if left and left.pop():
            raise OSError(code, os.strerror(code))
        return given(*args, **kwargs)

    monkeypatch.setattr(module, name, refused)
    monkeypatch.setattr(workers_module, "START_PAUSES_S", (0.0, 0.0))
    assert list(run_guarded(functions.square, range(3), 1, 60)) == [(i, i * i) for i in range(3)]
    assert not left
    left.extend([1] * 3)
    with pytest.raises(CannotStart, match=rf"^a decoding process could not start \({os.strerror(code)}\); use fewer workers, or allow"):
        list(run_guarded(functions.square, range(3), 1, 60))
    assert not left
    assert issubclass(CannotStart, InputError) and not issubclass(CannotStart, ClipError), "ends the run with one line"


def test_a_pool_that_closes_does_not_wait_to_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    guarded = Guarded(functions.square, 60)

    def refused(*_: Any, **__: Any) -> Any:
        threading.Thread(target=guarded.close).start()
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess, "Popen", refused)
    monkeypatch.setattr(workers_module, "START_PAUSES_S", (3600.0,))
    with pytest.raises(RuntimeError, match="a pool that closes"):
        guarded(1, "1")


def test_an_error_of_the_items_reaches_the_caller() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("manifest went away")

    with pytest.raises(OSError, match="manifest went away"):
        list(run_guarded(functions.square, items(), 1, 60))


@pytest.mark.parametrize(("workers", "limit"), [(-1, 1.0), (1, 0.0), (1, float("nan")), (1, float("inf"))])
def test_arguments_out_of_range(workers: int, limit: float) -> None:
    with pytest.raises(InputError, match="must be"):
        run_guarded(functions.square, [1], workers, limit)


def test_closing_early_ends_hung_children() -> None:
    results = run_guarded(functions.misbehave, ["a", "hang", "hang"], 2, 600)
    assert next(results) == ("a", "a")
    results.close()  # type: ignore[attr-defined]
    # The fixture sees that no process is left.


@pytest.mark.parametrize("started", [False, True])
def test_ctrl_c_while_a_thread_starts_is_what_comes_out(monkeypatch: pytest.MonkeyPatch, started: bool) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if started:
            start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(run_guarded(functions.square, range(3), 2, 60))


SCRIPT = """
    import sys
    import tests.media.worker_functions as functions
    from omni_jax.media.workers import Guarded, run_guarded
    print("started", flush=True)  # no guard before this: children must not run this file
    for _ in run_guarded(functions.note_and_wait, [sys.argv[1]] * 2, 2, {limit}):
        pass
"""


def start_script(folder: Path, limit: float) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """Starts a program whose two children wait; returns it and them."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT.format(limit=limit)))
    notes = folder / "notes"
    notes.mkdir()
    program = subprocess.Popen(
        [sys.executable, str(script), str(notes)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(children := [int(pid) for pid in os.listdir(notes) if psutil.pid_exists(int(pid))]) < 2:
        assert program.poll() is None
        time.sleep(0.05)
    return program, [psutil.Process(pid) for pid in children]


@pytest.mark.costly
def test_ctrl_c_ends_the_program_and_its_children(tmp_path: Path) -> None:
    program, children = start_script(tmp_path, 600)
    program.send_signal(signal.SIGINT)
    out, err = program.communicate(timeout=60)
    assert "KeyboardInterrupt" in err
    assert out.count("started") == 1
    assert not psutil.wait_procs(children, timeout=30)[1]


@pytest.mark.costly
def test_children_of_a_killed_program_end_by_themselves(tmp_path: Path) -> None:
    program, children = start_script(tmp_path, 4.0)
    program.kill()
    program.communicate(timeout=60)
    assert not psutil.wait_procs(children, timeout=60)[1]  # they sleep for ten minutes otherwise


def test_items_that_cannot_hang_are_worked_on_here_in_their_order() -> None:
    found = list(run_guarded(functions.environment, range(3), 1, 60, here=lambda item: item != 1))
    assert [item for item, _ in found] == [0, 1, 2]
    assert [not isinstance(outcome, ClipError) and outcome["pid"] == os.getpid() for _, outcome in found] == [True, False, True]
