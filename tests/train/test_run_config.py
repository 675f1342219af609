"""Configs become frozen records: every one loads, every field is read, and what is wrong is named."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import math
from typing import Any

import pytest

from omni_jax.config import ConfigError
from omni_jax.configs import omniretriever_7b, paper_ablations, tiny
from omni_jax.train import run_config
from omni_jax.train.plan import LossConfig
from omni_jax.train.run_config import RunConfig
from tests import repository


def test_every_config_is_a_run() -> None:
    for file in repository.sources("configs"):
        if file.name != "__init__.py":
            RunConfig.from_config(importlib.import_module(repository.module_name(file)).get_config())


def test_every_field_of_a_run_is_read_somewhere() -> None:
    fields = {
        (getattr(record, "__name__", ""), f.name)
        for record in vars(run_config).values()
        if dataclasses.is_dataclass(record) and record.__module__ == run_config.__name__
        for f in dataclasses.fields(record)
    }
    read: set[str] = set()
    for file in repository.sources("omni_jax"):
        read |= {n.attr for n in repository.nodes(file) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    assert not sorted(f"{owner}.{name}" for owner, name in fields if name not in read)


def test_a_run_survives_json() -> None:
    for made in (omniretriever_7b.get_config(), tiny.get_config()):
        run = RunConfig.from_config(made)
        assert RunConfig.from_config(json.loads(json.dumps(run.to_json()))).to_json() == run.to_json()


def test_the_published_recipe() -> None:
    run = RunConfig.from_config(omniretriever_7b.get_config())
    step = run.step_config(run.total_steps(4000))
    assert (run.batch.clips, step.optimizer.total_steps, step.optimizer.warmup) == (256, 4000, 120)
    assert (step.optimizer.learning_rate, step.optimizer.weight_decay, step.optimizer.clip_norm, run.seed) == (1e-5, 0.01, 1.0, 2025)
    assert run.model.lora is not None and (run.model.lora.rank, run.model.lora.scale, run.model.lora.dropout) == (16, 2.0, 0.05)


@pytest.mark.parametrize(
    ("name", "weights"),
    [("L_A", {"pairwise": 1}), ("L_A+L_D", {"distillation": 1, "pairwise": 1}), ("all", {"tuple": 1, "distillation": 1, "pairwise": 1})],
)
def test_ablations_differ_in_the_weights_alone(name: str, weights: dict[str, int]) -> None:
    run, whole = (RunConfig.from_config(paper_ablations.get_config(n)) for n in (name, "all"))
    assert run.losses.weights == weights
    assert dataclasses.replace(run, losses=whole.losses) == whole
    with pytest.raises(ConfigError, match="choose one of"):
        paper_ablations.get_config("L_X")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"bse": "x"}}, r"config field model\.bse: unknown; choose among base, "),
        ({"colour": 1}, r"config field colour: unknown"),
        ({"batch": {"micro_batch": "many"}}, r"config field batch\.micro_batch='many': must be a whole number"),
        ({"batch": {"micro_batch": True}}, r"config field batch\.micro_batch=True: must be a whole number"),
        ({"batch": {}}, r"config field batch\.micro_batch: missing"),
        ({"batch": {"micro_batch": 6, "blocks": 4}}, r"batch\.blocks=4: must divide"),
        ({"losses": {"temperature": -1.0}}, r"temperature=-1\.0: must be positive"),
        ({"losses": {"hard_weight": 0.0}}, r"hard_weight=0\.0: must be positive"),
        ({"losses": {"weights": {"triple": 1.0}}}, r"weights\.triple: unknown; choose among tuple, distillation, pairwise, joint, siglip"),
        ({"losses": {"weights": {"tuple": "much"}}}, r"weights\.tuple='much': must be a number"),
        ({"losses": {"weights": {"tuple": 0.0}}}, "must not be negative, and one at least must be positive"),
        ({"losses": {"scalars": {"siglip_bias": -1.0}}}, r"scalars\.siglip_bias: unknown; choose among none"),
        ({"losses": {"pairs": "some"}}, r"pairs='some': choose one of cycle, all"),
        ({"optimizer": {"total_steps": 9}}, r"config field optimizer\.total_steps: unknown"),
        ({"optimizer": {"learning_rate": "fast"}}, r"config field optimizer\.learning_rate='fast': must be a number"),
        ({"steps": 0}, "steps and epochs: give one"),
        ({"epochs": 1.0}, "steps and epochs: give one"),
        ({"trainable": {"freeze": "vision"}}, r"config field trainable\.freeze='vision': must be a list"),
        ({"data": {"train": "x", "preset_fields": {"frames": 3}}}, r"frames=3: must be even"),
        ({"data": {"train": "x", "preset_fields": {"frame": 4}}}, r"config field data\.preset_fields\.frame: unknown"),
        ({"data": {"train": ""}}, r"config field data\.train: empty"),
        ({"data": 3}, "config data: must hold fields"),
        ({"model": {"base": "", "architecture": None}}, r"model\.base and model\.architecture: give one"),
        ({"model": {"base": "x", "dtype": "float16"}}, r"model\.dtype='float16': choose one of"),
        ({"remat": "some"}, "remat 'some': choose one of"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(changes: dict[str, Any], message: str) -> None:
    values = tiny.get_config().to_dict() | changes
    with pytest.raises(ConfigError, match=message) as caught:
        RunConfig.from_config(values)
    assert "\n" not in str(caught.value)


def test_the_old_names_of_loss_weights_are_read() -> None:
    values = tiny.get_config().to_dict()
    del values["losses"]["weights"]
    run = RunConfig.from_config(values | {"losses": {**values["losses"], "tuple_weight": 0.0, "pairwise_weight": 2.0}})
    assert run.losses.weights == {"distillation": 1.0, "pairwise": 2.0}
    twice = {"weights": {"tuple": 1.0}, "tuple_weight": 1.0}
    with pytest.raises(ConfigError, match=r"tuple_weight and weights\.tuple are one; give weights\.tuple alone"):
        RunConfig.from_config(values | {"losses": twice})


def test_a_loss_of_weight_zero_is_one_that_is_not_named() -> None:
    assert LossConfig({"pairwise": 1, "tuple": 0, "siglip": 0.0}) == LossConfig({"pairwise": 1.0})
    assert LossConfig({"siglip": 1}).trained == {"loss/siglip_bias": -10.0} and not LossConfig().trained
    learned = LossConfig({"pairwise": 1, "siglip": 1}, learn_temperature=True, scalars={"siglip_bias": -2}).trained
    assert learned == {"loss/log_inverse_temperature": -math.log(0.01), "loss/siglip_bias": -2.0}
