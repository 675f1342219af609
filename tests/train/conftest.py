"""The reference's training run, set up once: compiling its three step kinds is the costly part."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from tensorboard.summary.writer import event_file_writer

from omni_jax.config import ModelConfig
from omni_jax.train import StepConfig, TrainBatch, TrainStep, step_kind
from tests.golden_set import GoldenSet
from tests.programs import BALANCED_OPTIONS
from tests.train import golden_batches


@pytest.fixture(autouse=True)
def event_files_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads the event files of a run by name. Within a second and a process names end in a count, and 10 sorts before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """Model, recipe and batches of the recorded run."""

    golden: GoldenSet
    model: ModelConfig
    params: golden_batches.Params
    config: StepConfig
    step: TrainStep

    @functools.cache  # noqa: B019 (one object for the session)
    def batch(self, update: int) -> TrainBatch:
        made = golden_batches.batch(self.golden, self.model, step_kind(update % 3, self.config.losses))
        return jax.tree.map(jnp.asarray, made)


@pytest.fixture(scope="session")
def reference(golden: GoldenSet, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Reference:
    """Under `--compiler full` with every optimization."""
    options = {} if pytestconfig.getoption("compiler") == "full" else BALANCED_OPTIONS
    model, params = golden_batches.load_model(golden, tmp_path_factory.mktemp("golden") / "model")
    config = golden_batches.recipe(golden)
    return Reference(golden, model, params, config, TrainStep(model, config, dtype=jnp.float32, compiler_options=options))
