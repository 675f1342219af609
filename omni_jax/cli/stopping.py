"""SIGTERM, which a scheduler sends before it takes the machine away, as an exception that can be caught after saving; and Ctrl-C twice."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from omni_jax.cli.status import INTERRUPTED
from omni_jax.types import InputError


class Terminated(BaseException):
    """SIGTERM has come. Like KeyboardInterrupt no Exception, so that nothing on the way takes it for an error of its own."""


@contextlib.contextmanager
def _interrupt_prevails() -> Iterator[None]:
    """Raises the KeyboardInterrupt or Terminated during whose unwinding an unexpected error came up: what was half begun may not close.

    Errors for the user (InputError, OSError) stay: what could not be saved must be said.
    """
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:
        earlier = error.__context__
        while earlier is not None and not isinstance(earlier, KeyboardInterrupt | Terminated):
            earlier = earlier.__context__
        if earlier is None:
            raise
        raise earlier from None


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    """Hands signals to a handler while the block runs; in another thread than the main one, which alone may, it does nothing."""
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in (numbers if here else ())}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Makes SIGTERM raise Terminated in the main thread while the block runs; elsewhere it does nothing."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    with _handled(stop, signal.SIGTERM), _interrupt_prevails():
        yield


@contextlib.contextmanager
def second_ctrl_c_leaves() -> Iterator[None]:
    """Makes a second SIGINT end the process at once while the block runs, in the main thread.

    The first one is left to Python, whose handler waits for the C call that is running: compiling a large model takes minutes, and saving
    what is done takes its time as well. The signals' numbers reach a thread of their own, which waits for nothing. Whatever must survive is
    written under a temporary name and renamed, as for any kill.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    import socket  # slow for `--help`

    near, far = socket.socketpair()

    def count() -> None:
        left = 2
        with contextlib.suppress(OSError):
            while data := near.recv(64):
                left -= data.count(signal.SIGINT)
                if left <= 0:
                    os.write(2, b"\nomni-jax: left at once\n")
                    os._exit(INTERRUPTED)

    far.setblocking(False)
    thread = threading.Thread(target=count, name="ctrl-c", daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(far.fileno(), warn_on_full_buffer=False)
    try:
        with _interrupt_prevails():
            yield
    finally:
        signal.set_wakeup_fd(before)
        far.close()
        thread.join()
        near.close()


class Signals:
    """Signals that have come while `signals_noted` ran."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C came first."""
        return self.seen[:1] == [signal.SIGINT]

    @property
    def name(self) -> str:
        """What came first, "another process" where this one got nothing."""
        return ("Ctrl-C" if self.interrupted else "SIGTERM") if self.seen else "another process"


@contextlib.contextmanager
def signals_noted() -> Iterator[Signals]:
    """Notes SIGTERM and the first Ctrl-C while the block runs, for work that saves before it leaves; a second Ctrl-C leaves at once.

    In another thread than the main one it notes nothing.
    """
    noted = Signals()

    def note(number: int, frame: FrameType | None) -> None:
        if signal.SIGINT in noted.seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        noted.seen.append(number)

    with _handled(note, signal.SIGTERM, signal.SIGINT):
        yield noted


@contextlib.contextmanager
def interrupts_noted() -> Iterator[Signals]:
    """Notes Ctrl-C while the block runs and raises KeyboardInterrupt as ever.

    That is lost where it comes up in a callback of the garbage collector, whose exceptions Python drops; JAX has such a callback. Work of
    several steps asks after each what was noted. In another thread than the main one it notes nothing.
    """
    noted = Signals()

    def note(number: int, frame: FrameType | None) -> None:
        noted.seen.append(number)
        raise KeyboardInterrupt

    with _handled(note, signal.SIGINT), _interrupt_prevails():
        yield noted
