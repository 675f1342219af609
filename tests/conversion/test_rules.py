import dataclasses
import math

import pytest

from omni_jax.config import AudioConfig, BeatsConfig, DecoderConfig, LoraConfig, ModelConfig, SpecialTokens, VisionConfig
from omni_jax.conversion import engine
from omni_jax.conversion.adapter import adapter_entries
from omni_jax.conversion.rules import base_rules
from tests import golden_set
from tests.conversion import checkpoints

WAVE_7B = ModelConfig(
    decoder=DecoderConfig(3584, 18944, 28, 28, 4, 152064),
    vision=VisionConfig(1280, 3420, 32, 16, 3584, (7, 15, 23, 31)),
    audio=AudioConfig(1280, 5120, 32, 20, 3584),
    beats=BeatsConfig(),
    tokens=SpecialTokens(0, 1, 2, 3, 4, 5, 6),
)
TABLE = 320 * 12  # values of the relative-attention table


def test_7b_tree_maps_one_to_one_onto_the_manifest():
    manifest = {name: tuple(shape) for name, shape in golden_set.manifest_7b("wave7b").items()}
    entries = engine.base_entries(WAVE_7B)
    assert {name: entry.torch_shape for name, entry in entries.items()} == manifest
    # One-to-one: each stored array comes from one tensor, but for the table that all BEATs layers share.
    stored = {entry.stored for entry in entries.values()}
    assert len(stored) == len(manifest) - (WAVE_7B.beats.num_layers - 1)
    shapes = engine.tree_shapes(WAVE_7B)
    assert {entry.path for entry in entries.values()} == set(shapes)
    assert sum(map(math.prod, manifest.values())) == 9_410_693_247
    assert sum(map(math.prod, shapes.values())) == 9_410_693_247 - 11 * TABLE


def test_7b_adapter_maps_one_to_one_onto_the_manifest():
    manifest = {name: tuple(shape) for name, shape in golden_set.manifest_7b("adapter7b").items()}
    config = dataclasses.replace(WAVE_7B, lora=LoraConfig())
    entries = adapter_entries(config)
    assert {name: entry.torch_shape for name, entry in entries.items()} == manifest
    assert len({entry.stored for entry in entries.values()}) == len(manifest) == 178
    assert sum(map(math.prod, manifest.values())) == 395_001_344
    lora = {path: shape for path, shape in engine.tree_shapes(config).items() if path[-1].startswith("lora_")}
    assert sum(map(math.prod, lora.values())) == 6_881_280
    base = sum(map(math.prod, engine.tree_shapes(WAVE_7B).values()))
    assert base + sum(map(math.prod, lora.values())) == 9_417_532_287  # the published count


@pytest.mark.parametrize(
    "changes",
    [{"conv_bias": True}, {"predictor_classes": 0}, {"embed_dim": 24}, {"embed_dim": 24, "conv_bias": True, "predictor_classes": 0}],
)
def test_optional_beats_parts_follow_the_configuration(changes):
    config = checkpoints.model_config(dataclasses.replace(checkpoints.BEATS, **changes))
    names = set(engine.base_entries(config))
    assert ("beats.patch_embedding.bias" in names) == config.beats.conv_bias
    assert ("beats.predictor.weight" in names) == bool(config.beats.predictor_classes)
    assert ("beats.post_extract_proj.weight" in names) == (config.beats.embed_dim != config.beats.hidden_size)


def test_every_linear_kernel_can_carry_lora():
    base = checkpoints.model_config()
    targets = tuple(rule.module for rule in base_rules(base) if rule.linear)
    config = dataclasses.replace(base, lora=LoraConfig(rank=2, targets=targets))
    assert {entry.path[:-1] for entry in engine.lora_entries(config).values()} == {tuple(target.split("/")) for target in targets}


def test_a_rule_without_a_leaf_is_a_fault(monkeypatch):
    config = checkpoints.model_config()
    monkeypatch.setattr(engine, "base_rules", lambda config: base_rules(config)[1:])
    with pytest.raises(ValueError, match=r"leaves without a rule.*embed"):
        engine.base_entries(config)
