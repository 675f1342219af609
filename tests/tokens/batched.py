"""Batches of clips straight from their features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omni_jax.config import ModelConfig, Preset
from omni_jax.tokens.batching import build_batches
from omni_jax.tokens.prompts import build_sequences
from omni_jax.tokens.tokenizer import Tokenizer
from omni_jax.types import EncoderBatch, Features, TokenizedClip


def batched(
    features: Sequence[Features], tables: Sequence[str], tokenizer: Tokenizer, config: ModelConfig, preset: Preset, **options: Any
) -> EncoderBatch:
    """Returns what `build_batches` gives for clips with a prompt for each table that they have the modalities of."""
    clips = [TokenizedClip(clip, build_sequences(clip, tables, tokenizer, config, preset)) for clip in features]
    return build_batches(clips, config, **options)
