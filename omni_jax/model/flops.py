"""Floating-point operations of a forward, counted from shapes: a product of (m, k) and (k, n) is 2 m k n, everything else is free.

Two counts of every part: `computed`, what the compiled programs multiply, padding and masked pairs included; `needed`, valid tokens and
the pairs that attention may see alone. Elementwise work (norms, softmax, activations) is left out, as is usual for model FLOP/s.

Letters: N items, P patches, F frames, T convolved frames, R rows, S tokens, K prompts per row, L layers, C tower width, D decoder width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from omni_jax.config import ModelConfig
from omni_jax.model.encoder import abstract_params
from omni_jax.model.layers import causal_blocks
from omni_jax.types import AudioBatch, BeatsBatch, EncoderBatch, RowBatch, VisionBatch

PARTS = ("vision", "audio", "beats", "bridge", "decoder", "head")


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations of one part, or of all: `computed` with padding, `needed` without."""

    computed: float = 0.0
    needed: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.computed + other.computed, self.needed + other.needed)

    @property
    def padding(self) -> float:
        """Share of the computed operations that nothing needed."""
        return 1 - self.needed / self.computed if self.computed else 0.0


def forward_work(config: ModelConfig, batch: EncoderBatch) -> dict[str, Work]:
    """Returns part -> operations of embedding a batch once; the parts are PARTS."""
    weights = _weights(config)
    work: dict[str, Work] = {part: Work() for part in PARTS}
    for vision in batch.vision:
        work["vision"] += _vision(config, weights, vision)
    for audio in batch.audio:
        work["audio"] += _audio(config, weights, audio)
    for beats in batch.beats:
        work["beats"] += _beats(config, weights, beats)
        work["bridge"] += _product(weights["bridge"], beats.fbank.shape[0] * beats.max_tokens, int(beats.tokens.sum()))
    for rows in batch.rows:
        work["decoder"] += _decoder(config, weights, rows)
        work["head"] += _product(weights["head"], rows.pool.size, int((rows.owner[..., 0] >= 0).sum()))
    return work


def total(work: Mapping[str, Work]) -> Work:
    """Returns the sum over parts."""
    return sum(work.values(), Work())


def _weights(config: ModelConfig) -> dict[str, int]:
    """Values in the matrices that one token passes, by "part" and "part/child", over all layers; LoRA included."""
    sizes: dict[str, int] = {}
    for path, leaf in abstract_params(config).items():
        if path[-1] in ("kernel", "lora_a", "lora_b", "v"):
            # The gate of BEATs' positions works on every head of a token.
            repeat = config.beats.num_heads if path[:1] == ("beats",) and path[-2] == "gate" else 1
            for name in (path[0], "/".join(path[:2])):
                sizes[name] = sizes.get(name, 0) + repeat * int(np.prod(leaf.shape))
    return sizes


def _product(values: int, computed: int, needed: int) -> Work:
    """Matrices of so many values applied to so many tokens."""
    return Work(2.0 * values * computed, 2.0 * values * needed)


def _attention(width: int, computed: float, needed: float) -> Work:
    """Logits and weighted sum of so many query-key pairs, all heads together `width` wide."""
    return Work(4.0 * width * computed, 4.0 * width * needed)


def _vision(config: ModelConfig, weights: Mapping[str, int], batch: VisionBatch) -> Work:
    cfg = config.vision
    steps, patches = batch.window.shape
    group = cfg.merge_size**2
    valid = (batch.window >= 0).sum(axis=1)
    windows = sum(int((np.unique(row[row >= 0], return_counts=True)[1] ** 2).sum()) for row in batch.window)
    full = len(set(cfg.full_attention_layers))
    pairs = full * int((valid**2).sum()) + (cfg.num_layers - full) * windows
    work = _product(weights["vision/patch_embed"] + weights["vision/layers"], steps * patches, int(valid.sum()))
    work += _product(weights["vision/merger"], steps * patches // group, int(valid.sum()) // group)
    return work + _attention(cfg.hidden_size, cfg.num_layers * steps * patches**2, pairs)


def _audio(config: ModelConfig, weights: Mapping[str, int], batch: AudioBatch) -> Work:
    cfg = config.audio
    chunks, frames = batch.mel.shape[:2]
    seen = (batch.frames + 1) // 2
    work = _product(weights["audio/conv1"], chunks * frames, int(batch.frames.sum()))
    work += _product(weights["audio/conv2"] + weights["audio/layers"], chunks * frames // 2, int(seen.sum()))
    work += _product(weights["audio/proj"], chunks * frames // 4, int((seen // 2).sum()))
    return work + _attention(cfg.hidden_size, cfg.num_layers * chunks * (frames // 2) ** 2, cfg.num_layers * int((seen**2).sum()))


def _beats(config: ModelConfig, weights: Mapping[str, int], batch: BeatsBatch) -> Work:
    cfg = config.beats
    segments, frames = batch.fbank.shape[:2]
    patches = frames // cfg.patch_size * cfg.frequency_patches
    valid = batch.frames // cfg.patch_size * cfg.frequency_patches
    conv = weights["beats/pos_conv"]
    inside = weights["beats"] - weights.get("beats/predictor", 0) - conv
    work = _product(inside, segments * patches, int(valid.sum()))
    work += _product(conv // cfg.conv_pos, segments * _taps(patches, cfg.conv_pos), sum(_taps(int(n), cfg.conv_pos) for n in valid))
    return work + _attention(cfg.hidden_size, cfg.num_layers * segments * patches**2, cfg.num_layers * int((valid**2).sum()))


def _taps(length: int, taps: int) -> int:
    """Taps of a centred kernel that fall within a sequence, over all its positions."""
    place = np.arange(length)
    first, last = np.maximum(place - taps // 2, 0), np.minimum(place - taps // 2 + taps, length)
    return int((last - first).sum())


def _decoder(config: ModelConfig, weights: Mapping[str, int], batch: RowBatch) -> Work:
    cfg = config.decoder
    rows, tokens = batch.ids.shape
    work = _product(weights["decoder/layers"], rows * tokens, int((batch.segment > 0).sum()))
    met = rows * sum((stop - start) * stop for start, stop in causal_blocks(tokens))
    seen = sum(_visible_pairs(segment, branch) for segment, branch in zip(batch.segment, batch.branch, strict=True))
    return work + _attention(cfg.hidden_size, cfg.num_layers * met, cfg.num_layers * seen)


def _visible_pairs(segment: np.ndarray, branch: np.ndarray) -> int:
    """Query-key pairs of a row that the decoder's mask lets through, padding apart."""
    causal = np.tri(len(segment), dtype=bool)
    same = (segment[:, None] == segment[None]) & (segment > 0)[:, None]
    return int((causal & same & ((branch == 0)[None] | (branch[:, None] == branch[None]))).sum())
