"""The vision tower: temporal steps of frames, each attended on its own.

Letters: t temporal steps, P patches of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from omni_jax.config import ModelConfig
from omni_jax.towers.base import MAX_PAIRS, Item, Tower
from omni_jax.towers.work import Attention, FlopCount, LinearOps, Terms, unpadded
from omni_jax.types import PATCHES_PER_TOKEN, BatchShapes, Features, VisionBatch


class VisionInput(Tower):
    """Items are temporal steps; their size is in merged tokens."""

    name, modality = "vision", "video"
    fields: ClassVar = {"patches": 2, "coords": 2, "window": 1}
    fills: ClassVar = {"window": -1}
    most = 8

    def items(self, features: Features, config: ModelConfig) -> list[Item]:
        assert features.vision is not None
        t, h, w = features.vision.grid.thw
        coords, window = step_layout(h, w, config.vision.merge_size, config.vision.window_tokens)
        tokens = h * w // config.vision.merge_size**2
        steps = np.asarray(features.vision.patches, np.float32).reshape(t, h * w, -1)
        return [Item(0, (patches, coords, window), tokens, tokens) for patches in steps]

    def record(self, arrays: Sequence[Any], tokens: int) -> VisionBatch:
        return VisionBatch(*arrays)

    def length(self, size: int, config: ModelConfig) -> int:
        return size * config.vision.merge_size**2

    def limit(self, size: int) -> int:
        return MAX_PAIRS // (PATCHES_PER_TOKEN * size) ** 2

    def features(self, model: Any, arrays: Sequence[Any], tokens: int) -> Any:
        return model.video_tokens(*arrays)

    def width(self, size: int, config: ModelConfig) -> int:
        return size

    def made(self, batch: VisionBatch) -> int:
        return batch.window.shape[-1] // PATCHES_PER_TOKEN

    def valid(self, batch: VisionBatch) -> np.ndarray:
        return (batch.window >= 0).sum(axis=-1) // PATCHES_PER_TOKEN

    def fit(self, clips: Sequence[VisionBatch]) -> dict[str, int]:
        return {"steps": max(clip.window.shape[0] for clip in clips), "patches": max(clip.window.shape[1] for clip in clips)}

    def extent(self, shapes: BatchShapes, config: ModelConfig) -> tuple[int, ...]:
        return shapes.steps, shapes.patches

    def tokens(self, shapes: BatchShapes, config: ModelConfig) -> tuple[int, int]:
        return shapes.steps, shapes.patches // PATCHES_PER_TOKEN

    def abstract(self, array: Callable[..., Any], lead: tuple[int, ...], shapes: BatchShapes, config: ModelConfig) -> VisionBatch:
        steps = (*lead, *self.extent(shapes, config))
        return VisionBatch(array(*steps, config.vision.patch_values, dtype=np.float32), array(*steps, 2), array(*steps))

    def terms(self, shapes: BatchShapes, config: ModelConfig, copies: int) -> Terms:
        patches, pairs = shapes.steps * shapes.patches, config.vision.num_layers * shapes.steps * shapes.patches**2
        return vision_terms(config, unpadded(copies * patches), unpadded(copies * pairs))


def step_layout(h: int, w: int, merge_size: int, window_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns coords (h*w, 2) and window (h*w,) int32 of one temporal step's patches, in the order (h/2, w/2, 2, 2).

    Coordinates are row and column in patches; windows are squares of `window_tokens` merged tokens, numbered by rows.
    """
    rows, columns = h // merge_size, w // merge_size
    y, x, i, j = np.meshgrid(np.arange(rows), np.arange(columns), np.arange(merge_size), np.arange(merge_size), indexing="ij")
    coords = np.stack([(y * merge_size + i).ravel(), (x * merge_size + j).ravel()], axis=1).astype(np.int32)
    window = (y // window_tokens) * -(-columns // window_tokens) + x // window_tokens
    return coords, window.ravel().astype(np.int32)


def vision_terms(config: ModelConfig, patches: FlopCount, pairs: FlopCount) -> Terms:
    """Returns the vision tower on so many patches, whose layers see `pairs` in all."""
    merged = patches * (1 / config.vision.merge_size**2)
    maps = [LinearOps(("vision/patch_embed",), patches), LinearOps(("vision/layers",), patches), LinearOps(("vision/merger",), merged)]
    return [*maps, Attention(config.vision.hidden_size, pairs)]
