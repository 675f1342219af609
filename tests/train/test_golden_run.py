"""Losses, gradients and updates of the PyTorch reference (SPEC section 11, losses.npz)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.train import RunConfig, TrainStep, kinds_of_update, step_kind
from omni_jax.train.gradients import loss_of
from omni_jax.train.trainable import split
from omni_jax.types import StepKind
from tests.tolerances import assert_close
from tests.train import golden_batches
from tests.train.golden_batches import peft_arrays
from tests.train.random_batches import QUICK

pytestmark = [pytest.mark.jit, pytest.mark.exact]

NAMES = ("L_T", "L_D", "L_A")


@pytest.mark.parametrize("kind", range(3))
def test_golden_losses_from_recorded_embeddings(golden, reference, kind):
    names = {"hard": "hard_negative", **{n: n for n in ("anchor", "positive", "text", "audio", "video")}}
    embeddings = {name: jnp.asarray(golden.losses[f"step{kind}/{at}"]) for name, at in names.items()}
    losses = reference.config.losses
    _, metrics = loss_of(embeddings, {}, losses, step_kind(kind, losses), 1)
    for name in NAMES:
        assert_close(metrics[name], golden.losses[f"step{kind}/{name}"], "loss_from_embeddings")
    assert_close(metrics["loss"], sum(golden.losses[f"step{kind}/{name}"] for name in NAMES), "loss_from_embeddings")


@pytest.mark.parametrize("kind", range(3))
def test_golden_losses_and_every_gradient(golden, reference, kind):
    """The first update of a run has learning rate 0; its first moment is a tenth of the clipped gradient."""
    state, frozen = reference.step.init(reference.params)
    after, metrics = reference.step(state, frozen, reference.batch(kind))
    norm = float(metrics["grad_norm"])
    for name in NAMES:
        assert_close(metrics[name], golden.losses[f"step{kind}/{name}"], "loss")
    assert_close(norm, golden.losses[f"step{kind}/grad_norm"], "gradient_norm")

    adam = next(s for s in after.optimizer if hasattr(s, "mu"))
    unclipped = max(1.0, norm + 1e-6) / 0.1
    gradients = peft_arrays(reference.model, jax.tree.map(lambda m: np.asarray(m) * unclipped, adam.mu))
    assert sorted(gradients) == sorted(map(str, golden.losses["names"]))
    for name, gradient in gradients.items():
        assert_close(gradient, golden.losses[f"step{kind}/grad/{name}"], "gradient")


def test_golden_parameters_after_six_updates(golden, reference):
    state, frozen = reference.step.init(reference.params)
    recorded = golden.losses["train/loss_T_D_A_gradnorm_lr"]
    for update, (tuples, distillation, pairs, norm, rate) in enumerate(recorded):
        batch = reference.batch(update % 3)
        assert batch.kinds == kinds_of_update(update, 1, reference.config.losses)
        state, metrics = reference.step(state, frozen, batch)
        for name, expected in zip(NAMES, (tuples, distillation, pairs), strict=True):
            assert_close(metrics[name], expected, "loss")
        assert_close(metrics["grad_norm"], norm, "gradient_norm")
        assert_close(metrics["learning_rate"], rate, "learning_rate")
    for name, value in peft_arrays(reference.model, state.trainable).items():
        assert_close(value, golden.losses[f"train/param/{name}"], "parameter")
    assert int(state.step) == len(recorded) and int(state.skipped) == 0


def test_golden_run_compiled_each_step_kind_once(reference):
    """Runs after the updates above, alone as well: nothing is compiled twice however often a kind comes back."""
    state, frozen = reference.step.init(reference.params)
    for update in (0, 0):
        state, _ = reference.step(state, frozen, reference.batch(update))
    assert len(reference.step.programs) == len(set(reference.step.programs)) <= 3


@pytest.mark.jit
def test_golden_captions_are_embedded_by_the_head_that_the_preset_names(golden, reference):
    """`text_head=fused` of a run is that of `embed` with the weights it makes: the reference's caption through the fusion head."""
    run = RunConfig.from_config(
        {
            "model": {"base": "x"},
            "data": {"train": "x", "preset": "mteb"},
            "batch": {"micro_batch": 6},
            "optimizer": {"learning_rate": 1.0},
            "steps": 1,
        }
    )
    kind = StepKind(anchor=False, positive=False, hard=None, singles=("text",), pairs=())
    batch = jax.tree.map(lambda x: x[0], golden_batches.batch(golden, reference.model, kind))
    trainable, frozen = split(reference.params, reference.step.names, None)
    for head, name in (("fused", "t"), ("last", "label")):
        config = dataclasses.replace(reference.config, text_head=head)
        forward = TrainStep(reference.model, config, dtype=jnp.float32).forward
        embed = jax.jit(lambda f=forward: f.embed(trainable, frozen, batch, {}, kind, None, hard=False), compiler_options=QUICK)
        expected = np.stack([golden.adapter[f"{i}/embed/{name}"].reshape(-1) for i in range(golden.clips)])
        assert_close(embed()["text"], expected, "embed")
    assert run.step_config(1).text_head == "fused"
