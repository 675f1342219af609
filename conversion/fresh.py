"""A converted folder of fresh random weights: what a small model starts from when there is no checkpoint to convert.

The folder is of the layout that `to_jax` writes, with a `config.json` and tokenizer files of WAVE's kind beside the weights, so that
whatever reads, trains or exports a converted checkpoint does the same here.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import pickle
import time
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

from omni_jax.config import (
    EMBED_MODEL_TYPE,
    EMBED_STYLE,
    AudioConfig,
    BeatsConfig,
    ConfigError,
    DecoderConfig,
    LoraConfig,
    ModelConfig,
    SpecialTokens,
    VisionConfig,
)
from omni_jax.config.components import CONTROL_TOKENS
from omni_jax.config.hf_fields import BEATS_FIXED, BEATS_NAMES, NAMES, TOKEN_NAMES
from omni_jax.conversion import engine, folder
from omni_jax.conversion.adapter import CONFIG, WEIGHTS, adapter_entries, default_config, write_config
from omni_jax.conversion.engine import Entry
from omni_jax.conversion.folder import Manifest, TensorFile
from omni_jax.conversion.fresh_tokenizer import train_tokenizer
from omni_jax.conversion.importer import Summary
from omni_jax.conversion.processor_settings import preprocessor_config
from omni_jax.conversion.store import StoreWriter
from omni_jax.conversion.weight_files import SINGLE
from omni_jax.types import InputError

BEATS_FILE = "BEATs.pt"
_SECTIONS = {"decoder": DecoderConfig, "vision": VisionConfig, "audio": AudioConfig, "beats": BeatsConfig}
_PLAIN_FIELDS = ("positions_per_second", "seconds_per_chunk", *EMBED_STYLE)
_EMBEDDING_SCALE = 0.5


def write_fresh(
    out: epath.PathLike, architecture: Mapping[str, Any], *, captions: Iterable[str], seed: int = 0, lora: LoraConfig | None = None
) -> Summary:
    """Writes the converted folder `out` with random float32 weights; it appears under its name only when complete.

    Args:
      out: new folder.
      architecture: {"decoder": {...}, "vision": {...}, "audio": {...}, "beats": {...}}, each with fields of the record of that name in
        `omni_jax.config`, "beats": None for a backbone without; the vocabulary follows from the tokenizer, the towers' `output_size` from
        the decoder. May hold those of `ModelConfig` that are no records: `positions_per_second`, `attention`, `pooling` ...
      seed: of the weights; the same seed gives the same weights.
      captions: texts to train a byte-level BPE vocabulary on.
      lora: adapter, at its usual start (B zero), kept apart from the base.

    Raises:
      InputError: a field that is unknown or does not fit, or an `out` that exists.
    """
    started = time.monotonic()
    with folder.new_folder(out) as temporary:
        ids, size = train_tokenizer(captions, temporary)
        model = model_config(architecture, ids, size, lora)
        _write_side_files(temporary, model)
        entries = _once(engine.base_entries(model))
        with StoreWriter(temporary / folder.WEIGHTS) as writer:
            parameters = _write(writer, entries, seed)
            base_digest = writer.digest
        adapter = adapter_entries(model) if lora else {}
        adapter_digest, adapter_config = None, None
        if lora:
            adapter_config = default_config(model)
            with StoreWriter(temporary / folder.ADAPTER) as writer:
                parameters += _write(writer, adapter, seed)
                adapter_digest = writer.digest
            (temporary / folder.ADAPTER_FILES).mkdir(parents=True, exist_ok=True)
            write_config(temporary / folder.ADAPTER_FILES / CONFIG, adapter_config)
        Manifest(
            model=model,
            dtype="float32",
            base_digest=base_digest,
            adapter_digest=adapter_digest,
            shards=(_file(SINGLE, entries),),
            index=None,
            side_files=tuple(sorted(str(p.name) for p in temporary.iterdir() if not p.is_dir())),
            adapter=_file(WEIGHTS, adapter) if lora else None,
            adapter_config=adapter_config,
            adapter_files=(CONFIG,) if lora else (),
        ).write(temporary)
    return Summary(len(entries) + len(adapter), parameters, 4 * parameters, time.monotonic() - started)


def model_config(architecture: Mapping[str, Any], tokens: Mapping[str, int], vocabulary: int, lora: LoraConfig | None) -> ModelConfig:
    """Returns the configuration of an architecture with a tokenizer's control tokens.

    Raises:
      InputError: a section or field that is missing, unknown or does not fit.
    """
    rest = {name: architecture[name] for name in _PLAIN_FIELDS if name in architecture}
    unknown = sorted(set(architecture) - set(_SECTIONS) - set(rest))
    missing = sorted(set(_SECTIONS) - set(architecture))
    if unknown or missing:
        names = ", ".join(unknown or missing)
        raise InputError(f"architecture: section {names} is {'unknown' if unknown else 'missing'}; the sections are {', '.join(_SECTIONS)}")
    parts: dict[str, Any] = {"beats": None}
    for name, kind in _SECTIONS.items():
        if name == "beats" and architecture[name] is None:
            continue
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in architecture[name].items()}
        allowed = [field.name for field in dataclasses.fields(kind) if field.name != "vocab_size"]
        odd = [key for key in fields if key not in allowed]
        if odd:
            raise InputError(f"architecture.{name}: {', '.join(odd)} is unknown; the fields are {', '.join(allowed)}")
        if name == "decoder":
            fields["vocab_size"] = vocabulary
        elif name != "beats" and fields.setdefault("output_size", parts["decoder"].hidden_size) != parts["decoder"].hidden_size:
            raise InputError(f"architecture.{name}: output_size {fields['output_size']} must be the decoder's hidden_size")
        try:
            parts[name] = kind(**fields)
        except (ConfigError, TypeError) as e:
            raise InputError(f"architecture.{name}: {str(e).removeprefix(kind.__name__ + '.__init__() ')}") from None
    special = SpecialTokens(**{field: tokens[token] for field, token in CONTROL_TOKENS.items()})
    try:
        return ModelConfig(**parts, tokens=special, lora=lora, **rest)
    except ConfigError as e:
        raise InputError(f"architecture: {e}") from None


def hf_config(model: ModelConfig) -> dict[str, Any]:
    """Returns the `config.json` of a checkpoint with this architecture: `ModelConfig.from_hf` reads it back."""
    embeds = all(getattr(model, name) == value for name, value in EMBED_STYLE.items())
    text, vision, audio = model.decoder, model.vision, model.audio
    return {
        **_named(model.tokens, TOKEN_NAMES),
        "architectures": ["NVOmniEmbedModel" if embeds else "Qwen2_5OmniThinkerForConditionalGeneration"],
        "audio_config": {
            "activation_function": "gelu",
            **({"beats_path": BEATS_FILE} if model.beats else {}),
            **_named(audio, NAMES["audio_config"]),
            "model_type": "qwen2_5_omni_audio_encoder",
            "num_hidden_layers": audio.num_layers,
            "num_mel_bins": audio.num_mel_bins,
        },
        **({"classify_type": "all_layer"} if model.has_head else {}),
        "model_type": EMBED_MODEL_TYPE if embeds else "qwen2_5_omni_thinker",
        "position_id_per_seconds": model.positions_per_second,
        "seconds_per_chunk": model.seconds_per_chunk,
        "text_config": {
            "hidden_act": "silu",
            **_named(text, NAMES["text_config"]),
            "model_type": "qwen2_5_omni_text",
            "rope_scaling": {"mrope_section": list(text.mrope_sections), "rope_type": "default", "type": "default"},
            "rope_theta": text.rope_theta,
        },
        "torch_dtype": "float32",
        "train_classify": model.has_head,
        "vision_config": {
            **_named(vision, NAMES["vision_config"]),
            "hidden_act": "silu",
            "in_channels": vision.in_channels,
            "model_type": "qwen2_5_omni_vision_encoder",
            "patch_size": vision.patch_size,
            "spatial_merge_size": vision.merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
        },
    }


def _named(part: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Returns fields of a part of the model under the names that a checkpoint has for them."""
    values = {theirs: getattr(part, ours) for ours, theirs in names.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def fresh_value(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Returns the float32 value that a leaf (one layer of it) of this stored name starts with.

    Linear maps keep the size of what they are given, the ones that end a residual branch give half of it; norms and gates start at one,
    biases and LoRA's B at zero, tables at a size that residual branches do not drown.
    """
    parts = [part for part in name.split(".") if not part.isdecimal()]
    kind, owner = parts[-1], parts[-2] if len(parts) > 1 else ""
    if kind in ("scale", "g", "gate_scale"):
        return np.ones(shape, np.float32)
    if kind in ("bias", "lora_b"):
        return np.zeros(shape, np.float32)
    noise = np.random.default_rng([zlib.crc32(name.encode()), seed]).standard_normal(shape, np.float32)
    if kind == "embedding":
        return np.float32(0.02 if owner == "relative_bias" else _EMBEDDING_SCALE) * noise
    if parts[0] == "lm_head":
        return np.float32(0.02) * noise
    fan_in = math.prod(shape[:-1])
    ends_branch = "layers" in parts and owner in ("o", "out", "proj", "down", "fc2")
    return np.float32((0.5 if ends_branch else 1.0) / math.sqrt(fan_in)) * noise


def _write(writer: StoreWriter, entries: Mapping[str, Entry], seed: int) -> int:
    """Writes the leaves of these tensors and returns the number of their values."""
    count = 0
    for group in engine.stacks(entries.values()).values():
        for entry in group:
            array = fresh_value(entry.stored, entry.tree_shape, seed)
            writer.add(entry.stored, array)
            count += array.size
    return count


def _once(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Returns the tensors with one for each shared leaf, as PyTorch saves tied weights."""
    first: dict[str, str] = {}
    for key, entry in entries.items():
        first.setdefault(entry.stored, key)
    return {key: entries[key] for key in first.values()}


def _file(name: str, entries: Mapping[str, Entry]) -> TensorFile:
    return TensorFile(name, {"format": "pt"}, tuple((key, "F32", entries[key].torch_shape) for key in sorted(entries)))


def _write_side_files(out: epath.Path, model: ModelConfig) -> None:
    for name, content in (("config.json", hf_config(model)), ("preprocessor_config.json", preprocessor_config(model))):
        (out / name).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    if model.beats is not None:
        (out / BEATS_FILE).write_bytes(_beats_file(model.beats))


def _beats_file(beats: BeatsConfig) -> bytes:
    """Returns a torch file {cfg, model} without tensors: a conversion that finds no such file assumes the published settings."""
    cfg = {
        **BEATS_FIXED,
        **_named(beats, BEATS_NAMES),
        "conv_bias": beats.conv_bias,
        "finetuned_model": beats.predictor_classes > 0,
        "predictor_class": beats.predictor_classes,
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in (
            ("data.pkl", pickle.dumps({"cfg": cfg, "model": {}}, protocol=2)),
            ("byteorder", b"little"),
            ("version", b"3\n"),
        ):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
    return buffer.getvalue()
