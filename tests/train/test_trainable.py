"""What trains, what stays, and when a run refuses to start."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.config import ConfigError
from omni_jax.train import TrainableConfig, report
from omni_jax.train.trainable import count_groups, group_of, join, select, split
from omni_jax.types import InputError
from tests.model.builders import SEVEN_B
from tests.train.random_batches import MODEL, weights

CARRIED = 152_064 * 3584 + 2 * 3584 + (768 + 1) * 527
"""Values of the released model that no embedding depends on: lm_head, two audio tokens, the BEATs predictor."""


def test_the_adapter_recipe_trains_what_the_release_trained():
    names = select(SEVEN_B, TrainableConfig())
    groups = {g.group: g for g in count_groups(SEVEN_B, names)}
    assert sum(g.trainable for g in groups.values()) == 395_001_344  # SPEC section 1
    assert groups["lora"].trainable == 6_881_280 and groups["lora"].frozen == 0
    assert {g for g, count in groups.items() if count.trainable} == {"lora", "head", "bridge"}
    assert sum(g.trainable + g.frozen for g in groups.values()) == 9_417_532_287 - CARRIED


@pytest.mark.jit
def test_the_report_names_every_group_and_the_total():
    text = report(count_groups(SEVEN_B, select(SEVEN_B, TrainableConfig())))
    names = [line.split()[1] for line in text.splitlines() if line.startswith("| ")]
    assert "395,001,344" in text.splitlines()[-2] and names[-1] == "total"
    assert names[1:-1] == sorted({group_of("/".join(p)) for p in weights()}, key=text.index)


@pytest.mark.jit
def test_everything_trains_and_nothing_is_there_that_no_embedding_reads():
    names = select(MODEL, TrainableConfig(recipe="all"))
    assert {"/".join(p) for p in weights()} == names
    assert not [n for n in names if n.startswith(("lm_head/", "audio/bos_eos/", "beats/predictor/"))]


def test_parts_can_be_frozen():
    names = select(MODEL, TrainableConfig(recipe="all", freeze=("beats", "decoder/embed")))
    assert not any(n.startswith(("beats/", "decoder/embed/")) for n in names)
    assert any(n.startswith("decoder/layers/") for n in names)


def test_a_head_that_should_train_and_would_not_stops_the_run():
    for place, name in (("head", "classify_linear"), ("bridge/norm", "beats_ln"), ("bridge/fc2", "beats_proj")):
        with pytest.raises(InputError, match=name):
            select(MODEL, TrainableConfig(freeze=(place,)))
        with pytest.raises(InputError, match=name):
            select(MODEL, TrainableConfig(recipe="all", freeze=(place,)))


def test_a_head_that_the_adapter_would_lose_stops_the_run():
    assert MODEL.lora is not None
    lora = dataclasses.replace(MODEL.lora, modules_to_save=("classify_linear", "beats_proj"))
    with pytest.raises(InputError, match=r"beats_ln .* exported adapter would lose it"):
        select(dataclasses.replace(MODEL, lora=lora), TrainableConfig())


def test_the_adapter_recipe_needs_lora():
    with pytest.raises(InputError, match="no LoRA parameter"):
        select(dataclasses.replace(MODEL, lora=None), TrainableConfig())
    with pytest.raises(InputError, match="no LoRA parameter"):
        select(MODEL, TrainableConfig(freeze=("decoder/layers/attn",)))


@pytest.mark.jit
def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="decoder/layer"):
        select(MODEL, TrainableConfig(freeze=("decoder/layer",)))
    with pytest.raises(ConfigError, match="lora"):
        TrainableConfig(recipe="lora")
    with pytest.raises(ValueError, match="no/such"):
        split(weights(), ["no/such"])


@pytest.mark.jit
def test_split_and_join_are_inverse():
    names = select(MODEL, TrainableConfig())
    trainable, frozen = split(weights(), names)
    assert trainable.keys() == names and not trainable.keys() & frozen.keys()
    back = join(trainable, frozen)
    assert back.keys() == weights().keys()
    assert all(np.array_equal(back[path], weights()[path]) for path in weights())


@pytest.mark.jit
def test_frozen_weights_stay_in_bfloat16_and_trainable_ones_in_float32():
    params = {path: x.astype(jnp.bfloat16) for path, x in weights().items()}
    trainable, frozen = split(params, select(MODEL, TrainableConfig()))
    assert {x.dtype for x in trainable.values()} == {jnp.dtype(jnp.float32)}
    assert {x.dtype for x in frozen.values()} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in split(weights(), [], "bfloat16")[1].values()} == {jnp.dtype(jnp.bfloat16)}


def test_lora_on_what_is_no_linear_map_stops_the_run():
    for targets in (("decoder/layers/attn/q", "decoder/layers/attn/qkv"), ("q_proj",), ("decoder/layers/norm_attn",)):
        config = dataclasses.replace(MODEL, lora=dataclasses.replace(MODEL.lora, targets=targets))
        with pytest.raises(InputError, match=rf"lora.targets names {targets[-1]}, no linear map .* choose among decoder/layers/attn/k, "):
            select(config, TrainableConfig(recipe="all"))
