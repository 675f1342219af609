"""PEFT loads what training wrote, on the torch skeleton of the base it was trained from, and computes what the trained leaves compute."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax import conversion
from omni_jax.train import TrainStep, step_kind
from tests.conversion import checkpoints
from tests.reference.test_peft_adapter import check_with_peft
from tests.tolerances import assert_close
from tests.train import golden_batches
from tests.train.random_batches import QUICK

pytestmark = pytest.mark.reference


def test_golden_adapter_of_three_updates_loads_in_peft(golden, tmp_path):
    """All three step kinds, from the golden adapter on: the exported adapter, converted back, is the trained state bit for bit."""
    model, params = golden_batches.load_model(golden, tmp_path / "model")
    config = golden_batches.recipe(golden)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, warmup_steps=0))
    step = TrainStep(model, config, dtype=jnp.float32, compiler_options=QUICK)
    state, frozen = step.init(dict(params))
    for update in range(3):
        batch = golden_batches.batch(golden, model, step_kind(update, config.losses))
        state, metrics = step(state, frozen, jax.tree.map(jnp.asarray, batch))
        assert np.isfinite(float(metrics["loss"]))
    trained = {tuple(name.split("/")): np.asarray(x) for name, x in state.trainable.items()}
    moved = [path for path, leaf in trained.items() if not np.array_equal(leaf, params[path])]
    assert len(moved) == len(trained)

    conversion.write_trained(tmp_path / "model", model, trained, base_out=tmp_path / "base", adapter_out=tmp_path / "adapter")
    assert checkpoints.files(tmp_path / "base", weights=True).keys() == checkpoints.files(golden.checkpoint, weights=True).keys()
    conversion.to_jax(tmp_path / "base", tmp_path / "back", adapter=tmp_path / "adapter")
    _, back = conversion.load(tmp_path / "back")
    for path, leaf in trained.items():
        assert_close(back[path], leaf, "round_trip")
    check_with_peft(tmp_path / "base", tmp_path / "adapter", tmp_path / "back")
