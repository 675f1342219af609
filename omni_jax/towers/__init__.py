"""The towers as a table: a new one is a record here, beside its module in `omni_jax.model` and its preprocessing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from omni_jax.config import ModelConfig
from omni_jax.towers.audio import AudioInput
from omni_jax.towers.base import Item, Tower
from omni_jax.towers.beats import BeatsInput
from omni_jax.towers.vision import VisionInput
from omni_jax.types import BatchShapes

VISION, AUDIO, BEATS = VisionInput(), AudioInput(), BeatsInput()

TOWERS: tuple[Tower, ...] = (VISION, AUDIO, BEATS)
"""In the order of the media table: first all tokens of the first tower."""

NAMES = tuple(tower.name for tower in TOWERS)


def towers_of(config: ModelConfig) -> tuple[Tower, ...]:
    """Returns the towers that a backbone has."""
    return tuple(tower for tower in TOWERS if tower.runs(config))


def of_modalities(modalities: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of the towers that read these modalities."""
    return tuple(tower.name for tower in TOWERS if tower.modality in modalities)


def media_tokens(shapes: BatchShapes, config: ModelConfig) -> int:
    """Returns M, the rows of one clip's media table in a training batch, padding included."""
    return sum(items * each for items, each in (tower.tokens(shapes, config) for tower in towers_of(config)))


def table_rows(first: int, each: int, valid: Iterable[int]) -> np.ndarray:
    """Returns the rows of a media table that hold the tokens of items, `each` rows an item, of which `valid` are not padding."""
    return np.concatenate([np.zeros(0, np.int32), *(np.arange(count, dtype=np.int32) + first + n * each for n, count in enumerate(valid))])


def in_turn(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the rows of one part of a clip as a prompt has them: one of each tower of the modality, then the next of each."""
    return np.stack(rows, axis=1).ravel()
