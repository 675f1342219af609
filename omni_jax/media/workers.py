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
import ctypes
import functools
import itertools
import json
import math
import os
import pickle
import queue
import signal
import socket
import struct
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

START_LIMIT_S = 300.0  # a child imports NumPy and PyAV first, which a busy network disk can make slow
LONGEST = 10  # times its limit that an item in progress may take: an hour of interlaced video decodes in a quarter of one
ALIKE = 5
"""First items that fail alike, by an error of `_OURS`, after which the run stops."""

_OURS = (TypeError, AttributeError, NameError, ImportError, NotImplementedError, AssertionError, RecursionError)  # no file raises these
_JOIN_LIMIT_S = 10.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_ORPHAN_GRACE_S = 2.0  # a hung child ends itself this long after its parent should have done so
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from omni_jax.media.workers import _serve; _serve(int(sys.argv[1]))"


class OwnFault(ClipError):
    """No result because of an error that no file raises. `cause` says what was raised where."""

    cause = ""


def run_guarded(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    timeout_s: float,
    *,
    name: Callable[[Item], str] = str,
    in_flight: int | None = None,
    here: Callable[[Item], bool] | None = None,
) -> Iterator[tuple[Item, Result | ClipError]]:
    """Yields (item, function(item)) in the order of `items`, with a ClipError in place of a result that could not be had.

    An item gets a ClipError when the function raises (whatever it raises), exceeds the limit, or takes its process down. Closing the
    iterator, also by an exception or Ctrl-C, kills every child; a child whose parent is killed ends by itself.

    Args:
      function: an importable function (or a functools.partial of one); its module must not import jax. Results are pickled, arrays without
        a copy.
      items: picklable; pulled from only `in_flight` ahead of what was yielded, in the caller's thread.
      workers: child processes. 0 calls the function in this process, WITHOUT protection: a hang is not ended, a crash ends everything.
      timeout_s: seconds one item may take; the start of a process does not count. Where the function says that it `goes_on`, they begin
        again, up to `LONGEST` times as many in all.
      name: what to call an item in a message, a file name for example.
      in_flight: items handed out or finished and not yet yielded, at most; default 4 per worker. Bounds memory.
      here: which items are worked on in this process, since nothing in them could hang; None: none.

    Raises:
      InputError: for arguments out of range, and when the first `ALIKE` items, or all of fewer, fail with the same error that no file
        raises: the fault is then one of this project or of a library below it.
      RuntimeError: when children cannot start at all.
    """
    if workers < 0:
        raise InputError(f"workers {workers}: must be 0 (no child processes) or more")
    if not (timeout_s > 0 and math.isfinite(timeout_s)):
        raise InputError(f"time limit {timeout_s}: must be a positive number of seconds")
    if workers == 0:
        return stop_at_our_fault((item, _attempt(function, item, name(item))) for item in items)
    guarded = Guarded(function, timeout_s, must_start=True)
    return stop_at_our_fault(_in_order(guarded, items, workers, name, in_flight or 4 * workers, here))


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
    guarded: Guarded,
    items: Iterable[Any],
    workers: int,
    name: Callable[[Any], str],
    in_flight: int,
    here: Callable[[Any], bool] | None,
) -> Generator[tuple[Any, Any]]:
    """Yields items and outcomes. Threads of this process make the calls, each with a child of its own: a thread can wait under a limit."""
    source, tasks = iter(items), queue.SimpleQueue[tuple[Future[Any], Any] | None]()
    waiting: collections.deque[tuple[Any, Future[Any]]] = collections.deque()
    threads: list[threading.Thread] = []
    atexit.register(guarded.close)  # an iterator that was not closed must not leave a hung child behind
    try:
        while True:
            for item in itertools.islice(source, in_flight - len(waiting)):
                waiting.append((item, Future()))
                if here is not None and here(item):
                    waiting[-1][1].set_result(guarded.unguarded(item, name(item)))
                    continue
                tasks.put((waiting[-1][1], item))
                if len(threads) < workers:
                    threads.append(threading.Thread(target=_work, args=(guarded, tasks, name), name=f"decode-{len(threads)}", daemon=True))
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


