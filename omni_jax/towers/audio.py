"""The audio tower: log-mel chunks of 2 s, each attended on its own.

Letters: c log-mel chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from omni_jax.config import ModelConfig
from omni_jax.towers.base import Item, Tower
from omni_jax.towers.work import Attention, FlopCount, LinearOps, Terms, unpadded
from omni_jax.types import AudioBatch, AudioSegment, BatchShapes, Features

FRAMES_PER_TOKEN = 4  # mel or fbank frames of one audio token


class AudioInput(Tower):
    """Items are log-mel chunks, all of one size, in tokens."""

    name, modality = "audio", "audio"
    fields: ClassVar = {"mel": 2, "frames": 0}
    exact = True
    most = 32

    def items(self, features: Features, config: ModelConfig) -> list[Item]:
        return [
            Item(part, (chunk, np.int32(len(chunk))), config.audio.chunk_tokens, _tokens(len(chunk)))
            for part, segment in enumerate(features.audio or ())
            for chunk in mel_chunks(segment, config)
        ]

    def record(self, arrays: Sequence[Any], tokens: int) -> AudioBatch:
        return AudioBatch(*arrays)

    def length(self, size: int, config: ModelConfig) -> int:
        return config.audio.chunk_frames

    def features(self, model: Any, arrays: Sequence[Any], tokens: int) -> Any:
        return model.whisper_tokens(*arrays)

    def width(self, size: int, config: ModelConfig) -> int:
        return config.audio.chunk_tokens

    def made(self, batch: AudioBatch) -> int:
        return batch.mel.shape[-2] // FRAMES_PER_TOKEN

    def valid(self, batch: AudioBatch) -> np.ndarray:
        return _tokens(batch.frames)

    def fit(self, clips: Sequence[AudioBatch]) -> dict[str, int]:
        return {"chunks": max(clip.mel.shape[0] for clip in clips)}

    def extent(self, shapes: BatchShapes, config: ModelConfig) -> tuple[int, ...]:
        return (shapes.chunks,)

    def tokens(self, shapes: BatchShapes, config: ModelConfig) -> tuple[int, int]:
        return shapes.chunks, config.audio.chunk_tokens

    def abstract(self, array: Callable[..., Any], lead: tuple[int, ...], shapes: BatchShapes, config: ModelConfig) -> AudioBatch:
        chunks = (*lead, shapes.chunks)
        return AudioBatch(array(*chunks, config.audio.chunk_frames, config.audio.num_mel_bins, dtype=np.float32), array(*chunks))

    def terms(self, shapes: BatchShapes, config: ModelConfig, copies: int) -> Terms:
        return audio_terms_of(config, shapes.chunks * config.audio.chunk_frames, copies)


def mel_chunks(segment: AudioSegment, config: ModelConfig) -> list[np.ndarray]:
    """Returns the segment's log-mel, transposed, in pieces (frames, 128) float32; pieces too short for a token are left out."""
    frames = config.audio.chunk_frames
    mel = np.asarray(segment.log_mel, np.float32)
    pieces = [mel[:, start : start + frames].T for start in range(0, mel.shape[1], frames)]
    return [p for p in pieces if _tokens(len(p)) > 0]


def _tokens(frames: Any) -> Any:
    return ((frames - 1) // 2 + 1) // 2


def audio_terms(config: ModelConfig, frames: FlopCount, seen: FlopCount, tokens: FlopCount, pairs: FlopCount) -> Terms:
    """Returns the audio tower on log-mel frames, convolved frames (half as many) and tokens (a quarter)."""
    maps = [LinearOps(("audio/conv1",), frames), LinearOps(("audio/conv2", "audio/layers"), seen), LinearOps(("audio/proj",), tokens)]
    return [*maps, Attention(config.audio.hidden_size, pairs)]


def audio_terms_of(config: ModelConfig, frames: int, copies: int) -> Terms:
    """Returns the audio tower on so many copies of a clip's log-mel frames, in chunks."""
    chunk, layers = config.audio.chunk_frames, config.audio.num_layers
    whole, rest = divmod(frames, chunk)
    pairs = layers * (whole * (chunk // 2) ** 2 + (-(-rest // 2)) ** 2)
    seen = whole * chunk // 2 + -(-rest // 2)
    return audio_terms(config, *(unpadded(copies * count) for count in (frames, seen, seen // 2, pairs)))
