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
from typing import Any, TypeVar

import numpy as np

from omni_jax.types import ClipError, InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

START_LIMIT_S = 300.0  # a child imports NumPy and PyAV first, which a busy network disk can make slow
ALIKE = 5
"""First items that fail alike, by an error of `_OURS`, after which the run stops."""

_OURS = (TypeError, AttributeError, NameError, ImportError, NotImplementedError, AssertionError, RecursionError)  # no file raises these
_JOIN_LIMIT_S = 10.0
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
) -> Iterator[tuple[Item, Result | ClipError]]:
    """Yields (item, function(item)) in the order of `items`, with a ClipError in place of a result that could not be had.

    An item gets a ClipError when the function raises (whatever it raises), exceeds the limit, or takes its process down. Closing the
    iterator, also by an exception or Ctrl-C, kills every child; a child whose parent is killed ends by itself.

    Args:
      function: an importable function (or a functools.partial of one); its module must not import jax. Results are pickled, arrays without
        a copy.
      items: picklable; pulled from only `in_flight` ahead of what was yielded, in the caller's thread.
      workers: child processes. 0 calls the function in this process, WITHOUT protection: a hang is not ended, a crash ends everything.
      timeout_s: seconds one item may take; the start of a process does not count.
      name: what to call an item in a message, a file name for example.
      in_flight: items handed out or finished and not yet yielded, at most; default 4 per worker. Bounds memory.

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
        return _stop_at_our_fault((item, _attempt(function, item, name(item))) for item in items)
    return _stop_at_our_fault(_run_pool(function, items, _Pool(function, workers, timeout_s), name, in_flight or 4 * workers))


def _stop_at_our_fault(outcomes: Generator[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
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


def _run_pool(function: Any, items: Iterable[Any], pool: _Pool, name: Callable[[Any], str], in_flight: int) -> Generator[tuple[Any, Any]]:
    source = iter(items)
    waiting: collections.deque[Any] = collections.deque()
    submitted = yielded = 0
    exhausted = False
    try:
        while True:
            while not exhausted and submitted - yielded < in_flight:
                try:
                    item = next(source)
                except StopIteration:
                    exhausted = True
                    break
                pool.submit(submitted, item, name(item))
                waiting.append(item)
                submitted += 1
            if not waiting:
                return
            outcome = pool.result(yielded)
            yielded += 1
            yield waiting.popleft(), outcome
    finally:
        pool.close()


class _Pool:
    """Threads of this process, each tending one child: a thread waits with a time limit, which a shared queue of results could not."""

    def __init__(self, function: Any, workers: int, timeout_s: float) -> None:
        self._function, self._workers, self._timeout_s = function, workers, timeout_s
        self._tasks: queue.SimpleQueue[tuple[int, Any, str] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._results: dict[int, Any] = {}
        self._failure: BaseException | None = None
        self._children: set[_Child] = set()
        self._threads: list[threading.Thread] = []
        self._closing = False
        atexit.register(self.close)  # an iterator that nobody closed must not leave a hung child behind

    def submit(self, number: int, item: Any, name: str) -> None:
        self._tasks.put((number, item, name))
        if len(self._threads) < self._workers:
            thread = threading.Thread(target=self._tend, name=f"decode-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def result(self, number: int) -> Any:
        with self._changed:
            self._changed.wait_for(lambda: number in self._results or self._failure is not None)
            if number in self._results:
                return self._results.pop(number)
            raise self._failure or AssertionError("unreachable")

    def close(self) -> None:
        with self._changed:
            self._closing = True
            for child in self._children:
                child.kill()
        with contextlib.suppress(queue.Empty):
            while True:
                self._tasks.get_nowait()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(_JOIN_LIMIT_S)
        atexit.unregister(self.close)

    def _tend(self) -> None:
        child: _Child | None = None
        try:
            while (task := self._tasks.get()) is not None and not self._closing:
                number, item, name = task
                child, outcome = _guarded_call(child, self._start, self._end, item, name, self._timeout_s)
                with self._changed:
                    self._results[number] = outcome
                    self._changed.notify_all()
        except BaseException as failure:  # not one item's fault: the consumer must hear of it, or it would wait for ever
            with self._changed:
                self._failure = self._failure or failure
                self._changed.notify_all()
        finally:
            self._end(child)

    def _start(self) -> _Child:
        if self._closing:
            raise RuntimeError("no process is started for a pool that closes")
        try:
            child = _Child()
        except OSError as error:
            raise RuntimeError(f"a decoding process could not start: {error}; use fewer workers") from None
        with self._changed:
            self._children.add(child)
            if self._closing:
                child.kill()
        try:
            child.begin(self._function, self._timeout_s)
        except BaseException:
            self._end(child)
            raise
        return child

    def _end(self, child: _Child | None) -> None:
        if child is None:
            return
        child.kill()
        with self._changed:
            self._children.discard(child)
        child.close()


def _guarded_call(
    child: _Child | None, start: Callable[[], _Child], end: Callable[[_Child | None], None], item: Any, name: str, timeout_s: float
) -> tuple[_Child | None, Any]:
    """Returns the child that goes on living, or None, and what the item gave: a result, or a ClipError that says why there is none."""
    why = ""
    for _ in range(2):
        try:
            child = child or start()
            return child, child.call(item, name, timeout_s)
        except TimeoutError:
            why = f"decoding took longer than {timeout_s:g} s and was stopped; re-encode the file or raise --timeout"
            again = False
        except (EOFError, OSError):
            ending = child.ending() if child else "did not start"
            why = f"the decoding process {ending}; the file is damaged or needs more memory than there is: re-encode it"
            # No file sends SIGKILL: somebody did, or the kernel when memory ran out, perhaps another process's. Once more, then.
            again = child is not None and child.process.returncode == -signal.SIGKILL
        end(child)
        child = None
        if not again:
            break
    return None, ClipError(f"{name}: {why}")


class Guarded:
    """A function whose calls run in a child process under a time limit, one child for each thread that calls.

    Can be pickled: a copy starts children of its own.
    """

    def __init__(self, function: Callable[[Any], Any], timeout_s: float) -> None:
        self._function, self._timeout_s = function, timeout_s
        self._local = threading.local()

    def __call__(self, item: Any, name: str) -> Any:
        """Returns function(item). Raises ClipError where there is no result, whatever the reason."""
        kept: _Child | None = getattr(self._local, "child", None)
        self._local.child = None  # an interrupted call leaves a child that still owes an answer: it is not used again
        kept, outcome = _guarded_call(kept, self._start, _end, item, name, self._timeout_s)
        self._local.child = kept
        if isinstance(outcome, ClipError):
            raise outcome
        return outcome

    def _start(self) -> _Child:
        child = _Child()
        # Ends with its thread, with this object or with the process, whichever comes first.
        weakref.finalize(child, _end_process, child.process, child.socket)
        child.begin(self._function, self._timeout_s)
        return child

    def __getstate__(self) -> dict[str, Any]:
        return {"_function": self._function, "_timeout_s": self._timeout_s}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_function"], state["_timeout_s"])


def _end(child: _Child | None) -> None:
    if child is not None:
        child.kill()
        child.close()


def _end_process(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    process.kill()
    connection.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
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
        deadline = time.monotonic() + timeout_s
        _send(self.socket, (item, name), deadline)
        return _receive(self.socket, deadline)

    def ending(self) -> str:
        """Says how the process ended."""
        try:
            status = self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if status >= 0:
            return f"ended with status {status}"
        return f"was killed by {signal.Signals(-status).name}"

    def kill(self) -> None:
        self.process.kill()

    def close(self) -> None:
        self.socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process in an uninterruptible read dies when the read ends
            self.process.wait(_JOIN_LIMIT_S)


# ------------------------------------------------------------------------------------------------------------- both processes


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


def _serve(descriptor: int) -> None:
    """Life of a child: receive the function, then item after item, until the parent closes the socket."""
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
        with contextlib.suppress(EOFError, OSError):
            _send(connection, "", math.inf)
            while True:
                item, name = _receive(connection, math.inf)
                signal.setitimer(signal.ITIMER_REAL, timeout_s + _ORPHAN_GRACE_S)
                outcome = _attempt(function, item, name)
                signal.setitimer(signal.ITIMER_REAL, 0)
                try:
                    _send(connection, outcome, math.inf)
                except (pickle.PicklingError, TypeError, AttributeError) as error:
                    _send(connection, ClipError(f"{name}: the result cannot be handed over ({error})"), math.inf)
