"""The reference's training batch, from the recorded inputs: media, prompts and hard negatives of every step kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from omni_jax import conversion
from omni_jax.config import ModelConfig
from omni_jax.conversion.adapter import adapter_entries
from omni_jax.features.audio import kaldi_fbank
from omni_jax.tokens.positions import line
from omni_jax.tokens.prompts import media_block
from omni_jax.towers.vision import step_layout
from omni_jax.train import (
    BatchShapes,
    LossConfig,
    OptimizerConfig,
    StepConfig,
    TrainBatch,
    fit_shapes,
    pack_micro_batch,
)
from omni_jax.types import SOURCE_TEXT, AudioBatch, BeatsBatch, Example, MediaBatch, StepKind, TokenSequence, VideoGrid, VisionBatch
from tests.golden_set import GoldenSet

BEATS_PATCH = 16

Params = Mapping[tuple[str, ...], Any]

INPUT_IDS = {"text": "ids/label", "audio": "ids/a", "video": "ids/v"}
MODALITIES = {"text": "", "audio": "a", "video": "v"}


def load_model(golden: GoldenSet, folder) -> tuple[ModelConfig, Params]:
    """Returns the adapted model, its LoRA dropout off as in the reference run."""
    conversion.to_jax(golden.checkpoint, folder, adapter=golden.adapter_dir)
    config, params = conversion.load(folder, dtype=np.float32)
    assert config.lora is not None
    return dataclasses.replace(config, lora=dataclasses.replace(config.lora, dropout=0.0)), params


def recipe(golden: GoldenSet, **losses) -> StepConfig:
    """Returns the recipe of the reference run: 100 updates of the released schedule."""
    spec = golden.spec
    return StepConfig(
        optimizer=OptimizerConfig(total_steps=100, learning_rate=spec["lr"]),
        losses=LossConfig(**{"temperature": spec["temperature"], "negatives": "global", **losses}),
        frozen_dtype=None,
    )


def media(golden: GoldenSet, config: ModelConfig, clip: int, augmented: bool = False) -> MediaBatch:
    """Returns the recorded tower inputs of a clip; the reference recorded no fbank of augmented copies, so it is made here."""
    arrays, at = golden.inputs, f"{clip}/aug/" if augmented else f"{clip}/"
    t, h, w = (int(x) for x in arrays[f"{clip}/grid_thw"][0])
    coords, window = step_layout(h, w, config.vision.merge_size, config.vision.window_tokens)
    mel = arrays[f"{at}log_mel"].T
    frames = config.audio.chunk_frames
    chunks = [mel[start : start + frames] for start in range(0, len(mel), frames)]
    fbank = kaldi_fbank(arrays[f"{at}waveform"]) if augmented else arrays[f"{clip}/fbank"]
    whole = len(fbank) // BEATS_PATCH * BEATS_PATCH
    return MediaBatch(
        vision=VisionBatch(
            patches=arrays[f"{at}pixel_values"].reshape(t, h * w, -1), coords=np.stack([coords] * t), window=np.stack([window] * t)
        ),
        audio=AudioBatch(
            mel=np.stack([np.pad(c, ((0, frames - len(c)), (0, 0))) for c in chunks]), frames=np.array([len(c) for c in chunks], np.int32)
        ),
        beats=BeatsBatch(
            fbank=fbank[:whole],
            frames=np.int32(whole),
            tokens=np.int32(arrays[f"{clip}/audio_tokens"]),
            max_tokens=int(arrays[f"{clip}/audio_tokens"]),
        ),
    )


def prompt(golden: GoldenSet, config: ModelConfig, clip: int, ids: np.ndarray, modalities: str) -> TokenSequence:
    """Returns the prompt with these recorded ids; media layout and positions follow from the clip's grid."""
    arrays = golden.inputs
    if not modalities:
        zeros = np.zeros(len(ids), np.int32)
        return TokenSequence(ids.astype(np.int32), line(0, len(ids)), zeros.astype(np.int8), zeros)
    grid = tuple(int(x) for x in arrays[f"{clip}/grid_thw"][0])
    span = VideoGrid((grid[0], grid[1], grid[2]), float(arrays[f"{clip}/second_per_grid"])) if "v" in modalities else None
    block = media_block(config, span, int(arrays[f"{clip}/audio_tokens"]) if "a" in modalities else None)
    prefix, rest = len(block.ids), len(ids) - len(block.ids)
    assert np.array_equal(ids[:prefix], block.ids)
    return TokenSequence(
        ids=ids.astype(np.int32),
        positions=np.concatenate([block.positions, line(block.next, rest)], axis=1),
        source=np.pad(block.source, (0, rest), constant_values=SOURCE_TEXT),
        source_index=np.pad(block.source_index, (0, rest)),
        prefix=prefix,
    )


def examples(golden: GoldenSet, config: ModelConfig, kind: StepKind) -> list[Example]:
    """Returns every clip of the set as one step kind needs it."""
    arrays, made = golden.inputs, []
    for i in range(golden.clips):
        hard = arrays[f"{i}/neg_text/ids/tva" if kind.hard == "text" else f"{i}/ids/tva"]
        ids: Mapping[str, tuple[np.ndarray, str]] = {
            "anchor": (arrays[f"{i}/ids/tva"], "va"),
            "positive": (arrays[f"{i}/aug/ids/tva"], "va"),
            "hard": (hard, "va"),
            **{name: (arrays[f"{i}/{INPUT_IDS[name]}"], MODALITIES[name]) for name in kind.singles},
        }
        prompts = {name: prompt(golden, config, i, *given) for name, given in ids.items()}
        made.append(Example(media(golden, config, i), media(golden, config, i, augmented=True), prompts))
    return made


def next_sample(clips: int, blocks: int = 1) -> np.ndarray:
    """Returns the shuffle of the reference run, "the next sample", within each block."""
    block = clips // blocks
    return np.tile(np.roll(np.arange(block), -1), (blocks, 1))


def batch(golden: GoldenSet, config: ModelConfig, kind: StepKind, *, share_prefix: bool = True) -> TrainBatch:
    """Returns the reference's batch of six clips as one micro-batch."""
    clips = examples(golden, config, kind)
    return pack_micro_batch(clips, kind, fit_shapes(clips, kind, share_prefix), config, next_sample(len(clips)), share_prefix)


def peft_arrays(config: ModelConfig, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns arrays by parameter path as torch tensors by the names PEFT prints."""
    found = {}
    for name, entry in adapter_entries(config).items():
        array = np.asarray(arrays["/".join(entry.path)])
        found[name] = entry.to_torch(array if entry.layer is None else array[entry.layer])
    return found


__all__ = ["BatchShapes", "batch", "examples", "load_model", "media", "next_sample", "peft_arrays", "prompt", "recipe"]
