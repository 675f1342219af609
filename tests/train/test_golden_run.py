"""Losses, gradients and updates of the PyTorch reference (SPEC section 11, losses.npz)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.train import RunConfig, TrainState, TrainStep, kinds_of_update, step_kind
from omni_jax.train.gradients import compute_losses
from omni_jax.train.trainable import split
from omni_jax.types import StepKind
from tests.tolerances import assert_close
from tests.train import golden_batches
from tests.train.conftest import Reference
from tests.train.golden_batches import peft_arrays

pytestmark = [pytest.mark.jit, pytest.mark.exact]

NAMES = ("L_T", "L_D", "L_A")


@pytest.mark.parametrize("kind", range(3))
def test_golden_losses_from_recorded_embeddings(golden, reference, kind):
    names = {"hard": "hard_negative", **{n: n for n in ("anchor", "positive", "text", "audio", "video")}}
    embeddings = {name: jnp.asarray(golden.losses[f"step{kind}/{at}"]) for name, at in names.items()}
    losses = reference.config.losses
    _, metrics = compute_losses(embeddings, {}, losses, step_kind(kind, losses), 1)
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
    """Tolerances grow with what rounding of the start makes of the same updates, see tests/tolerances.py."""
    recorded = golden.losses["train/loss_T_D_A_gradnorm_lr"]
    kinds = [kinds_of_update(update, 1, reference.config.losses) for update in range(len(recorded))]
    assert kinds == [reference.batch(update % 3).kinds for update in range(len(recorded))]
    rows, state = updates(reference, len(recorded))
    others = [updates(reference, len(recorded), rounding=seed) for seed in (1, 2, 3)]
    # A distance grows from update to update: the largest so far is what a later one is at least.
    spread = np.maximum.accumulate(np.max([np.abs(other - rows) for other, _ in others], axis=0), axis=0)
    for update, (*values, rate) in enumerate(recorded):
        for column, (name, expected) in enumerate(zip((*["loss"] * len(NAMES), "gradient_norm"), values, strict=True)):
            assert_close(rows[update, column], expected, name, spread=spread[update, column])
        assert_close(rows[update, -1], rate, "learning_rate")
    got, *rounded = (jax.device_get(trained.trainable) for trained in (state, *(other for _, other in others)))
    apart = max(float(np.abs(other[name] - got[name]).max()) for other in rounded for name in got)
    for name, value in peft_arrays(reference.model, got).items():
        assert_close(value, golden.losses[f"train/param/{name}"], "parameter", spread=apart)
    assert int(state.step) == len(recorded) and int(state.skipped) == 0


def updates(reference: Reference, count: int, rounding: int | None = None) -> tuple[np.ndarray, TrainState]:
    """Returns losses, gradient norm and learning rate of each update, and the last state.

    With `rounding` every parameter begins 1e-7 of itself larger or smaller, by that seed.
    """
    params = reference.params
    if rounding is not None:
        rng = np.random.default_rng(rounding)
        params = {
            path: np.asarray(x) * (1 + np.float32(1e-7) * rng.choice([-1, 1], x.shape).astype(np.float32)) for path, x in params.items()
        }
        assert {x.dtype for x in params.values()} == {np.dtype(np.float32)}
    state, frozen = reference.step.init(params)
    rows = []
    for update in range(count):
        state, metrics = reference.step(state, frozen, reference.batch(update % 3))
        rows.append([float(metrics[name]) for name in (*NAMES, "grad_norm", "learning_rate")])
    return np.array(rows), state


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
        embed = jax.jit(lambda f=forward: f.embed(trainable, frozen, batch, {}, kind, None, hard=False))
        expected = np.stack([golden.adapter[f"{i}/embed/{name}"].reshape(-1) for i in range(golden.clips)])
        assert_close(embed()["text"], expected, "embed")
    assert run.step_config(1).text_head == "fused"
