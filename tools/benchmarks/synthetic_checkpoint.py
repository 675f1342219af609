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
from omni_jax.conversion import engine
from omni_jax.conversion.torch_writer import TorchWriter
from omni_jax.conversion.weight_files import in_format
from omni_jax.io.safetensors_io import DTYPES, Writer

WIDTH, INNER, HEADS, KV_HEADS = 1536, 8960, 12, 2


def hf_config(layers: int, vocab: int) -> dict:
    """Returns a `config.json` with a decoder of this depth and vocabulary and towers of a few layers."""
    return {
        "architectures": ["Qwen2_5OmniThinkerForConditionalGeneration"],
        "audio_config": {
            "activation_function": "gelu",
            "d_model": 256,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 1024,
            "encoder_layers": 2,
            "max_source_positions": 1500,
            "n_window": 100,
            "num_mel_bins": 128,
            "output_dim": WIDTH,
        },
        "audio_end_token_id": 4,
        "audio_start_token_id": 3,
        "audio_token_index": 2,
        "pad_token_id": 0,
        "position_id_per_seconds": 25,
        "seconds_per_chunk": 2,
        "text_config": {
            "hidden_act": "silu",
            "hidden_size": WIDTH,
            "intermediate_size": INNER,
            "num_attention_heads": HEADS,
            "num_hidden_layers": layers,
            "num_key_value_heads": KV_HEADS,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default"},
            "rope_theta": 1e6,
            "vocab_size": vocab,
        },
        "video_token_index": 5,
        "vision_config": {
            "depth": 2,
            "fullatt_block_indexes": [1],
            "hidden_act": "silu",
            "hidden_size": 256,
            "in_channels": 3,
            "intermediate_size": 684,
            "num_heads": 4,
            "out_hidden_size": WIDTH,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
        },
        "vision_end_token_id": 7,
        "vision_start_token_id": 6,
    }


def write_tokenizer(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes a `tokenizer.json` that holds nothing but the control tokens of a `config.json`."""
    tokens = {
        "<|endoftext|>": "pad_token_id",
        "<|AUDIO|>": "audio_token_index",
        "<|audio_bos|>": "audio_start_token_id",
        "<|audio_eos|>": "audio_end_token_id",
        "<|VIDEO|>": "video_token_index",
        "<|vision_bos|>": "vision_start_token_id",
        "<|vision_eos|>": "vision_end_token_id",
    }
    added = [{"id": config[field], "content": token, "special": True} for token, field in tokens.items()]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": {"type": "BPE", "vocab": {}, "merges": []}}))


def write(folder: Path, gigabytes: float, shards: int = 6, vocab: int = 151936, seed: int = 0, file_format: str = "safetensors") -> int:
    """Writes a bfloat16 checkpoint of about this size in `shards` files, safetensors or "bin", and returns its bytes of weights.

    The values are random bits with finite exponents; the vocabulary has its real size unless told otherwise, and so have
    the largest tensors.
    """
    folder.mkdir(parents=True)
    layers = _layers(gigabytes, vocab)
    config = hf_config(layers, vocab)
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
