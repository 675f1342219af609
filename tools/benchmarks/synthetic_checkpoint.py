"""Random WAVE checkpoints of a wanted size, written tensor by tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from omni_jax.config import BeatsConfig, ModelConfig
from omni_jax.config.components import CONTROL_TOKENS
from omni_jax.config.hf_fields import TOKEN_NAMES
from omni_jax.conversion import engine
from omni_jax.conversion.fresh import hf_config, model_config
from omni_jax.conversion.torch_writer import TorchWriter
from omni_jax.conversion.weight_files import in_format
from omni_jax.io.safetensors_io import DTYPES, Writer

WIDTH, INNER, HEADS, KV_HEADS = 1536, 8960, 12, 2


def config_json(layers: int, vocab: int) -> dict:
    """Returns a `config.json` with a decoder of this depth and vocabulary and towers of a few layers."""
    tower = {"hidden_size": 256, "num_layers": 2, "num_heads": 4}
    decoder = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_layers": layers, "num_heads": HEADS, "num_kv_heads": KV_HEADS}
    architecture = {
        "decoder": decoder,
        "vision": {**tower, "intermediate_size": 684, "full_attention_layers": (1,)},
        "audio": {**tower, "intermediate_size": 1024},
        "beats": None,
    }
    ids = {"pad": 0, "audio": 2, "audio_bos": 3, "audio_eos": 4, "video": 5, "vision_bos": 6, "vision_eos": 7}
    return hf_config(model_config(architecture, {CONTROL_TOKENS[field]: number for field, number in ids.items()}, vocab, None))


def write_tokenizer(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes a `tokenizer.json` that holds nothing but the control tokens of a `config.json`."""
    added = [{"id": config[field], "content": CONTROL_TOKENS[name], "special": True} for name, field in TOKEN_NAMES.items()]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": {"type": "BPE", "vocab": {}, "merges": []}}))


def write(folder: Path, gigabytes: float, shards: int = 6, vocab: int = 151936, seed: int = 0, file_format: str = "safetensors") -> int:
    """Writes a bfloat16 checkpoint of about this size in `shards` files, safetensors or "bin", and returns its bytes of weights.

    The values are random bits with finite exponents; the vocabulary has its real size unless told otherwise, and so have
    the largest tensors.
    """
    folder.mkdir(parents=True)
    layers = _layers(gigabytes, vocab)
    config = config_json(layers, vocab)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, config)
    entries = engine.base_entries(ModelConfig.from_hf(config, BeatsConfig()))
    tensors = [(name, "BF16", entry.torch_shape) for name, entry in sorted(entries.items())]
    total = sum(_nbytes(shape) for _, _, shape in tensors)
    files: list[list] = [[] for _ in range(shards)]
    done = 0
    for tensor in tensors:
        files[min(done * shards // total, shards - 1)].append(tensor)
        done += _nbytes(tensor[2])
    rng = np.random.default_rng(seed)
    table = np.zeros(0)
    placed = {}
    for number, members in enumerate(files, 1):
        name = in_format(f"model-{number:05d}-of-{shards:05d}.safetensors", file_format)
        path = epath.Path(folder / name)
        with TorchWriter(path, members) if file_format == "bin" else Writer(path, members, {"format": "pt"}) as writer:
            for key, _, shape in members:
                bits = rng.integers(0, 65536, shape, np.uint16)
                bits &= 0xBFFF  # exponents below 128: finite
                if entries[key].shared:
                    table = bits = table if table.size else bits
                writer.write(key, bits.view(DTYPES["BF16"]))
                placed[key] = name
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / in_format("model.safetensors.index.json", file_format)).write_text(json.dumps(index))
    return total


def _layers(gigabytes: float, vocab: int) -> int:
    """Returns the decoder depth that comes nearest to the size: embedding, lm_head and towers are fixed, a layer and its head rows vary."""
    per_layer = 2 * (3 * WIDTH * INNER + 2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH * KV_HEADS // HEADS + WIDTH * WIDTH)
    fixed = 2 * (2 * vocab * WIDTH + 100_000_000)
    return max(1, round((gigabytes * 1e9 - fixed) / per_layer))


def _nbytes(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)
