"""Clips of mixed lengths as features, batches of them under different plans, and their embeddings by clip and table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from omni_jax.config import TABLES, ModelConfig, Preset
from omni_jax.model.runner import Runner
from omni_jax.tokens.buckets import Piece, Planner, RowPlan
from omni_jax.tokens.tokenizer import CONTROL_TOKENS, END, Tokenizer
from omni_jax.towers import Tower
from omni_jax.types import AudioSegment, EncoderBatch, Features, Record, VideoGrid, VisionFeatures
from tests.model import builders
from tests.tokens.batched import batched

Embeddings = dict[tuple[int, str], np.ndarray]
PRESET = Preset(filler="Say it.")


def tokenizer(config: ModelConfig) -> Tokenizer:
    """One index a byte, then the control tokens where the configuration has them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    added = {name: getattr(config.tokens, field) for field, name in CONTROL_TOKENS.items()}
    return Tokenizer(plain, {**added, END: max(added.values()) + 1})


def segment(config: ModelConfig, seed: int, frames: int) -> AudioSegment:
    """Noise of so many log-mel frames; the fbank has two fewer, as real ones do."""
    return AudioSegment(
        log_mel=builders.noise(seed, config.audio.num_mel_bins, frames),
        fbank=builders.noise(seed + 1, frames - 2, config.beats.num_mel_bins),
        tokens=((frames - 1) // 2 - 1) // 2 + 1,
    )


def clip(config: ModelConfig, seed: int, caption: str | None, grid: tuple[int, int, int] | None, frames: Sequence[int]) -> Features:
    """A clip of noise: grid in patches or no video, one audio segment for each count of frames."""
    vision = None
    if grid is not None:
        vision = VisionFeatures(builders.noise(seed, int(np.prod(grid)), config.vision.patch_values), VideoGrid(grid, 0.3))
    audio = tuple(segment(config, seed + 10 * n, count) for n, count in enumerate(frames, 1)) or None
    return Features(Record(f"clip{seed}", text=caption), vision, audio)


def clips(config: ModelConfig) -> list[Features]:
    """Four clips: everything; everything and long, the audio in two segments; no video; no audio and no caption."""
    return [
        clip(config, 100, "A red ball.", (2, 12, 18), [65]),
        clip(config, 200, "Rain on a tin roof, then a door, then steps.", (3, 8, 14), [140, 33]),
        clip(config, 300, "Hm", None, [23]),
        clip(config, 400, None, (1, 4, 2), []),
    ]


class Roomy(Planner):
    """Plans every batch larger than needed, in every dimension."""

    def tower(self, tower: Tower, sizes: Sequence[int], new_cost: float, config: ModelConfig) -> list[Piece]:
        count, size = {"vision": (1, 3), "audio": (3, 0), "beats": (1, 48)}[tower.name]
        pieces = super().tower(tower, sizes, new_cost, config)
        return [dataclasses.replace(p, count=p.count + count, size=p.size + size) for p in pieces]

    def rows(self, lengths: Sequence[int], prompts: Sequence[int], new_cost: float, attention: float) -> list[RowPlan]:
        plans = super().rows(lengths, prompts, new_cost, attention)
        return [dataclasses.replace(p, count=p.count + 1, size=p.size + 80, slots=p.slots + 2) for p in plans]


def plan(
    config: ModelConfig, features: Sequence[Features], planner: Planner, tables: Sequence[str] = TABLES, share_prefix: bool = True
) -> EncoderBatch:
    """Returns the batch of these clips for these tables."""
    return batched(features, tables, tokenizer(config), config, PRESET, share_prefix=share_prefix, planner=planner)


def embed(runner: Runner, batch: EncoderBatch) -> Embeddings:
    """Returns (clip of the batch, table) -> embedding; fails on a pair that comes twice."""
    found: Embeddings = {}
    for number, table, vector in runner.embed(batch):
        assert (number, table) not in found
        found[number, table] = vector
    return found
