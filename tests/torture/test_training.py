"""The short form of part `training`: what is compared, on rows and arrays made here; tests/train and `make torture` kill processes."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from omni_jax.train.checkpoint import Checkpoints
from omni_jax.train.state import TrainState
from tools.torture import training
from tools.torture.outcome import Outcome

pytestmark = pytest.mark.jit


def _workdir(folder: Path, value: float, loss: float) -> Path:
    folder.mkdir()
    rows = [{"step": 1, "loss": 9.0}, {"step": 1, "loss": loss}, {"step": 2, "loss": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "lo')
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(jnp.int32(2), {"a/b": jnp.full(3, value)}, {"a/b": jnp.zeros(3)}, zero, zero, jnp.zeros(2, jnp.uint32))
    checkpoints = Checkpoints(folder / "checkpoints", 2)
    checkpoints.save(state)
    checkpoints.wait()
    checkpoints.close()
    return folder


def test_two_runs_are_the_same_when_every_bit_is(tmp_path: Path) -> None:
    calm = _workdir(tmp_path / "calm", 1.0, 1.5)
    for name, value, loss, words in (
        ("same", 1.0, 1.5, []),
        ("loss", 1.0, 1.5000001, ["other losses at updates [1]"]),
        ("array", 1.0000001, 1.5, ["other bits in 1 trainables"]),
    ):
        outcome = Outcome("training", 0)
        training.compare(outcome, calm, _workdir(tmp_path / name, value, loss), 2)
        assert len(outcome.lost) == len(words), outcome.lost
        assert all(line.startswith(start) for line, start in zip(outcome.lost, words, strict=True))
