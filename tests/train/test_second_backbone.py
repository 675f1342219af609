"""Training a backbone without BEATs and without heads: what trains, the step with all three losses, and what it refuses."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.cli.config_file import planned_model, read_config
from omni_jax.config import BACKBONES, EMBED_STYLE, ConfigError, LoraConfig
from omni_jax.model import abstract_params
from omni_jax.planning.abstract import abstract_batch, planned_batch
from omni_jax.train import LossConfig, TrainableConfig, TrainStep, kinds_of_update
from omni_jax.train.trainable import count_groups, select
from tests.model.builders import random_value
from tests.tolerances import assert_close
from tests.train.random_batches import MODEL, QUICK, batch, recipe

SECOND = dataclasses.replace(MODEL, beats=None, **EMBED_STYLE)
PLAIN = dataclasses.replace(MODEL, beats=None)
LOSSES = LossConfig(temperature=0.2)


def params(model):
    return {path: jnp.asarray(random_value("/".join(path), leaf.shape)) for path, leaf in abstract_params(model).items()}


def test_the_adapter_recipe_trains_lora_alone():
    config = dataclasses.replace(BACKBONES["omni_embed_nemotron_3b"], lora=LoraConfig())
    groups = {g.group: g for g in count_groups(config, select(config, TrainableConfig()))}
    assert {name for name, g in groups.items() if g.trainable} == {"lora"}
    # 36 layers, rank 16: q 2048 -> 2048, k and v 2048 -> 256.
    assert groups["lora"].trainable == 36 * 16 * ((2048 + 2048) + 2 * (2048 + 256))
    plain = dataclasses.replace(BACKBONES["qwen2_5_omni_3b"], lora=LoraConfig())
    assert {g.group for g in count_groups(plain, select(plain, TrainableConfig())) if g.trainable} == {"lora", "head"}


@pytest.mark.jit
def test_all_three_losses_fall_on_the_second_backbone():
    """Every kind of step, each on its own batch again and again; only LoRA moves."""
    step = TrainStep(SECOND, recipe(), dtype=jnp.float32, compiler_options=QUICK)
    state, frozen = step.init(params(SECOND))
    assert all("lora_" in name for name in state.trainable)
    batches = [batch(LOSSES, update, clips=4, share_prefix=False, model=SECOND) for update in range(3)]
    assert batches[0].clips.beats.fbank.shape[3] == 0  # no BEATs, no filter bank on the devices
    seen = []
    for update in range(12):
        state, metrics = step(state, frozen, batches[update % 3])
        assert metrics.keys() >= {"L_T", "L_D", "L_A"} and int(metrics["skipped"]) == 0
        seen.append(float(metrics["loss"]))
    assert all(last < 0.9 * first for first, last in zip(seen[:3], seen[-3:], strict=True)), seen


@pytest.mark.jit
def test_mean_pooling_ignores_padding_and_company_in_a_training_row():
    """The single modalities share a row; the same prompts in longer rows give the same losses and gradient."""
    losses = {"temperature": 0.2, "weights": {"distillation": 1.0, "pairwise": 1.0}}
    step = TrainStep(SECOND, recipe(**losses), dtype=jnp.float32, compiler_options=QUICK)
    made = batch(LossConfig(**losses), clips=4, share_prefix=False, model=SECOND)
    rows = made.rows
    extra = [(0, 0)] * 3 + [(0, 32)]
    wide = {name: np.pad(getattr(rows, name), extra) for name in ("ids", "segment", "branch")}
    wide |= {"media_index": np.pad(rows.media_index, extra, constant_values=-1), "positions": np.pad(rows.positions, [(0, 0), *extra])}
    results = []
    for one in (made, dataclasses.replace(made, rows=dataclasses.replace(rows, **wide))):
        state, frozen = step.init(params(SECOND))
        results.append(step(state, frozen, one)[1])
    assert_close(results[1]["loss"], results[0]["loss"], "update_loss")
    assert_close(results[1]["grad_norm"], results[0]["grad_norm"], "gradient_norm")


def test_a_shared_prefix_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="attention is bidirectional, not causal"):
        batch(LOSSES, 0, clips=2, model=SECOND)


@pytest.mark.jit
def test_a_plain_thinker_trains_lora_and_its_fresh_head():
    step = TrainStep(PLAIN, recipe(), dtype=jnp.float32, compiler_options=QUICK)
    state, frozen = step.init(params(PLAIN))
    made = batch(LOSSES, 0, clips=4, model=PLAIN)
    seen = []
    for _ in range(4):
        state, metrics = step(state, frozen, made)
        seen.append({name: float(metrics[name]) for name in ("loss", "grad_norm/head")})
    assert seen[-1]["loss"] < seen[0]["loss"] and seen[-1]["grad_norm/head"] > 0


@pytest.mark.parametrize("name", ["omni_embed_nemotron_3b", "tiny_nemotron"])
def test_its_configs_plan_its_architecture(name):
    config = read_config(f"configs/{name}.py", [])
    model, _ = planned_model(config.model)
    assert (model.attention, model.pooling, model.prompt, model.beats) == ("bidirectional", "mean", "chat", None)
    assert config.data.resolved_preset().prefix == "passage"
    kind, shapes = planned_batch(model, config.data.resolved_preset(), kinds_of_update(0, 1, config.losses)[0])
    made = abstract_batch(model, kind, shapes, clips=4, micro_batches=1)
    assert made.hard is not None and made.clips.beats.fbank.shape[3] == 0  # a row of its own, though its media are the anchor's
