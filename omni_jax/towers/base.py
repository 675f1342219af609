"""What a tower is to the rest of the package. Batching, compiled programs, planning and operation counts iterate over such records.

Letters: N items, B clips, C copies of a clip, D LLM width.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from omni_jax.config import ModelConfig
from omni_jax.towers.work import Terms
from omni_jax.types import BatchShapes, Features

MAX_PAIRS = 1 << 25
"""Query-key pairs of one tower batch and head: bounds the memory of its attention."""


@dataclasses.dataclass(frozen=True)
class Item:
    """What a tower attends to on its own: a temporal step, a log-mel chunk, an audio segment.

    Attributes:
      part: number of the audio segment that it belongs to; 0 for video.
      arrays: what the fields of the tower's batch hold of it, without padding.
      size: what a batch of such items is padded to, in the tower's own unit.
      tokens: media tokens that it gives.
    """

    part: int
    arrays: tuple[Any, ...]
    size: int
    tokens: int


class Tower(abc.ABC):
    """One tower: what it reads of a clip, how that is batched, what it makes of it, and what that costs.

    Attributes:
      name: its field of `types.MediaBatch` and `types.EncoderBatch`, and the path of its parameters.
      modality: "video" or "audio". Of several towers of one modality a prompt has the tokens in turn.
      fields: arrays of its batch, in their order -> axes of one item.
      fills: of them, the value of empty places, other than 0.
      unit: new sizes are multiples of it with three significant bits; the items' own where all are equal and `exact`.
      most: items of a batch.
    """

    name: ClassVar[str]
    modality: ClassVar[str]
    fields: ClassVar[Mapping[str, int]]
    fills: ClassVar[Mapping[str, int]] = {}
    unit: ClassVar[int] = 1
    exact: ClassVar[bool] = False
    most: ClassVar[int]

    def runs(self, config: ModelConfig) -> bool:
        """Whether a backbone has it."""
        return True

    # What it reads.

    @abc.abstractmethod
    def items(self, features: Features, config: ModelConfig) -> list[Item]:
        """Returns what it reads of one clip, in the order of the clip's tokens."""

    @abc.abstractmethod
    def record(self, arrays: Sequence[Any], tokens: int) -> Any:
        """Returns its batch, of which each item makes so many tokens."""

    def batch(self, items: Sequence[Item], count: int, size: int, config: ModelConfig) -> Any:
        """Returns a batch (N = `count`, ...) of items, padded to a size."""
        columns = zip(*(item.arrays for item in items), strict=True)
        length = (self.length(size, config),)
        arrays = [pad(column, length, self.fills.get(name, 0), count) for name, column in zip(self.fields, columns, strict=True)]
        return self.record(arrays, self.width(size, config))

    def length(self, size: int, config: ModelConfig) -> int:
        """Returns the first axis of an item's arrays of a size."""
        return size

    def limit(self, size: int) -> int:
        """Returns how many items of a size the memory of a batch holds."""
        return 1 << 30

    # What it makes.

    def arrays(self, batch: Any) -> tuple[Any, ...]:
        """Returns what its program takes of a batch."""
        return tuple(getattr(batch, name) for name in self.fields)

    @abc.abstractmethod
    def features(self, model: Any, arrays: Sequence[Any], tokens: int) -> Any:
        """Returns what the tower gives for the arrays (N, ...) of a batch; training keeps it while the tower is frozen."""

    def project(self, model: Any, features: Any, tokens: int) -> Any:
        """Returns the media tokens (N, tokens, D) of features."""
        return features

    def media_tokens(self, model: Any, arrays: Sequence[Any], tokens: int) -> Any:
        """Returns the media tokens (N, tokens, D) of the arrays of a batch."""
        return self.project(model, self.features(model, arrays, tokens), tokens)

    @abc.abstractmethod
    def width(self, size: int, config: ModelConfig) -> int:
        """Returns the tokens that an item of a size makes, padding included."""

    @abc.abstractmethod
    def made(self, batch: Any) -> int:
        """Returns the tokens that each item of a batch makes, padding included."""

    @abc.abstractmethod
    def valid(self, batch: Any) -> np.ndarray:
        """Returns the tokens of each item of a batch without padding."""

    # A batch of clips that train together: the axes of a clip's items are padded, too.

    def clip(self, features: Features, config: ModelConfig) -> Any:
        """Returns the batch of one clip's items, without padding but for what `length` asks."""
        items = self.items(features, config)
        return self.batch(items, len(items), max(item.size for item in items), config)

    @abc.abstractmethod
    def fit(self, clips: Sequence[Any]) -> dict[str, int]:
        """Returns the fields of `BatchShapes` that hold the batches of these clips."""

    @abc.abstractmethod
    def extent(self, shapes: BatchShapes, config: ModelConfig) -> tuple[int, ...]:
        """Returns what the leading axes of a clip's arrays are padded to."""

    @abc.abstractmethod
    def tokens(self, shapes: BatchShapes, config: ModelConfig) -> tuple[int, int]:
        """Returns the items of a clip and the tokens of each, padding included."""

    def clip_tokens(self, batch: Any) -> int:
        """Returns the tokens of each clip of a batch (B, C, items, ...), padding included."""
        first, axes = self.arrays(batch)[0], next(iter(self.fields.values()))
        return math.prod(first.shape[2 : first.ndim - axes]) * self.made(batch)

    def clips(self, clips: Sequence[Any], shapes: BatchShapes, config: ModelConfig) -> Any:
        """Returns the batch (B, ...) of clips, each given as a batch of its items."""
        extent = self.extent(shapes, config)
        arrays = [pad([getattr(clip, name) for clip in clips], extent, self.fills.get(name, 0)) for name in self.fields]
        return self.record(arrays, self.tokens(shapes, config)[1])

    # What it costs.

    @abc.abstractmethod
    def abstract(self, array: Callable[..., Any], lead: tuple[int, ...], shapes: BatchShapes, config: ModelConfig) -> Any:
        """Returns a batch of clips with these leading axes whose arrays are `array(*dimensions, dtype=)`."""

    @abc.abstractmethod
    def terms(self, shapes: BatchShapes, config: ModelConfig, copies: int) -> Terms:
        """Returns the operations of so many copies of a clip in a batch of static shapes."""


def pad(arrays: Sequence[Any], sizes: tuple[int, ...], fill: int = 0, count: int | None = None) -> np.ndarray:
    """Returns arrays stacked to (count, ...), their leading axes padded to `sizes`. Raises ValueError for one that does not fit."""
    arrays = [np.asarray(array) for array in arrays]
    sizes = sizes[: arrays[0].ndim]
    out = np.full((count or len(arrays), *sizes, *arrays[0].shape[len(sizes) :]), fill, arrays[0].dtype)
    for n, array in enumerate(arrays):
        if any(have > size for have, size in zip(array.shape, sizes, strict=False)):
            raise ValueError(f"an array of shape {array.shape} does not fit the batch's {sizes}")
        out[(n, *(slice(0, s) for s in array.shape[: len(sizes)]))] = array
    return out


def multiple_of(unit: int, value: int) -> int:
    """Returns the smallest multiple of `unit` that is at least `value`."""
    return -(-value // unit) * unit