def _work(guarded: Guarded, tasks: queue.SimpleQueue[tuple[Future[Any], Any] | None], name: Callable[[Any], str]) -> None:
    try:
        while (task := tasks.get()) is not None:
            try:
                task[0].set_result(guarded.outcome(task[1], name(task[1])))
            except BaseException as failure:  # not one item's fault: the consumer must hear of it, or it would wait for ever
                task[0].set_exception(failure)
    finally:
        guarded.end_own()


class Guarded:
    """A function whose calls run in a child process under a time limit, one child for each thread that calls.

    Can be pickled: a copy starts children of its own.
    """

    def __init__(self, function: Callable[[Any], Any], timeout_s: float, *, must_start: bool = False) -> None:
        """Takes what `run_guarded` takes; `must_start`: a child that cannot start is no fault of its item (RuntimeError)."""
        self._args = function, timeout_s, must_start
        self._local = threading.local()
        self._children: weakref.WeakSet[_Child] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._closing = False

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
        timeout_s, why = self._args[1], ""
        for _ in range(2):
            child: _Child | None = getattr(self._local, "child", None)
            self._local.child = None  # an interrupted call leaves a child that still owes an answer: it is not used again
            try:
                child = child or self._start()
                got = child.call(item, name, timeout_s)
                self._local.child = child
                return got
            except TimeoutError as error:
                why = f"decoding {error} and was stopped; re-encode the file or raise --timeout"
                again = False
            except (EOFError, OSError):
                ending = child.ending() if child else "did not start"
                why = f"the decoding process {ending}; the file is damaged or needs more memory than there is: re-encode it"
                # No file sends SIGKILL: somebody did, or the kernel when memory ran out, perhaps another process's. Once more, then.
                again = child is not None and child.process.returncode == -signal.SIGKILL
            if child:
                child.end()
            if not again:
                break
        return ClipError(f"{name}: {why}")

    def end_own(self) -> None:
        """Ends the child of the thread that calls."""
        if child := getattr(self._local, "child", None):
            child.end()

    def close(self) -> None:
        """Kills all children, whose threads then get no result; no other child starts."""
        with self._lock:
            self._closing = True
            for child in self._children:
                child.process.kill()

    def _start(self) -> _Child:
        function, timeout_s, must_start = self._args
        try:
            with self._lock:
                if self._closing:
                    raise RuntimeError("no process is started for a pool that closes")
                child = _Child()
                self._children.add(child)
        except OSError as error:
            if must_start:
                raise RuntimeError(f"a decoding process could not start: {error}; use fewer workers") from None
            raise
        # Ends with its thread, with this object or with the process, whichever comes first.
        weakref.finalize(child, _end, child.process, child.socket)
        try:
            child.begin(function, timeout_s)
        except BaseException:
            child.end()
            raise
        return child

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(Guarded, must_start=self._args[2]), self._args[:2]


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    process.kill()
    connection.close()
    with contextlib.suppress(subprocess.TimeoutExpired):  # a process in an uninterruptible read dies when the read ends
        process.wait(_JOIN_LIMIT_S)


