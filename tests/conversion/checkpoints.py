"""Small random checkpoints and adapters, in every variant the converters accept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from omni_jax.config import BeatsConfig, LoraConfig, ModelConfig
from omni_jax.conversion import engine
from omni_jax.conversion.adapter import adapter_entries, default_config
from omni_jax.conversion.export_readme import README
from tools.benchmarks.synthetic_checkpoint import config_json, write_tokenizer

BEATS = BeatsConfig(
    num_layers=3,
    hidden_size=24,
    intermediate_size=40,
    num_heads=3,
    embed_dim=16,
    conv_pos=8,
    conv_pos_groups=4,
    num_buckets=12,
    predictor_classes=5,
)
LORA = LoraConfig(rank=3, alpha=8.0)
Tensors = dict[str, np.ndarray]


def tiny_config() -> dict[str, Any]:
    """Returns the `config.json` of a checkpoint of about 30,000 values."""
    config = config_json(layers=2, vocab=40)
    config["text_config"] |= {"hidden_size": 32, "intermediate_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1}
    config["text_config"]["rope_scaling"] = {"mrope_section": [2, 3, 3], "rope_type": "default"}
    config["audio_config"] |= {"d_model": 12, "encoder_attention_heads": 2, "encoder_ffn_dim": 20, "output_dim": 32}
    config["audio_config"] |= {"beats_path": "/training/machine/BEATs.pt"}
    config["vision_config"] |= {"hidden_size": 8, "intermediate_size": 12, "num_heads": 2, "out_hidden_size": 32}
    return config


def model_config(beats: BeatsConfig = BEATS, lora: LoraConfig | None = None) -> ModelConfig:
    return dataclasses.replace(ModelConfig.from_hf(tiny_config(), beats), lora=lora)


def tensors(config: ModelConfig, dtype: Any = ml_dtypes.bfloat16, table_layers: Iterable[int] | None = None, seed: int = 0) -> Tensors:
    """Returns random weights by torch name; the shared table stands in `table_layers` (default: all)."""
    rng = np.random.default_rng(seed)
    made: Tensors = {}
    table: np.ndarray | None = None
    wanted = None if table_layers is None else {f".layers.{layer}." for layer in table_layers}
    for key, entry in engine.base_entries(config).items():
        if entry.shared and wanted is not None and not any(part in key for part in wanted):
            continue
        value = rng.standard_normal(entry.torch_shape).astype(dtype)
        if entry.shared:
            table = value = value if table is None else table
        made[key] = value
    return made


def write_base(folder: Path, weights: Mapping[str, np.ndarray], shards: int = 2, config: Mapping[str, Any] | None = None) -> Path:
    """Writes a checkpoint folder with a few side files; one file without an index where `shards` is 1. Returns the folder."""
    (folder / "assets").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or tiny_config(), indent=1))
    write_tokenizer(folder, config or tiny_config())
    (folder / "modeling_wave.py").write_text("raise RuntimeError('remote code is copied, never run')\n")
    (folder / "assets" / "README.md").write_text("# side file in a subfolder\n")
    names = sorted(weights)
    if shards == 1:
        save_file({name: weights[name] for name in names}, folder / "model.safetensors", {"format": "pt"})
        return folder
    placed = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        members = names[number::shards]
        save_file({name: weights[name] for name in members}, folder / file, {"format": "pt"})
        placed |= dict.fromkeys(members, file)
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_adapter(
    folder: Path,
    config: ModelConfig,
    settings: Mapping[str, Any] | None = None,
    keep: Callable[[str], bool] = lambda name: True,
    dtype: Any = np.float32,
    seed: int = 1,
) -> Path:
    """Writes a PEFT adapter folder for `config.lora`, with `settings` over its adapter_config.json and the tensors that `keep` wants."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    entries = adapter_entries(config)
    weights = {name: rng.standard_normal(entry.torch_shape).astype(dtype) for name, entry in entries.items() if keep(name)}
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(default_config(config) | dict(settings or {})))
    (folder / "README.md").write_text("# adapter\n")
    return folder


def read_folder(folder: Path) -> Tensors:
    """Returns every tensor of a folder's safetensors files, read by the safetensors package."""
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def files(folder: Path, *, weights: bool = False) -> dict[str, bytes]:
    """Returns relative name -> content of a folder's files but the page of an export, without weights and index unless asked for."""
    names = [path for path in folder.rglob("*") if path.is_file() and path.name != README]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in names
        if weights or not (path.suffix in (".safetensors", ".bin") or path.name.endswith(".index.json"))
    }
