"""Small training batches of random media and captions, for a model of odd sizes with random weights."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.config import LoraConfig, ModelConfig
from omni_jax.model import abstract_params
from omni_jax.tokens.positions import line
from omni_jax.tokens.prompts import media_block
from omni_jax.towers.vision import step_layout
from omni_jax.train import (
    BatchShapes,
    LossConfig,
    OptimizerConfig,
    StepConfig,
    TrainStep,
    fit_shapes,
    kinds_of_update,
    pack_micro_batch,
    stack_micro_batches,
)
from omni_jax.types import SOURCE_TEXT, AudioBatch, BeatsBatch, Example, MediaBatch, TokenSequence, VideoGrid, VisionBatch
from tests.model.builders import EVEN, random_value
from tests.programs import QUICK_OPTIONS
from tests.train.golden_batches import next_sample

STEPS, CHUNKS, FBANK = 2, 2, 48  # temporal steps, log-mel chunks, fbank frames of a clip

# Tiny programs run for milliseconds and compile for many seconds: the compiler is told to hurry. Matrix products are library calls anyway.
QUICK = QUICK_OPTIONS

MODEL = dataclasses.replace(EVEN, lora=LoraConfig(rank=3, alpha=7.0, dropout=0.0))
WITH_DROPOUT = dataclasses.replace(EVEN, lora=LoraConfig(rank=3, alpha=7.0, dropout=0.3))


@functools.cache
def weights() -> dict[tuple[str, ...], Any]:
    """Returns the weights of MODEL; tests share them."""
    return {path: jnp.asarray(random_value("/".join(path), leaf.shape)) for path, leaf in abstract_params(MODEL).items()}


def recipe(*, total_steps: int = 20, learning_rate: float = 1e-2, warmup_steps: int = 0, **changes: Any) -> StepConfig:
    """Returns a recipe whose first update already moves; `changes` go to the losses or, by name, to the step."""
    step = {name: changes.pop(name) for name in ("trainable", "remat", "frozen_dtype") if name in changes}
    return StepConfig(
        optimizer=OptimizerConfig(total_steps=total_steps, learning_rate=learning_rate, warmup_steps=warmup_steps),
        losses=LossConfig(**{"temperature": 0.2, "negatives": "global", **changes}),
        **{"frozen_dtype": None, **step},
    )


def media(rng: np.random.Generator, grid: tuple[int, int] = (4, 6)) -> MediaBatch:
    """Returns tower inputs of one clip: a frame of `grid` patches, a last chunk that is not full."""
    coords, window = step_layout(*grid, MODEL.vision.merge_size, MODEL.vision.window_tokens)
    patches = rng.standard_normal((STEPS, grid[0] * grid[1], MODEL.vision.patch_values)).astype(np.float32)
    frames = np.array([MODEL.audio.chunk_frames, MODEL.audio.chunk_frames // 2], np.int32)
    mel = rng.standard_normal((CHUNKS, MODEL.audio.chunk_frames, MODEL.audio.num_mel_bins)).astype(np.float32)
    mel[1, frames[1] :] = 0
    tokens = int((((frames - 1) // 2 + 1) // 2).sum())
    return MediaBatch(
        vision=VisionBatch(patches=patches, coords=np.stack([coords] * STEPS), window=np.stack([window] * STEPS)),
        audio=AudioBatch(mel=mel, frames=frames),
        beats=BeatsBatch(
            fbank=rng.standard_normal((FBANK, MODEL.beats.num_mel_bins)).astype(np.float32),
            frames=np.int32(FBANK),
            tokens=np.int32(tokens),
            max_tokens=tokens,
        ),
    )


def prompt(clip: MediaBatch, grid: tuple[int, int], modalities: str, text: np.ndarray, model: ModelConfig = MODEL) -> TokenSequence:
    """Returns media of the clip followed by text ids."""
    if not modalities:
        zeros = np.zeros(len(text), np.int32)
        return TokenSequence(text.astype(np.int32), line(0, len(text)), zeros.astype(np.int8), zeros)
    span = VideoGrid((STEPS, *grid), 0.7) if "v" in modalities else None
    block = media_block(model, span, int(clip.beats.tokens) if "a" in modalities else None)
    return TokenSequence(
        ids=np.concatenate([block.ids, text]).astype(np.int32),
        positions=np.concatenate([block.positions, line(block.next, len(text))], axis=1),
        source=np.pad(block.source, (0, len(text)), constant_values=SOURCE_TEXT),
        source_index=np.pad(block.source_index, (0, len(text))),
        prefix=len(block.ids),
    )


def example(seed: int, grid: tuple[int, int] = (4, 6), hard: str | None = "text", model: ModelConfig = MODEL) -> Example:
    """Returns a clip with every prompt; its hard negative has another caption only where `hard` is "text"."""
    rng = np.random.default_rng(seed)
    clip, copy = media(rng, grid), media(rng, grid)
    caption, other, filler = (rng.integers(0, 250, rng.integers(3, 7)) for _ in range(3))
    return Example(
        media=clip,
        augmented=copy,
        prompts={
            "anchor": prompt(clip, grid, "va", caption, model),
            "positive": prompt(copy, grid, "va", caption[:-1], model),
            "hard": prompt(clip, grid, "va", other if hard == "text" else caption, model),
            "text": prompt(clip, grid, "", caption, model),
            "audio": prompt(clip, grid, "a", filler, model),
            "video": prompt(clip, grid, "v", filler, model),
            "av": prompt(clip, grid, "va", filler, model),
            "tv": prompt(clip, grid, "v", caption, model),
            "at": prompt(clip, grid, "a", caption, model),
        },
    )


def batch(
    losses: LossConfig,
    update: int = 0,
    *,
    micro: int = 1,
    clips: int = 8,
    blocks: int = 1,
    seed: int = 0,
    share_prefix: bool = True,
    model: ModelConfig = MODEL,
    one_row: bool = False,
) -> Any:
    """Returns `clips` clips in `micro` micro-batches; clip i is the same however many micro-batches there are.

    With `one_row` all prompts of a clip that take a gradient stand in one row.
    """
    kinds = kinds_of_update(update, micro, losses)
    size = clips // micro
    parts = []
    for m, kind in enumerate(kinds):
        chosen = [example(seed + m * size + i, hard=kind.hard, model=model) for i in range(size)]
        if one_row:
            kind = dataclasses.replace(kind, layout=(kind.prompts,))
        shapes = fit_shapes(chosen, kind, share_prefix)
        shapes = dataclasses.replace(
            shapes, row_tokens=192 if one_row else 128 if kind.duals else 64, hard_tokens=64 if shapes.hard_tokens else 0
        )
        parts.append(pack_micro_batch(chosen, kind, shapes, model, next_sample(size, blocks), share_prefix))
    return stack_micro_batches(parts) if len(set(kinds)) == 1 else tuple(parts)


def parts(step: TrainStep) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns the trainable and the frozen parameters."""
    state, frozen = step.init(weights())
    return state.trainable, frozen


__all__ = ["MODEL", "QUICK", "WITH_DROPOUT", "BatchShapes", "batch", "example", "media", "parts", "prompt", "recipe", "weights"]
