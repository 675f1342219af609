"""torch -> jax -> torch: equal key sets, equal bits, side files back."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from omni_jax import conversion
from omni_jax.conversion import engine
from omni_jax.conversion.folder import read_manifest
from omni_jax.model import carried_shapes
from tests.conversion import checkpoints
from tests.tolerances import assert_close

pytestmark = pytest.mark.jit


def assert_same_tensors(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert_close(got[name], want[name], "round_trip")


def test_golden_base_and_adapter_come_back(golden, tmp_path):
    made = conversion.to_jax(golden.checkpoint, tmp_path / "model", adapter=golden.adapter_dir)
    conversion.to_torch(tmp_path / "model", base_out=tmp_path / "base", adapter_out=tmp_path / "adapter")
    base, adapter = checkpoints.read_folder(golden.checkpoint), checkpoints.read_folder(golden.adapter_dir)
    assert_same_tensors(checkpoints.read_folder(tmp_path / "base"), base)
    assert_same_tensors(checkpoints.read_folder(tmp_path / "adapter"), adapter)
    # lm_head, predictor and audio_bos_eos_token take no part in embeddings and must come back all the same.
    assert {"lm_head.weight", "audio_tower.audio_bos_eos_token.weight"} <= base.keys()
    assert checkpoints.files(tmp_path / "base") == checkpoints.files(golden.checkpoint)
    assert checkpoints.files(tmp_path / "adapter") == checkpoints.files(golden.adapter_dir)
    index = "model.safetensors.index.json"
    assert (tmp_path / "base" / index).exists() == (golden.checkpoint / index).exists()
    if (golden.checkpoint / index).exists():
        assert (tmp_path / "base" / index).read_bytes() == (golden.checkpoint / index).read_bytes()
    tables = sum("relative_attention_bias" in name for name in base)
    assert made.tensors == len(base) + len(adapter) - (tables - 1)


def test_golden_parameters_are_the_torch_tensors(golden, tmp_path):
    """Names one leaf of each transform by hand, so that rules and export cannot be wrong together."""
    conversion.to_jax(golden.checkpoint, tmp_path / "model", adapter=golden.adapter_dir)
    config, params = conversion.load(tmp_path / "model")
    base, adapter = checkpoints.read_folder(golden.checkpoint), checkpoints.read_folder(golden.adapter_dir)
    layer = config.decoder.num_layers - 1
    pairs = {
        ("decoder", "embed", "embedding"): base["model.embed_tokens.weight"],
        ("audio", "conv1", "kernel"): base["audio_tower.conv1.weight"].transpose(2, 1, 0),
        ("vision", "patch_embed", "kernel"): base["visual.patch_embed.proj.weight"].reshape(config.vision.hidden_size, -1).T,
        ("beats", "pos_conv", "v"): base["beats.encoder.pos_conv.0.weight_v"].transpose(2, 1, 0),
        ("beats", "pos_conv", "g"): base["beats.encoder.pos_conv.0.weight_g"][0, 0],
        ("beats", "relative_bias", "embedding"): next(base[name] for name in base if "relative_attention_bias" in name),
    }
    for path, expected in pairs.items():
        assert_close(params[path], expected, "round_trip")
    q = params["decoder", "layers", "attn", "q", "kernel"]
    assert_close(q[layer], base[f"model.layers.{layer}.self_attn.q_proj.weight"].T, "round_trip")
    gate = params["beats", "layers", "attn", "gate_scale"]
    last = config.beats.num_layers - 1
    assert_close(gate[last], base[f"beats.encoder.layers.{last}.self_attn.grep_a"][0, :, 0, 0], "round_trip")
    saved = "base_model.model.classify_linear.0.weight"
    expected = adapter[saved] if saved in adapter else base["classify_linear.0.weight"]
    assert_close(params["head", "fc1", "kernel"], expected.T, "round_trip")
    assert params.keys() == engine.tree_shapes(config).keys() - carried_shapes(config).keys()


@pytest.mark.parametrize("table_layers", [[0], None, [1]])
def test_shared_table_is_written_as_it_was_stored(tmp_path, table_layers):
    weights = checkpoints.tensors(checkpoints.model_config(), table_layers=table_layers)
    base = checkpoints.write_base(tmp_path / "base", weights)
    beats_file(tmp_path / "base" / "BEATs.pt")
    conversion.to_jax(base, tmp_path / "model")
    conversion.to_torch(tmp_path / "model", base_out=tmp_path / "out")
    assert_same_tensors(checkpoints.read_folder(tmp_path / "out"), weights)
    _, params = conversion.load(tmp_path / "model")
    name = next(name for name in weights if "relative_attention_bias" in name)
    assert_close(params["beats", "relative_bias", "embedding"], weights[name], "round_trip")


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("beats", [{"conv_bias": True, "embed_dim": 24}, {"predictor_classes": 0}])
def test_variants_come_back_in_their_own_files(tmp_path, shards, beats):
    settings = dataclasses.replace(checkpoints.BEATS, **beats)
    weights = checkpoints.tensors(checkpoints.model_config(settings))
    weights |= {name: value.astype(np.float16) for name, value in weights.items() if name.startswith("beats.")}  # types may be mixed
    base = checkpoints.write_base(tmp_path / "base", weights, shards)
    beats_file(base / "BEATs.pt", settings)
    conversion.to_jax(base, tmp_path / "model")
    conversion.to_torch(tmp_path / "model", base_out=tmp_path / "out")
    assert checkpoints.files(tmp_path / "out") == checkpoints.files(base)
    for file in base.glob("*.safetensors"):
        assert_same_tensors(_one(tmp_path / "out" / file.name), _one(file))
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (shards > 1)


@pytest.mark.parametrize("indent", [None, 3])
def test_an_index_comes_back_as_it_was_written(tmp_path, indent):
    base = checkpoints.write_base(tmp_path / "base", checkpoints.tensors(checkpoints.model_config(), table_layers=[0]))
    beats_file(base / "BEATs.pt")
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text()) | {"extra": "é"}
    path.write_bytes(json.dumps(index, indent=indent, ensure_ascii=False).replace("\n", "\r\n").encode())
    conversion.to_jax(base, tmp_path / "model")
    conversion.to_torch(tmp_path / "model", base_out=tmp_path / "out")
    assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_large_tensors_are_read_in_rows_and_stored_in_pieces(tmp_path, monkeypatch):
    from omni_jax.conversion import importer, store

    monkeypatch.setattr(importer, "_BLOCK", 1000)
    monkeypatch.setattr(store, "PIECE_BYTES", 700)
    weights = checkpoints.tensors(checkpoints.model_config())
    base = checkpoints.write_base(tmp_path / "base", weights)
    beats_file(base / "BEATs.pt")
    conversion.to_jax(base, tmp_path / "model", part_bytes=4000)
    assert len(list((tmp_path / "model" / "weights").glob("part-*"))) > 10
    conversion.to_torch(tmp_path / "model", base_out=tmp_path / "out")
    assert_same_tensors(checkpoints.read_folder(tmp_path / "out"), weights)
    _, params = conversion.load(tmp_path / "model")
    assert_close(params["decoder", "embed", "embedding"], weights["model.embed_tokens.weight"], "round_trip")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype_casts_every_tensor(tmp_path, dtype):
    kind = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[dtype]
    source = {"bfloat16": np.float32, "float32": ml_dtypes.bfloat16}[dtype]
    weights = checkpoints.tensors(checkpoints.model_config(), dtype=source)
    base = checkpoints.write_base(tmp_path / "base", weights)
    beats_file(base / "BEATs.pt")
    conversion.to_jax(base, tmp_path / "model", dtype=dtype)
    conversion.to_torch(tmp_path / "model", base_out=tmp_path / "out")
    assert_same_tensors(checkpoints.read_folder(tmp_path / "out"), {name: value.astype(kind) for name, value in weights.items()})
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.size * np.dtype(kind).itemsize for value in weights.values())


@pytest.mark.parametrize("predictor", [0, 7])
def test_beats_override_replaces_weights_and_settings(tmp_path, predictor):
    weights = checkpoints.tensors(checkpoints.model_config(), table_layers=[0])
    base = checkpoints.write_base(tmp_path / "base", weights)
    settings = dataclasses.replace(checkpoints.BEATS, num_layers=2, max_distance=33, predictor_classes=predictor)
    ours = beats_file(tmp_path / "other.pt", settings)
    conversion.to_jax(base, tmp_path / "model", beats=tmp_path / "other.pt")
    assert read_manifest(tmp_path / "model").model.beats == settings
    conversion.to_torch(tmp_path / "model", base_out=tmp_path / "out")
    expected = {name: value for name, value in weights.items() if not name.startswith("beats.")}
    assert_same_tensors(checkpoints.read_folder(tmp_path / "out"), expected | {f"beats.{name}": value for name, value in ours.items()})


def test_beats_settings_default_to_the_published_ones(tmp_path):
    from omni_jax.config import BeatsConfig
    from omni_jax.conversion.source import model_config, open_checkpoint

    published = BeatsConfig(predictor_classes=0)
    weights = {"beats.encoder.layer_norm.weight": np.zeros(4, np.float32)}
    base = checkpoints.write_base(tmp_path / "base", weights)
    assert model_config(open_checkpoint(base)).beats == published


def beats_file(path, settings=checkpoints.BEATS):
    """Writes a BEATs `.pt` with these settings and random weights; returns the weights by the names in the file."""
    from tests.conversion.torch_files import write_torch_file

    config = checkpoints.model_config(settings)
    weights = checkpoints.tensors(config, dtype=np.float32, seed=5)
    weights = {name.removeprefix("beats."): value for name, value in weights.items() if name.startswith("beats.")}
    cfg = {
        "encoder_layers": settings.num_layers,
        "encoder_embed_dim": settings.hidden_size,
        "encoder_ffn_embed_dim": settings.intermediate_size,
        "encoder_attention_heads": settings.num_heads,
        "embed_dim": settings.embed_dim,
        "input_patch_size": settings.patch_size,
        "conv_pos": settings.conv_pos,
        "conv_pos_groups": settings.conv_pos_groups,
        "num_buckets": settings.num_buckets,
        "max_distance": settings.max_distance,
        "conv_bias": settings.conv_bias,
        "deep_norm": True,
        "gru_rel_pos": True,
        "relative_position_embedding": True,
        "finetuned_model": bool(settings.predictor_classes),
        "predictor_class": settings.predictor_classes or 527,
    }
    write_torch_file(path, {"cfg": cfg, "model": weights})
    return weights


def _one(file):
    from safetensors.numpy import load_file

    return load_file(file)
