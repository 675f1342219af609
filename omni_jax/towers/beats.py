"""BEATs: audio segments of at most 300 s, and the bridge that brings its features to the decoder.

Letters: F fbank frames.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from omni_jax.config import BeatsConfig, ModelConfig
from omni_jax.towers.audio import FRAMES_PER_TOKEN
from omni_jax.towers.base import MAX_PAIRS, Item, Tower
from omni_jax.towers.work import Attention, FlopCount, LinearOps, Terms, unpadded
from omni_jax.types import BatchShapes, BeatsBatch, Features

BEATS_EDGE = 4  # tokens: a segment's mel frames outnumber its whole fbank patches by at most 18 frames
BATCH_FRAMES = 8192  # fbank frames of one batch; it holds one segment at least


class BeatsInput(Tower):
    """Items are audio segments; their size is in fbank frames of whole patches. A clip that trains has one."""

    name, modality = "beats", "audio"
    fields: ClassVar = {"fbank": 2, "frames": 0, "tokens": 0}
    unit = BeatsConfig.patch_size
    exact = True
    most = 8

    def runs(self, config: ModelConfig) -> bool:
        return config.beats is not None

    def items(self, features: Features, config: ModelConfig) -> list[Item]:
        found = []
        for part, segment in enumerate(features.audio or ()):
            frames = len(segment.fbank) // BeatsConfig.patch_size * BeatsConfig.patch_size
            if segment.tokens > beats_tokens(frames):
                raise ValueError(f"a segment of {len(segment.fbank)} fbank frames cannot have {segment.tokens} tokens")
            arrays = np.asarray(segment.fbank[:frames], np.float32), np.int32(frames), np.int32(segment.tokens)
            found.append(Item(part, arrays, frames, segment.tokens))
        return found

    def record(self, arrays: Sequence[Any], tokens: int) -> BeatsBatch:
        return BeatsBatch(*arrays, max_tokens=tokens)

    def clip(self, features: Features, config: ModelConfig) -> BeatsBatch:
        (item,) = self.items(features, config)
        return self.record(item.arrays, item.tokens)

    def limit(self, size: int) -> int:
        return min(BATCH_FRAMES // size, MAX_PAIRS // (size // 2) ** 2)  # 8 patches per 16 frames

    def arrays(self, batch: BeatsBatch) -> tuple[Any, ...]:
        return batch.fbank, batch.frames

    def features(self, model: Any, arrays: Sequence[Any], tokens: int) -> Any:
        # The bridge trains, so its inputs are kept; it reads two features for each audio token.
        return model.beats(*arrays, dtype=model.dtype)[0][:, : 2 * tokens]

    def project(self, model: Any, features: Any, tokens: int) -> Any:
        return model.bridge(features, tokens)

    def width(self, size: int, config: ModelConfig) -> int:
        return beats_tokens(size)

    def made(self, batch: BeatsBatch) -> int:
        return batch.max_tokens

    def valid(self, batch: BeatsBatch) -> np.ndarray:
        return batch.tokens

    def fit(self, clips: Sequence[BeatsBatch]) -> dict[str, int]:
        return {"fbank_frames": max(clip.fbank.shape[0] for clip in clips)}

    def clips(self, clips: Sequence[BeatsBatch], shapes: BatchShapes, config: ModelConfig) -> BeatsBatch:
        if config.beats is None:  # clips may carry a filter bank all the same
            clips = [dataclasses.replace(clip, fbank=clip.fbank[:0]) for clip in clips]
        return super().clips(clips, shapes, config)

    def extent(self, shapes: BatchShapes, config: ModelConfig) -> tuple[int, ...]:
        return (shapes.fbank_frames if config.beats is not None else 0,)

    def tokens(self, shapes: BatchShapes, config: ModelConfig) -> tuple[int, int]:
        return 1, shapes.chunks * config.audio.chunk_tokens

    def abstract(self, array: Callable[..., Any], lead: tuple[int, ...], shapes: BatchShapes, config: ModelConfig) -> BeatsBatch:
        bins = config.beats.num_mel_bins if config.beats else config.audio.num_mel_bins  # of a filter bank without frames
        fbank = array(*lead, *self.extent(shapes, config), bins, dtype=np.float32)
        return BeatsBatch(fbank, array(*lead), array(*lead), self.tokens(shapes, config)[1])

    def terms(self, shapes: BatchShapes, config: ModelConfig, copies: int) -> Terms:
        assert config.beats is not None
        return beats_terms_of(config.beats, shapes.fbank_frames, copies)


def beats_tokens(frames: int) -> int:
    """Returns the tokens that any segment of so many fbank frames (whole patches) can have."""
    return frames // FRAMES_PER_TOKEN + BEATS_EDGE


def beats_terms(config: BeatsConfig, patches: FlopCount, taps: FlopCount, pairs: FlopCount) -> Terms:
    """Returns BEATs on so many patches; `taps` of the position convolution fall within their sequences (see `kernel_taps`)."""
    maps = [LinearOps(("beats/patch_embed",), patches), LinearOps(("beats/input_proj", "beats/layers"), patches)]
    convolution = LinearOps(("beats/pos_conv",), taps * (1 / config.conv_pos))
    return [*maps, convolution, Attention(config.hidden_size, pairs)]


def beats_terms_of(config: BeatsConfig, frames: int, copies: int) -> Terms:
    """Returns BEATs on so many copies of a segment's fbank frames."""
    patches = frames // config.patch_size * config.frequency_patches
    counts = patches, kernel_taps(patches, config.conv_pos), config.num_layers * patches**2
    return beats_terms(config, *(unpadded(copies * count) for count in counts))


def kernel_taps(length: int, taps: int) -> int:
    """Returns the taps of a centred kernel that fall within a sequence, over all its positions."""
    place = np.arange(length)
    first, last = np.maximum(place - taps // 2, 0), np.minimum(place - taps // 2 + taps, length)
    return int((last - first).sum())
