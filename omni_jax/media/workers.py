"""Results of a function over many items, from processes that may hang or die without stopping the rest.

A decoder can hang inside C code, where no signal handler runs, or crash its process. So every item is worked on in a child process under
a time limit; a child that exceeds it is killed and replaced, and only its item is lost. Children are started as fresh interpreters (never
forked from this process, whose JAX threads a fork would break), and they do not import the caller's main script, so that calling code needs
no `if __name__ == "__main__"`.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import itertools
import json
import math
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np

from omni_jax.types import ClipError, InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

IN_FLIGHT = 4  # items per worker that are handed out or finished and not yet yielded, at most: bounds memory
START_PAUSES_S = (0.2, 1.0, 3.0)  # before a process is tried again that the system refused: others may have ended then
START_LIMIT_S = 300.0  # a child imports NumPy and PyAV first, which a busy network disk can make slow
LONGEST = 10  # times its limit that an item in progress may take: an hour of interlaced video decodes in a quarter of one
ALIKE = 5
"""First items that fail alike, by an error of `_OURS`, after which the run stops."""

_OURS = (TypeError, AttributeError, NameError, ImportError, NotImplementedError, AssertionError, RecursionError)  # no file raises these
_JOIN_LIMIT_S = 10.0
_ORPHAN_GRACE_S = 2.0  # a hung child ends itself this long after its parent should have done so
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from omni_jax.media.workers import _serve; _serve(int(sys.argv[1]))"

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Environment of a process that is one of several: they share the cores, and the threads of its libraries would wait for each other's."""

# glibc keeps up to 256 MiB of freed memory for the next clip: what the kernel takes back it zeroes before it gives it again.
_ENVIRONMENT = ONE_THREAD | {"MALLOC_TRIM_THRESHOLD_": str(256 << 20), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}


class OwnFault(ClipError):
    """No result because of an error that no file raises. `cause` says what was raised where."""

    cause = ""


class CannotStart(InputError):
    """The system refuses a decoding process, and did so several times: no fault of an item."""


def run_guarded(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    timeout_s: float,
    *,
    name: Callable[[Item], str] = str,
    here: Callable[[Item], bool] | None = None,
) -> Iterator[tuple[Item, Result | ClipError]]:
    """Yields (item, function(item)) in the order of `items`, with a ClipError in place of a result that could not be had.

    An item gets a ClipError when the function raises (whatever it raises), exceeds the limit, or takes its process down. Closing the
    iterator, also by an exception or Ctrl-C, kills every child; a child whose parent is killed ends by itself.

    Args:
      function: an importable function (or a functools.partial of one); its module must not import jax. Results are pickled, arrays without
        a copy.
      items: picklable; pulled from only `IN_FLIGHT` a worker ahead of what was yielded, in the caller's thread.
      workers: child processes. 0 calls the function in this process, WITHOUT protection: a hang is not ended, a crash ends everything.
      timeout_s: seconds one item may take; the start of a process does not count. Where the function says that it `goes_on`, they begin
        again, up to `LONGEST` times as many in all.
      name: what to call an item in a message, a file name for example.
      here: which items are worked on in this process, since nothing in them could hang; None: none.

    Raises:
      InputError: for arguments out of range, and when the first `ALIKE` items, or all of fewer, fail with the same error that no file
        raises: the fault is then one of this project or of a library below it.
      CannotStart: when the system refuses a child, for lack of processes, open files or memory, and goes on to after `START_PAUSES_S`.
      RuntimeError: when a child ends before its first item.
    """
    if workers < 0:
        raise InputError(f"workers {workers}: must be 0 (no child processes) or more")
    if not (timeout_s > 0 and math.isfinite(timeout_s)):
        raise InputError(f"time limit {timeout_s}: must be a positive number of seconds")
    if workers == 0:
        return stop_at_our_fault((item, _attempt(function, item, name(item))) for item in items)
    return stop_at_our_fault(_in_order(Guarded(function, timeout_s), items, workers, name, here))


