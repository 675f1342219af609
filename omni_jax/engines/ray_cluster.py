"""A Ray cluster as the engines use it: connect, agree on the code, count, and distinguish lost workers from errors."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import omni_jax
from omni_jax.config import ConfigError
from omni_jax.io.messages import as_input_error
from omni_jax.types import InputError

LOCAL, AUTO = "local", "auto"
CONNECT_S = 10.0  # for each of: the connection, and the first answer
ATTEMPTS = 10
"""Times that work may be lost with its process or node before the run ends."""

_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # of HTTP/2, with empty settings
_SETTINGS = 4  # the type of the frame that the other side begins with


class Report(Protocol):
    """Where an engine says how far it is; `cli.progress.Progress` is one."""

    detail: str

    def update(self, items: int = 1) -> None: ...
    def note(self, text: str) -> None: ...


@dataclasses.dataclass(frozen=True)
class Lost:
    """In place of a result: its process, its node or its data went away. `actor`: with the actor that worked on it."""

    reason: str
    actor: bool


def check_address(address: str) -> None:
    """Raises InputError for an address that is none or does not answer, within seconds, where Ray itself waits for minutes."""
    import ray  # noqa: F401 - its absence is said before anything is read

    if address in (LOCAL, AUTO):
        return
    if "://" in address:
        raise InputError(
            f"--ray {address}: the command must run on a node of the cluster: there, or with 'ray job submit', give auto or HOST:PORT"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"--ray {address}: give local, auto, or HOST:PORT of the cluster's head")
    silent = as_input_error(f"--ray {address}: does not answer", "start the cluster or check the address")
    with silent, socket.create_connection((host.strip("[]"), int(port)), CONNECT_S) as connection:
        connection.settimeout(CONNECT_S)
        connection.sendall(_GREETING)
        answer = connection.recv(9)
    if len(answer) < 4 or answer[3] != _SETTINGS:
        raise InputError(f"--ray {address}: no Ray cluster answers there; give the port of 'ray start --head' (6379)")


@contextlib.contextmanager
def connected(address: str, cpus: int) -> Iterator[Any]:
    """Yields the module `ray`, connected; a cluster that `local` starts ends with the block.

    Args:
      address: as `check_address` takes it.
      cpus: of a local cluster.

    Raises:
      InputError: when there is no cluster, or one of another version.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing asks the network that the user did not name
    import ray

    main = threading.current_thread() is threading.main_thread()
    on_sigterm = signal.getsignal(signal.SIGTERM) if main else None
    if address == LOCAL:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into the home folder
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == LOCAL:
        quiet |= {"num_cpus": cpus, "include_dashboard": False}
    # Of a cluster that has gone since it answered Ray ends the process.
    with as_input_error(f"--ray {address}: cannot be used", "start the cluster or check it", Exception, SystemExit):
        ray.init(address=address, **quiet)
    try:
        if main:
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray has set its own
        yield ray
    finally:
        ray.shutdown()


@functools.cache
def code_stamp() -> str:
    """Returns the version of omni_jax with a digest of its sources, which no two nodes of a run may differ in."""
    root = Path(omni_jax.__file__).parent
    digest = hashlib.blake2b(digest_size=4)
    # Folders that are links in a checkout are left out.
    for file in sorted(p for p in root.rglob("*.py") if not {"conversion", "configs"} & set(p.relative_to(root).parts)):
        digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return f"{omni_jax.__version__} ({digest.hexdigest()})"


def check_code(stamp: str) -> None:
    """Raises InputError on a node whose omni_jax is not that of the command."""
    if (here := code_stamp()) != stamp:
        raise InputError(f"node {socket.gethostname()} has omni_jax {here}, the command {stamp}; install the same on all nodes")


def result(ray: Any, ref: Any) -> Any:
    """Returns what a finished task gave, or `Lost`. Raises what the task raised."""
    from ray import exceptions as errors

    gone = (errors.RayActorError, errors.WorkerCrashedError, errors.NodeDiedError, errors.ObjectLostError, errors.OutOfMemoryError)
    try:
        return ray.get(ref)
    except errors.RayTaskError as error:
        cause = error.cause
        if not isinstance(cause, gone):
            _check_import(cause)
            raise cause from (None if isinstance(cause, InputError | ConfigError) else error)
    except gone as error:
        cause = error
        _check_import(cause)
    return Lost(_line(cause), isinstance(cause, errors.RayActorError))


def _check_import(error: BaseException) -> None:
    if isinstance(error, ModuleNotFoundError) or "failed to import" in str(error) or "failed to be imported" in str(error):
        raise InputError(f"a node cannot import omni_jax ({_line(error)}); install this version on all nodes") from None


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def cpus(ray: Any) -> int:
    """Returns the CPUs that the cluster has now."""
    return int(ray.cluster_resources().get("CPU", 0))


class Counters:
    """What a command has done, in its progress line and in Ray's metrics (`omni_jax_clips` and so on, by command)."""

    def __init__(self, command: str, report: Report):
        from ray.util import metrics

        self.report, self._begin, self._tags = report, time.monotonic(), {"command": command}
        what = {
            "clips": "Clips done.",
            "silent": "Clips with silence for a missing audio track.",
            "skipped": "Records that could not be used.",
            "bytes": "Bytes of prepared clips.",
        }
        self._counts = dict.fromkeys(what, 0)
        self._metrics = {name: metrics.Counter(f"omni_jax_{name}", about, ("command",)) for name, about in what.items()}
        self._rate = metrics.Gauge("omni_jax_clips_per_second", "Clips per second since the command began.", ("command",))

    def add(self, **counts: int) -> None:
        """Counts some more, by the names `clips`, `silent`, `skipped` and `bytes`."""
        for name, count in counts.items():
            self._counts[name] += count
            if count:
                self._metrics[name].inc(count, self._tags)
        self._rate.set(self._counts["clips"] / max(time.monotonic() - self._begin, 1e-9), self._tags)

    def tick(self, state: str) -> None:
        """Shows the counts and the progress; to be called about once a second."""
        counts = self._counts
        self.report.detail = (
            f"{counts['skipped']} skipped, {counts['silent']} silent, {counts['bytes'] / 1e9:.2f} GB, {state}"  # as disks are sold
        )
        self.report.update(0)
