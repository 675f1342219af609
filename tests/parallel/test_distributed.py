"""The start of several processes: what stands in the environment, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import jax
import pytest

from omni_jax.parallel import distributed
from tests.repository import ROOT
from tests.train.tiny_run import free_port


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: seen.append(args))
    return seen


def test_a_process_alone_starts_nothing(calls: list[tuple[Any, ...]]) -> None:
    assert not distributed.start(environment={})
    assert not distributed.start("10.0.0.1:99", 1, 0, environment={})
    assert calls == []


def test_flags_come_before_the_environment(calls: list[tuple[Any, ...]]) -> None:
    environment = {distributed.COORDINATOR: "10.0.0.1:99", distributed.PROCESSES: "4", distributed.PROCESS: "3"}
    distributed.start(environment=environment)
    distributed.start("10.0.0.2:99", index=0, environment=environment)
    distributed.start("auto", environment=environment)
    assert calls == [("10.0.0.1:99", 4, 3), ("10.0.0.2:99", 4, 0), ()]


@pytest.mark.parametrize("coordinator", ["10.0.0.1:99", "auto"])
def test_how_long_to_wait_for_the_others_and_for_a_lost_one_is_in_the_environment(
    coordinator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def initialize(*_: Any, initialization_timeout: int, heartbeat_timeout_seconds: int) -> None:
        seen.append((initialization_timeout, heartbeat_timeout_seconds))

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for environment in ({}, {distributed.START: "10", distributed.LOST: "30"}):
        distributed.start(coordinator, 2, 0, environment=environment)
    assert seen == [(660, 100), (80, 30)]
    with pytest.raises(ValueError, match="OMNI_JAX_LOST_SECONDS='soon'"):
        distributed.start(coordinator, 2, 0, environment={distributed.LOST: "soon"})


@pytest.mark.parametrize(
    ("count", "index", "message"),
    [(None, 0, r"OMNI_JAX_PROCESSES=''"), (2, None, r"OMNI_JAX_PROCESS=''"), (2, 2, "process 2 of 2"), (2, -1, "process -1 of 2")],
)
def test_numbers_that_make_no_sense_are_refused(calls: list[tuple[Any, ...]], count: int | None, index: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distributed.start("10.0.0.1:99", count, index, environment={})
    assert calls == []


@pytest.mark.costly
@pytest.mark.parametrize(
    ("index", "why"), [(0, "not all 2 processes have started"), (1, "no coordinator at 127.0.0.1:{port} ([Errno 111] Connection refused)")]
)
def test_processes_that_do_not_come_together_end_in_time_with_one_line(index: int, why: str) -> None:
    """Process 0 waits for another that is never started; process 1 for a coordinator that is not there."""
    port = free_port()
    code = f"from omni_jax.parallel import start; start('127.0.0.1:{port}', 2, {index})"
    around = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), distributed.START: "3"}
    ended = subprocess.run([sys.executable, "-c", code], env=around, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == distributed.LATE, ended.stderr
    assert f"omni-jax: timed out after 3 s waiting for all processes: {why.format(port=port)}; " in ended.stderr.splitlines()[-1]


def test_alone_a_process_agrees_with_itself() -> None:
    assert distributed.process_allgather_str("grüße") == ["grüße"] and distributed.process_allgather_str("") == [""]
    assert distributed.run_on_all_processes(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        distributed.run_on_all_processes(lambda: 1 / 0)
    assert distributed.any_process(True) and not distributed.any_process(False)
    error = distributed.run_on_process_0(lambda: 1 / 0)
    assert isinstance(error, ZeroDivisionError)
    assert distributed.run_on_process_0(lambda: None) is None
