"""Operations of embedding a batch once, with padding and without, by part of the encoder: what the benchmarks put speeds beside.

Letters: R rows, S tokens, K prompts per row.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from omni_jax.config import BeatsConfig, ModelConfig
from omni_jax.model.flops import PARTS, bridge_terms, decoder_terms, head_terms, operations, row_pairs
from omni_jax.towers.audio import audio_terms
from omni_jax.towers.beats import beats_terms, kernel_taps
from omni_jax.towers.vision import vision_terms
from omni_jax.towers.work import Attention, FlopCount, LinearOps, Terms
from omni_jax.types import AudioBatch, BeatsBatch, EncoderBatch, RowBatch, VisionBatch


def forward_work(config: ModelConfig, batch: EncoderBatch) -> dict[str, FlopCount]:
    """Returns part -> operations of embedding a batch once; the parts are PARTS."""
    terms: dict[str, list[LinearOps | Attention]] = {part: [] for part in PARTS}
    for vision in batch.vision:
        terms["vision"] += _vision(config, vision)
    for audio in batch.audio:
        terms["audio"] += _audio(config, audio)
    for beats in batch.beats:
        assert config.beats is not None
        terms["beats"] += _beats(config.beats, beats)
        terms["bridge"] += bridge_terms(FlopCount(beats.fbank.shape[0] * beats.max_tokens, int(beats.tokens.sum())))
    for rows, owner in zip(batch.rows, batch.owners, strict=True):
        asked = owner[..., 0] >= 0
        terms["decoder"] += _decoder(config, rows, asked)
        terms["head"] += head_terms(FlopCount(rows.pool.size, int(asked.sum())))
    return {part: operations(config, parts) for part, parts in terms.items()}


def total(work: Mapping[str, FlopCount]) -> FlopCount:
    """Returns the sum over parts."""
    return sum(work.values(), FlopCount())


def _vision(config: ModelConfig, batch: VisionBatch) -> Terms:
    cfg = config.vision
    steps, patches = batch.window.shape
    valid = (batch.window >= 0).sum(axis=1)
    windows = sum(int((np.unique(row[row >= 0], return_counts=True)[1] ** 2).sum()) for row in batch.window)
    full = len(set(cfg.full_attention_layers))
    pairs = full * int((valid**2).sum()) + (cfg.num_layers - full) * windows
    return vision_terms(config, FlopCount(steps * patches, int(valid.sum())), FlopCount(cfg.num_layers * steps * patches**2, pairs))


def _audio(config: ModelConfig, batch: AudioBatch) -> Terms:
    layers = config.audio.num_layers
    chunks, frames = batch.mel.shape[:2]
    seen = (batch.frames + 1) // 2
    return audio_terms(
        config,
        frames=FlopCount(chunks * frames, int(batch.frames.sum())),
        seen=FlopCount(chunks * frames // 2, int(seen.sum())),
        tokens=FlopCount(chunks * frames // 4, int((seen // 2).sum())),
        pairs=FlopCount(layers * chunks * (frames // 2) ** 2, layers * int((seen**2).sum())),
    )


def _beats(cfg: BeatsConfig, batch: BeatsBatch) -> Terms:
    segments, frames = batch.fbank.shape[:2]
    patches = frames // cfg.patch_size * cfg.frequency_patches
    valid = batch.frames // cfg.patch_size * cfg.frequency_patches
    return beats_terms(
        cfg,
        patches=FlopCount(segments * patches, int(valid.sum())),
        taps=FlopCount(segments * kernel_taps(patches, cfg.conv_pos), sum(kernel_taps(int(n), cfg.conv_pos) for n in valid)),
        pairs=FlopCount(cfg.num_layers * segments * patches**2, cfg.num_layers * int((valid**2).sum())),
    )


def _decoder(config: ModelConfig, batch: RowBatch, asked: np.ndarray) -> Terms:
    rows, tokens = batch.ids.shape
    causal = config.attention == "causal"
    seen = [_visible_keys(segment, branch, causal) for segment, branch in zip(batch.segment, batch.branch, strict=True)]
    computed = FlopCount(rows * tokens, int((batch.segment > 0).sum())), FlopCount(rows * row_pairs(tokens, causal), int(np.sum(seen)))
    if not config.has_head:
        return decoder_terms(config, *computed)
    pooled = sum(int(counts[pool[used]].sum()) for counts, pool, used in zip(seen, batch.pool, asked, strict=True))
    return decoder_terms(config, *computed, (FlopCount(batch.pool.size, int(asked.sum())), FlopCount(batch.pool.size * tokens, pooled)))


def _visible_keys(segment: np.ndarray, branch: np.ndarray, causal: bool = True) -> np.ndarray:
    """Keys that the decoder's mask shows to each token of a row (S,); none to padding."""
    same = (segment[:, None] == segment[None]) & (segment > 0)[:, None]
    if causal:
        same &= np.tri(len(segment), dtype=bool) & ((branch == 0)[None] | (branch[:, None] == branch[None]))
    return same.sum(axis=1)