def stop_at_our_fault(outcomes: Generator[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """Yields the outcomes. Raises InputError where they begin with `ALIKE` equal faults of our own, or are two or more of those alone."""
    alike, first = 0, ""
    with contextlib.closing(outcomes):
        for item, outcome in outcomes:
            if alike >= 0:
                cause = outcome.cause if isinstance(outcome, OwnFault) else ""
                first = first or cause
                alike = alike + 1 if cause and cause == first else -1
                if alike == ALIKE:
                    break
            yield item, outcome
    if alike > 1:
        raise InputError(
            f"the first {alike} records failed alike ({first}): a fault of omni-jax or of a library below it, not of the files; install "
            f"the versions of requirements.lock, or report this line with the output of pip freeze"
        )


def _in_order(
    guarded: Guarded, items: Iterable[Any], workers: int, name: Callable[[Any], str], here: Callable[[Any], bool] | None
) -> Generator[tuple[Any, Any]]:
    """Yields items and outcomes. Threads of this process make the calls, each with a child of its own: a thread can wait under a limit."""
    source, tasks = iter(items), queue.SimpleQueue[tuple[Future[Any], Any] | None]()
    waiting: collections.deque[tuple[Any, Future[Any]]] = collections.deque()
    threads: list[threading.Thread] = []

    def work() -> None:
        while (task := tasks.get()) is not None:
            try:
                task[0].set_result(guarded.outcome(task[1], name(task[1])))
            except BaseException as failure:  # not one item's fault: the consumer must hear of it, or it would wait for ever
                task[0].set_exception(failure)

    atexit.register(guarded.close)  # an iterator that was not closed must not leave a hung child behind
    try:
        while True:
            for item in itertools.islice(source, IN_FLIGHT * workers - len(waiting)):
                waiting.append((item, Future()))
                if here is not None and here(item):
                    waiting[-1][1].set_result(guarded.unguarded(item, name(item)))
                    continue
                tasks.put((waiting[-1][1], item))
                if len(threads) < workers:
                    threads.append(threading.Thread(target=work, name=f"decode-{len(threads)}", daemon=True))
                    threads[-1].start()
            if not waiting:
                return
            item, future = waiting.popleft()
            yield item, future.result()
    finally:
        guarded.close()
        for _ in threads:
            tasks.put(None)
        for thread in threads:
            if thread.is_alive():  # Ctrl-C may come within `start`, and a thread that has not started cannot be joined
                thread.join(_JOIN_LIMIT_S)
        atexit.unregister(guarded.close)


class Guarded:
    """A function whose calls run in a child process under a time limit, one child for each thread that calls.

    Can be pickled: a copy starts children of its own.
    """

    def __init__(self, function: Callable[[Any], Any], timeout_s: float) -> None:
        """Takes what `run_guarded` takes."""
        self._args = function, timeout_s
        self._local = threading.local()
        self._children: weakref.WeakSet[_Child] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def __call__(self, item: Any, name: str) -> Any:
        """Returns function(item). Raises ClipError where there is no result, whatever the reason."""
        outcome = self.outcome(item, name)
        if isinstance(outcome, ClipError):
            raise outcome
        return outcome

    def unguarded(self, item: Any, name: str) -> Any:
        """Returns what `outcome` does, from this process, where a hang is not ended."""
        return _attempt(self._args[0], item, name)

    def outcome(self, item: Any, name: str) -> Any:
        """Returns function(item), or a ClipError that says why there is no result."""
        why = ""
        for _ in range(2):
            # An interrupted call leaves a child that still owes an answer: it is not used again.
            child, self._local.child = getattr(self._local, "child", None) or self._start(), None
            try:
                self._local.child, got = child, child.call(item, name, self._args[1])
                return got
            except TimeoutError as error:
                return ClipError(f"{name}: decoding {error} and was stopped; re-encode the file or raise --timeout")
            except (EOFError, OSError):
                why = child.ending()
                # No file sends SIGKILL: somebody did, or the kernel when memory ran out, perhaps another process's. Once more, then.
                if child.process.returncode != -signal.SIGKILL:
                    break
            finally:
                if not self._local.child:
                    child.end()
        return ClipError(f"{name}: the decoding process {why}; the file is damaged or needs more memory than there is: re-encode it")

    def close(self) -> None:
        """Kills all children, whose threads then get no result; no other child starts."""
        with self._lock:
            self._closing.set()
            for child in self._children:
                child.process.kill()

    def _start(self) -> _Child:
        pauses = iter(START_PAUSES_S)
        while True:
            try:
                with self._lock:
                    if self._closing.is_set():
                        raise RuntimeError("no process is started for a pool that closes")
                    self._children.add(child := _Child())
                break
            except OSError as error:
                if (pause := next(pauses, None)) is None:
                    raise CannotStart(
                        f"a decoding process could not start ({error.strerror or error}); use fewer workers, or allow more processes, "
                        f"open files (ulimit -u, -n) or memory"
                    ) from None
            self._closing.wait(pause)
        child.begin(*self._args)
        return child

    def __reduce__(self) -> tuple[Any, ...]:
        return Guarded, self._args


class _Child:
    """One process and the pipe to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as opened:
            opened.enter_context(ours)
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, str(theirs.fileno()), json.dumps(sys.path)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | _ENVIRONMENT,
                process_group=0,  # Ctrl-C is for the parent, which ends its children itself
            )
            opened.pop_all()
        self._pipe = _Pipe(ours)
        # Called when it is done with, or when its thread ends, the pool or this process, whichever comes first.
        self.end = weakref.finalize(self, _end, self.process, ours)

    def begin(self, function: Any, timeout_s: float) -> None:
        """Hands over the function. Raises RuntimeError when the child cannot import it."""
        try:
            self._pipe.send((function, timeout_s), START_LIMIT_S)
            problem = self._pipe.receive(START_LIMIT_S)
        except (EOFError, OSError) as error:
            problem = f"{self.ending()} ({type(error).__name__})"
        if problem:
            self.end()
            raise RuntimeError(f"a decoding process could not start: {problem}")

    def call(self, item: Any, name: str, timeout_s: float) -> Any:
        """Returns what the function gave. Raises TimeoutError past the limit, EOFError or OSError when the process is gone."""
        latest = time.monotonic() + LONGEST * timeout_s
        said, limit = "took longer than", timeout_s
        try:
            self._pipe.send((item, name), limit)
            while not (got := self._pipe.receive(limit)):
                said, limit = "stood still for", max(1e-3, min(timeout_s, latest - time.monotonic()))
            return got[0]
        except TimeoutError:
            if limit < timeout_s:
                said, timeout_s = "took longer than", LONGEST * timeout_s
            raise TimeoutError(f"{said} {timeout_s:g} s") from None

    def ending(self) -> str:
        """Says how the process ended."""
        try:
            status = self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return f"ended with status {status}" if status >= 0 else f"was killed by {signal.Signals(-status).name}"


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    process.kill()
    connection.close()
    with contextlib.suppress(subprocess.TimeoutExpired):  # a process in an uninterruptible read dies when the read ends
        process.wait(_JOIN_LIMIT_S)


# ------------------------------------------------------------------------------------------------------------- both processes


class _Pipe:
    """Values over a socket, pickled; arrays without a copy. Limits are seconds without a byte: TimeoutError. EOFError where it ends."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._reader = connection, connection.makefile("rb")

    def send(self, value: Any, limit: float | None = None) -> None:
        arrays: list[pickle.PickleBuffer] = []
        body = pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
        self._socket.settimeout(limit)
        with self._socket.makefile("wb") as writer:
            pickle.dump((body, [array.raw().nbytes for array in arrays]), writer)
            writer.writelines(array.raw() for array in arrays)

    def receive(self, limit: float | None = None) -> Any:
        self._socket.settimeout(limit)
        try:
            body, sizes = pickle.load(self._reader)
        except pickle.UnpicklingError as error:  # in the middle
            raise EOFError from error
        arrays = [np.empty(size, np.uint8) for size in sizes]  # not a bytearray: this one is not filled with zeros first
        if any(self._reader.readinto(array.data) < array.size for array in arrays):
            raise EOFError
        return pickle.loads(body, buffers=arrays)


_progress: Callable[[], None] = lambda: None  # noqa: E731 - in a child: reports to the parent


def goes_on() -> None:
    """Reports progress on an item, one frame after the other: its time limit begins again, up to `LONGEST` times in all."""
    _progress()


def _attempt(function: Any, item: Any, name: str) -> Any:
    """Returns function(item), or a ClipError that says why there is no result."""
    try:
        return function(item)
    except ClipError as error:
        return error.with_traceback(None)
    except InputError as error:
        return ClipError(str(error))
    except MemoryError:
        return ClipError(f"{name}: needs more memory than there is; shorten it or use fewer workers")
    except Exception as error:  # one bad clip never stops the others, however it is bad
        frame = traceback.extract_tb(error.__traceback__)[-1]
        cause = f"{type(error).__name__} at {os.path.basename(frame.filename)}:{frame.lineno}: {' '.join(str(error).split())}"
        if not isinstance(error, _OURS):
            return ClipError(f"{name}: cannot be used ({cause}); re-encode the file")
        fault = OwnFault(f"{name}: cannot be used ({cause}); this is a fault of omni-jax or of a library below it: report it")
        fault.cause = cause
        return fault


def _serve(descriptor: int) -> None:
    """Life of a child: receive the function, then item after item, until the parent closes the socket."""
    # An orphan that hangs in C code is ended by the kernel: the default action of an alarm needs no Python.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # A terminal's Ctrl-C goes to this process too; it ends with its parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = _Pipe(socket.socket(fileno=descriptor))
    try:
        function, timeout_s = pipe.receive()
    except EOFError:
        return
    except Exception as error:
        pipe.send(" ".join(f"{type(error).__name__}: {error}".split()))
        return
    reported = 0.0

    def report() -> None:
        nonlocal reported
        if (now := time.monotonic()) - reported > min(1.0, timeout_s / 4):
            reported = now
            signal.setitimer(signal.ITIMER_REAL, timeout_s + _ORPHAN_GRACE_S)
            try:
                pipe.send(())
            except OSError:  # the parent is gone
                os._exit(1)

    global _progress
    _progress = report
    with contextlib.suppress(EOFError, OSError):
        pipe.send("")
        while True:
            item, name = pipe.receive()
            reported = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, timeout_s + _ORPHAN_GRACE_S)
            outcome = _attempt(function, item, name)
            signal.setitimer(signal.ITIMER_REAL, 0)
            try:
                pipe.send((outcome,))
            except (pickle.PicklingError, TypeError, AttributeError) as error:
                pipe.send((ClipError(f"{name}: the result cannot be handed over ({error})"),))
