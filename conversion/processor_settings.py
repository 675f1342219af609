"""Whether the processor that a checkpoint names prepares pictures and sound as this program does, whatever the folder says.

Means, windows and patches are constants here: a folder that was trained with others would be embedded wrongly without a word.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from omni_jax.config import ModelConfig
from omni_jax.conversion.source import Checkpoint, read_json
from omni_jax.types import InputError

_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
_PARTS = ("image_processor", "video_processor", "feature_extractor")
"""Sections of `processor_config.json`, which transformers 5 writes in place of the other two."""

_LIMITS = "min_pixels max_pixels n_samples nb_max_frames chunk_length padding_side padding_value return_attention_mask".split()
"""What presets say, or what changes no embedding."""

_MORE = {"do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 1 / 255, "resample": 3}


def preprocessor_config(model: ModelConfig) -> dict[str, Any]:
    """Returns a `preprocessor_config.json` as Qwen2.5-Omni's processor reads it."""
    return {
        "chunk_length": 300,
        "dither": 0.0,
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": model.audio.num_mel_bins,
        "hop_length": 160,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_pixels": 12845056,
        "merge_size": model.vision.merge_size,
        "min_pixels": 3136,
        "n_fft": 400,
        "n_samples": 4800000,
        "nb_max_frames": 30000,
        "padding_side": "right",
        "padding_value": 0.0,
        "patch_size": model.vision.patch_size,
        "processor_class": "Qwen2_5OmniProcessor",
        "return_attention_mask": True,
        "sampling_rate": 16000,
        "temporal_patch_size": model.vision.temporal_patch_size,
    }


def check(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Raises InputError for a setting of the folder's processor files that differs from what is computed here."""
    ours = {name: value for name, value in preprocessor_config(model).items() if name not in _LIMITS and not isinstance(value, str)} | _MORE
    for file in _FILES:
        path = checkpoint.folder / file
        for where, fields in _sections(read_json(path)) if path.exists() else ():
            # A sound's own normalisation is none of these.
            sound = "feature_size" in fields and "image_mean" not in fields
            for name, value in ours.items():
                there = fields.get(name, value)
                if there is not None and not _same(there, value) and not (sound and name in _MORE):
                    what = f"{where}{name} is {repr(there)[:80]}, and {value!r} is what is computed here"
                    raise InputError(f"{path}: {what}; use the published file")


def _sections(fields: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "", fields
    yield from ((f"{name}.", part) for name in _PARTS if isinstance(part := fields.get(name), Mapping))


def _same(one: Any, other: Any) -> bool:
    if isinstance(other, list):
        return isinstance(one, list) and len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, bool) or isinstance(other, bool) or not isinstance(one, int | float):
        return one is other
    return math.isclose(one, other, rel_tol=1e-6)
