"""A Ray cluster of two nodes on loopback, its processes, and commands that work on it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.media_samples import write_clip
from tests.repository import ROOT
from tests.train.tiny_run import free_port

STORE = 100 << 20  # bytes of a node's object store
# Set on the head: a node that is gone is noticed after a few seconds, by default after most of a minute.
HEALTH = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "5000", "RAY_health_check_failure_threshold": "3"}
NOTICED_S = 30.0
ONE_EACH = {"model": 1}
"""What each node has one of: an actor that asks for it has a node of its own."""
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
"""What lets a process into the cluster."""


def make_clips(folder: Path, count: int) -> Path:
    """Writes clips of which 3 in 100 are broken, and their manifest."""
    rows = []
    for i in range(count):
        file = folder / f"{i}.mp4"
        if i % 33 == 5:
            file.write_bytes(b"no film")
        else:
            write_clip(file, 1.0 + 0.2 * (i % 3), fps=5, width=96 + 16 * (i % 2), height=64, audio=i % 7 != 1, seed=i)
        rows.append({"id": f"clip-{i}", "text": f"caption {i}" + " more" * (i % 5), "video": file.name, "audio": file.name})
    manifest = folder / "clips.jsonl"
    manifest.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return manifest


class Nodes:
    """Nodes of one CPU each, each the processes below one `ray start`.

    Attributes:
      address: HOST:PORT of the head.
    """

    def __init__(self, folder: Path):
        self._folder, port = folder, free_port()
        self.address = f"127.0.0.1:{port}"
        self.head = self._start("--head", f"--port={port}", f"--temp-dir={folder}", "--include-dashboard=false")
        self.second = self.add()

    def add(self, **environment: str) -> subprocess.Popen[bytes]:
        """Adds a node, whose processes see these variables too."""
        return self._start(f"--address={self.address}", **environment)

    def _start(self, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        has = ["--num-cpus=1", f"--resources={json.dumps(ONE_EACH)}", f"--object-store-memory={STORE}"]
        options = ["--node-ip-address=127.0.0.1", "--block", "--disable-usage-stats"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments, *has, *options]
        log = self._folder / f"{time.monotonic_ns()}.log"
        with log.open("w") as file:
            process = subprocess.Popen(command, env=os.environ | HEALTH | TOKEN | environment, stdout=file, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        return process

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """Kills all processes of a node with SIGKILL, as its machine would take them along."""
        for process in reversed([psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()

    def kill_at_work(self, node: subprocess.Popen[bytes], title: str, process: subprocess.Popen[str], log: Path) -> None:
        """Kills a node while it works on something of this name for a command.

        Until then the other node is stopped in such work, so that the command does not end before; and the worker is, so that it does not.
        """
        other = self.head if node is self.second else self.second
        held: dict[int, psutil.Process] = {}

        def at_work() -> list[psutil.Process]:
            for worker in self.workers(title, other):
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.suspend()
                    held[worker.pid] = worker
            return self.workers(title, node)

        try:
            for worker in wait_for(at_work, process, log):
                worker.suspend()
            time.sleep(0.5)  # an actor that was between two batches gets its next one
            self.kill(node)
        finally:
            for worker in held.values():
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.resume()

    def workers(self, title: str, *nodes: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """Returns the processes of these nodes, by default of all, that work on something of this name."""
        found = []
        for node in nodes or (self.head, self.second):
            for process in psutil.Process(node.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    name = " ".join(process.cmdline())
                    found += [process] if name.startswith(f"ray::{title}") and "__init__" not in name else []
        return found


@contextlib.contextmanager
def two_nodes() -> Iterator[Nodes]:
    """Yields a cluster; nothing of it is left afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # the path of a socket may have 107 characters
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    try:
        yield Nodes(folder)
    finally:
        for process in psutil.Process().children(recursive=True):
            if process.pid not in before:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        psutil.wait_procs([p for p in psutil.Process().children() if p.pid not in before], timeout=20)
        shutil.rmtree(folder, ignore_errors=True)


def begin(*arguments: str | Path, log: Path, folder: Path = ROOT, **environment: str) -> subprocess.Popen[str]:
    """Starts a command in a folder, which nodes then import from too; its output goes to a file."""
    command = [sys.executable, "-m", "omni_jax.cli.main", *map(str, arguments)]
    with log.open("a") as file:
        return subprocess.Popen(command, cwd=folder, env=os.environ | TOKEN | environment, stdout=file, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], log: Path, status: int, timeout_s: float = 400) -> str:
    """Waits for a command and returns what it said."""
    try:
        process.wait(timeout_s)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
    said = log.read_text()
    assert process.returncode == status, said
    return said


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str], log: Path, timeout_s: float = 600) -> Any:
    """Returns the first true value of a function, which must come before the command ends."""
    deadline = time.monotonic() + timeout_s
    while not (found := what()):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return found


def noticed(text: str, process: subprocess.Popen[str], log: Path) -> None:
    """Waits until a command says something; it must do so within the promised time."""
    wait_for(lambda: text in log.read_text(), process, log, NOTICED_S)


def files(folder: Path) -> dict[str, bytes]:
    """Returns the contents of a folder's files."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