class _Child:
    """One process and the socket to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, str(theirs.fileno()), json.dumps(sys.path)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # One thread each: the processes are the parallelism.
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                process_group=0,  # Ctrl-C is for the parent, which ends its children itself
            )
        self.socket = ours

    def begin(self, function: Any, timeout_s: float) -> None:
        """Hands over the function. Raises RuntimeError when the child cannot import it."""
        try:
            deadline = time.monotonic() + START_LIMIT_S
            _send(self.socket, (function, timeout_s), deadline)
            problem = _receive(self.socket, deadline)
        except (EOFError, OSError) as error:
            problem = f"{self.ending()} ({type(error).__name__})"
        if problem:
            raise RuntimeError(f"a decoding process could not start: {problem}")

    def call(self, item: Any, name: str, timeout_s: float) -> Any:
        """Returns what the function gave. Raises TimeoutError past the limit, EOFError or OSError when the process is gone."""
        latest = time.monotonic() + LONGEST * timeout_s
        reason, deadline = "took longer than", time.monotonic() + timeout_s
        try:
            _send(self.socket, (item, name), deadline)
            while isinstance(got := _receive(self.socket, deadline), _GoesOn):
                reason, deadline = "stood still for", min(time.monotonic() + timeout_s, latest)
        except TimeoutError:
            if deadline == latest:
                reason, timeout_s = "took longer than", LONGEST * timeout_s
            raise TimeoutError(f"{reason} {timeout_s:g} s") from None
        return got

    def ending(self) -> str:
        """Says how the process ended."""
        try:
            status = self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if status >= 0:
            return f"ended with status {status}"
        return f"was killed by {signal.Signals(-status).name}"

    def end(self) -> None:
        _end(self.process, self.socket)


# ------------------------------------------------------------------------------------------------------------- both processes


class _GoesOn:
    """What a child sends while it works."""


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


_HEAD = struct.Struct("<QI")  # bytes of the pickle, number of arrays sent after it
_SIZE = struct.Struct("<Q")


def _send(connection: socket.socket, value: Any, deadline: float) -> None:
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    arrays = [buffer.raw() for buffer in buffers]
    head = _HEAD.pack(len(body), len(arrays)) + b"".join(_SIZE.pack(array.nbytes) for array in arrays)
    for part in (head, body, *arrays):
        connection.settimeout(_left(deadline))
        connection.sendall(part)


def _receive(connection: socket.socket, deadline: float) -> Any:
    length, count = _HEAD.unpack(_read(connection, _HEAD.size, deadline))
    sizes = [_SIZE.unpack(_read(connection, _SIZE.size, deadline))[0] for _ in range(count)]
    body = _read(connection, length, deadline)
    return pickle.loads(body, buffers=[_read(connection, size, deadline) for size in sizes])


def _read(connection: socket.socket, size: int, deadline: float) -> memoryview:
    data = np.empty(size, np.uint8).data  # not a bytearray: this one is not filled with zeros first
    at = 0
    while at < size:
        connection.settimeout(_left(deadline))
        got = connection.recv_into(data[at:])
        if not got:
            raise EOFError
        at += got
    return data


def _left(deadline: float) -> float | None:
    if deadline == math.inf:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def keep_freed_memory() -> None:
    """Lets glibc keep up to 256 MiB of freed memory for the next clip: what the kernel takes back it zeroes before it gives it again."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes


def _serve(descriptor: int) -> None:
    """Life of a child: receive the function, then item after item, until the parent closes the socket."""
    keep_freed_memory()
    # An orphan that hangs in C code is ended by the kernel: the default action of an alarm needs no Python.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # A terminal's Ctrl-C goes to this process too; it ends with its parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as connection:
        try:
            function, timeout_s = _receive(connection, math.inf)
        except EOFError:
            return
        except Exception as error:
            _send(connection, " ".join(f"{type(error).__name__}: {error}".split()), math.inf)
            return
        reported = 0.0

        def report() -> None:
            nonlocal reported
            if (now := time.monotonic()) - reported > min(1.0, timeout_s / 4):
                reported = now
                signal.setitimer(signal.ITIMER_REAL, timeout_s + _ORPHAN_GRACE_S)
                try:
                    _send(connection, _GoesOn(), math.inf)
                except OSError:  # the parent is gone
                    os._exit(1)

        global _progress
        _progress = report
        with contextlib.suppress(EOFError, OSError):
            _send(connection, "", math.inf)
            while True:
                item, name = _receive(connection, math.inf)
                reported = time.monotonic()
                signal.setitimer(signal.ITIMER_REAL, timeout_s + _ORPHAN_GRACE_S)
                outcome = _attempt(function, item, name)
                signal.setitimer(signal.ITIMER_REAL, 0)
                try:
                    _send(connection, outcome, math.inf)
                except (pickle.PicklingError, TypeError, AttributeError) as error:
                    _send(connection, ClipError(f"{name}: the result cannot be handed over ({error})"), math.inf)
