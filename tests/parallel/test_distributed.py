"""The start of several processes: what stands in the environment, and what is refused."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from omni_jax.parallel import distributed


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


@pytest.mark.parametrize(
    ("count", "index", "message"),
    [(None, 0, r"OMNI_JAX_PROCESSES=''"), (2, None, r"OMNI_JAX_PROCESS=''"), (2, 2, "process 2 of 2"), (2, -1, "process -1 of 2")],
)
def test_numbers_that_make_no_sense_are_refused(calls: list[tuple[Any, ...]], count: int | None, index: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distributed.start("10.0.0.1:99", count, index, environment={})
    assert calls == []


def test_alone_a_process_agrees_with_itself() -> None:
    assert distributed.any_process(True) and not distributed.any_process(False)
    error = distributed.first_does(lambda: 1 / 0)
    assert isinstance(error, ZeroDivisionError)
    assert distributed.first_does(lambda: None) is None
