"""Clips that stand in memory, a tokenizer of whole words, and pipelines over them: no file is read."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from omni_jax.config import ModelConfig, Preset, preset
from omni_jax.data.clips import ClipInfo, ClipSource, Limits
from omni_jax.data.pipeline import TrainPipeline
from omni_jax.data.plan import BatchConfig
from omni_jax.tokens.tokenizer import CONTROL_TOKENS, END, Tokenizer
from omni_jax.train import LossConfig, kinds_of_update, pack_update
from omni_jax.types import Clip, ClipError, Record, VideoFrames, VideoGrid
from tests.model.builders import SEVEN_B

PRESET: Preset = preset("training").override(["frames=4", "pixels=1568", "audio_seconds=1"])
CONFIG = SEVEN_B
GRIDS = ((2, 2, 4), (2, 4, 2), (2, 2, 2))
WORDS = ("red", "disc", "grows", "while", "a", "low", "tone", "pulses", "slowly", "over", "noise")


def tokenizer() -> Tokenizer:
    """Returns a tokenizer that knows the words of these clips, one token each."""
    vocabulary = {word: i for i, word in enumerate(("[unk]", *WORDS))}
    plain = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return Tokenizer(plain, {name: 1000 + i for i, name in enumerate((END, *CONTROL_TOKENS.values()))})


class MemorySource:
    """Clips made from their number; those in `broken` cannot be read."""

    def __init__(self, captions: Sequence[str], ids: Sequence[str] | None = None, broken: Collection[int] = (), known: bool = True) -> None:
        self.captions = list(captions)
        self.ids = list(ids) if ids else [f"clip-{i}" for i in range(len(captions))]
        self.broken, self.known = frozenset(broken), known
        self.preset, self.limits = PRESET, Limits(2, 8, 16_000)

    def __len__(self) -> int:
        return len(self.captions)

    def record(self, index: int) -> ClipInfo:
        known = (VideoGrid(GRIDS[index % len(GRIDS)], 0.5), 16_000) if self.known else (None, None)
        return ClipInfo(self.ids[index], self.captions[index], *known, silent=index % 5 == 0)

    @property
    def silent(self) -> int:
        return len(range(0, len(self), 5))

    def numbers_of(self, ids: Sequence[str]) -> list[int]:
        return [self.ids.index(name) for name in ids if name in self.ids]

    def load(self, index: int) -> Clip:
        if index in self.broken:
            raise ClipError(f"{self.ids[index]}.mp4: truncated")
        rng = np.random.default_rng(index)
        t, h, w = GRIDS[index % len(GRIDS)]
        frames = rng.integers(0, 256, (2 * t, 14 * h, 14 * w, 3), np.uint8)
        waveform = (0.1 * rng.standard_normal(16_000)).astype(np.float32) if index % 5 else np.zeros(16_000, np.float32)
        video = VideoFrames(frames, np.arange(2 * t), 4.0, 2 * t, float(t))
        return Clip(Record(self.ids[index], self.captions[index]), video, waveform)


def captions(count: int, seed: int = 0) -> list[str]:
    """Returns captions of three to nine words, no two alike."""
    rng = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(rng.choice(WORDS, rng.integers(3, 10)))] = None
    return list(found)


def pipeline(
    source: ClipSource, batch: BatchConfig, losses: LossConfig | None = None, config: ModelConfig = CONFIG, **changes: Any
) -> TrainPipeline:
    """Returns a pipeline that packs for a model, the published one by default."""
    kinds = functools.partial(kinds_of_update, micro_batches=batch.micro_batches, losses=losses or LossConfig())
    arguments = {"pack": functools.partial(pack_update, config=config), "kinds": kinds, **changes}
    return TrainPipeline(source, tokenizer=tokenizer(), config=config, preset=PRESET, batch=batch, **arguments)
