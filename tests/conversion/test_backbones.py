"""Backbones other than WAVE: Omni-Embed-Nemotron, plain thinkers and full Qwen2.5-Omni checkpoints, there and back."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from omni_jax import conversion
from omni_jax.cli.main import main
from omni_jax.config import BACKBONES, EMBED_STYLE, LoraConfig, ModelConfig
from omni_jax.conversion import engine
from omni_jax.conversion.adapter import default_config
from omni_jax.conversion.folder import read_manifest
from omni_jax.types import InputError
from tests import golden_set
from tests.conversion import checkpoints
from tests.conversion.test_round_trip import assert_same_tensors, beats_file
from tests.golden_set import GoldenSet
from tests.tolerances import assert_close

HEAD = {f"classify_linear.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}


def thinker(**changes) -> dict:
    """Returns the `config.json` of a plain thinker."""
    config: dict[str, Any] = checkpoints.tiny_config() | {"model_type": "qwen2_5_omni_thinker"} | changes
    config["audio_config"] = {k: v for k, v in config["audio_config"].items() if k != "beats_path"}
    return config


def weights(seed: int = 0) -> checkpoints.Tensors:
    style = dataclasses.replace(ModelConfig.from_hf(thinker(), None), **EMBED_STYLE)
    return checkpoints.tensors(style, seed=seed)


def full_checkpoint(folder: Path) -> checkpoints.Tensors:
    """Writes a Qwen2.5-Omni checkpoint with all its parts, its last shard all speech; returns the tensors of its thinker as named there."""
    kept = {f"thinker.{name}": value for name, value in weights().items()}
    spoken = {f"{part}.model.layers.0.weight": np.ones((3, 5), np.float32) for part in ("talker", "token2wav")}
    whole = {"model_type": "qwen2_5_omni", "thinker_config": thinker(), "talker_config": {"hidden_size": 4}, "token2wav_config": {}}
    checkpoints.write_base(folder, kept | {"talker.codec_head.weight": np.ones((2, 2), np.float32)}, 2, thinker())
    (folder / "config.json").write_text(json.dumps(whole))
    save_file(spoken, folder / "model-00003-of-00003.safetensors", {"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(spoken, "model-00003-of-00003.safetensors")
    index["metadata"]["total_size"] += sum(value.nbytes for value in spoken.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return kept


def test_3b_tree_maps_one_to_one_onto_the_manifest():
    manifest = {name: tuple(shape) for name, shape in golden_set.manifest_7b("nemotron3b").items()}
    config = BACKBONES["omni_embed_nemotron_3b"]
    entries = engine.base_entries(config)
    assert {name: entry.torch_shape for name, entry in entries.items()} == manifest
    assert len({entry.stored for entry in entries.values()}) == len(manifest) == 1_442
    shapes = engine.tree_shapes(config)
    assert {entry.path for entry in entries.values()} == set(shapes)
    assert sum(map(math.prod, manifest.values())) == sum(map(math.prod, shapes.values())) == 4_703_464_448


def test_plain_thinkers_are_wave_without_what_wave_adds():
    wave, plain = engine.base_entries(BACKBONES["wave_7b"]), engine.base_entries(BACKBONES["qwen2_5_omni_7b"])
    added = ("beats.", "beats_ln.", "beats_proj.")
    assert {name: e.torch_shape for name, e in plain.items()} == {n: e.torch_shape for n, e in wave.items() if not n.startswith(added)}
    small, nemotron = (engine.base_entries(BACKBONES[name]) for name in ("qwen2_5_omni_3b", "omni_embed_nemotron_3b"))
    assert small.keys() - nemotron.keys() == HEAD


def test_golden_nemotron_comes_back(golden_nemotron: GoldenSet, tmp_path: Path):
    made = conversion.to_jax(golden_nemotron.checkpoint, tmp_path / "model")
    conversion.to_torch(tmp_path / "model", base_out=tmp_path / "base")
    tensors = checkpoints.read_folder(golden_nemotron.checkpoint)
    assert_same_tensors(checkpoints.read_folder(tmp_path / "base"), tensors)
    assert checkpoints.files(tmp_path / "base") == checkpoints.files(golden_nemotron.checkpoint)
    assert (made.tensors, made.fresh) == (len(tensors), ())


@pytest.mark.costly
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", ["nvomniembed", "thinker"])
def test_sharded_and_single_folders_come_back(tmp_path: Path, kind: str, shards: int):
    config = thinker(model_type="nvomniembed") if kind == "nvomniembed" else thinker()
    base = checkpoints.write_base(tmp_path / "base", weights(), shards, config)
    conversion.to_jax(base, tmp_path / "model", backbone="auto" if kind == "nvomniembed" else "nemotron")
    model = read_manifest(tmp_path / "model").model
    assert (model.attention, model.pooling, model.prompt, model.beats) == ("bidirectional", "mean", "chat", None)
    conversion.to_torch(tmp_path / "model", base_out=tmp_path / "back")
    assert_same_tensors(checkpoints.read_folder(tmp_path / "back"), weights())
    for file in base.glob("*.json"):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.jit
def test_a_plain_thinker_gets_a_fresh_head_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = checkpoints.write_base(tmp_path / "base", weights(), 2, thinker())
    assert main(["convert", "to-jax", "--base", str(base), "--out", str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"freshly initialised, because {base} has none: classify_linear;")
    model, params = conversion.load(tmp_path / "model")
    assert (model.attention, model.pooling, model.prompt, model.audio_repeat) == ("causal", "last_all_layers", "plain", 1)
    kernel = np.asarray(params["head", "fc1", "kernel"], np.float32)
    assert 0.015 < kernel.std() < 0.025 and not np.any(params["head", "fc1", "bias"])
    assert read_manifest(tmp_path / "model").fresh == ("classify_linear",)
    # What was drawn here is not written into the base; the same comes out of every conversion.
    conversion.to_torch(tmp_path / "model", base_out=tmp_path / "back")
    assert_same_tensors(checkpoints.read_folder(tmp_path / "back"), weights())
    conversion.to_jax(base, tmp_path / "again")
    assert read_manifest(tmp_path / "again").base_digest == read_manifest(tmp_path / "model").base_digest


@pytest.mark.jit
def test_a_plain_thinker_with_beats_gets_a_fresh_bridge_too(tmp_path: Path):
    base = checkpoints.write_base(tmp_path / "base", weights(), 1, thinker())
    beats_file(tmp_path / "BEATs.pt")
    made = conversion.to_jax(base, tmp_path / "model", beats=tmp_path / "BEATs.pt")
    assert made.fresh == ("classify_linear", "beats_ln", "beats_proj")
    model, params = conversion.load(tmp_path / "model")
    assert model.audio_repeat == 2
    assert_close(np.asarray(params["bridge", "norm", "scale"], np.float32), np.ones(model.beats.hidden_size, np.float32), "round_trip")
    with pytest.raises(InputError, match="no BEATs"):
        conversion.to_jax(base, tmp_path / "other", beats=tmp_path / "BEATs.pt", backbone="nemotron")


@pytest.mark.jit
def test_a_full_checkpoint_is_stripped_and_its_speech_dropped(tmp_path: Path):
    kept = full_checkpoint(tmp_path / "omni")
    made = conversion.to_jax(tmp_path / "omni", tmp_path / "model", backbone="nemotron")
    assert made.tensors == len(kept)
    _, params = conversion.load(tmp_path / "model")
    assert_close(params["decoder", "norm", "scale"], kept["thinker.model.norm.weight"], "round_trip")
    conversion.to_torch(tmp_path / "model", base_out=tmp_path / "back")
    assert_same_tensors(checkpoints.read_folder(tmp_path / "back"), kept)
    assert {file.name for file in (tmp_path / "back").glob("*.safetensors")} == {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == kept.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in kept.values())
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "omni" / "config.json").read_bytes()


def test_a_full_checkpoint_with_an_unknown_part_is_refused(tmp_path: Path):
    full_checkpoint(tmp_path / "omni")
    file = tmp_path / "omni" / "model-00003-of-00003.safetensors"
    save_file(load_file(file) | {"listener.weight": np.ones(2, np.float32)}, file, {"format": "pt"})
    (tmp_path / "omni" / "model.safetensors.index.json").unlink()
    merged = {}
    for part in sorted((tmp_path / "omni").glob("*.safetensors")):
        merged |= load_file(part)
        part.unlink()
    save_file(merged, tmp_path / "omni" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"1 unknown \(listener.weight\)"):
        conversion.to_jax(tmp_path / "omni", tmp_path / "model")


def test_an_adapter_without_heads_names_none(tmp_path: Path):
    """`modules_to_save` of an exported adapter lists what the backbone has."""
    config = dataclasses.replace(ModelConfig.from_hf(thinker(model_type="nvomniembed"), None), lora=LoraConfig(rank=2))
    assert default_config(config)["modules_to_save"] is None
    base = checkpoints.write_base(tmp_path / "base", weights(), 1, thinker(model_type="nvomniembed"))
    adapter = checkpoints.write_adapter(tmp_path / "adapter", config)
    conversion.to_jax(base, tmp_path / "model", adapter=adapter)
    conversion.to_torch(tmp_path / "model", adapter_out=tmp_path / "back")
    assert_same_tensors(checkpoints.read_folder(tmp_path / "back"), checkpoints.read_folder(adapter))
