"""Floating-point operations of a forward, counted from shapes: a product of (m, k) and (k, n) is 2 m k n, everything else is free.

Two counts of every part: `computed`, what the compiled programs multiply, padding and masked pairs included; `needed`, valid tokens and
the pairs that attention may see alone. Elementwise work (norms, softmax, activations) is left out, as is usual for model FLOP/s.

Letters: N items, P patches, F frames, T convolved frames, R rows, S tokens, K prompts per row, L layers, C tower width, D decoder width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from omni_jax.config import BeatsConfig, ModelConfig
from omni_jax.model.encoder import abstract_params
from omni_jax.model.layers import causal_blocks
from omni_jax.types import AudioBatch, BeatsBatch, EncoderBatch, RowBatch, VisionBatch

PARTS = ("vision", "audio", "beats", "bridge", "decoder", "head")


@dataclasses.dataclass(frozen=True)
class Work:
    """A count, of operations or of what causes them (tokens, pairs): `computed` with padding, `needed` without."""

    computed: float = 0.0
    needed: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.computed + other.computed, self.needed + other.needed)

    def __mul__(self, factor: float) -> Work:
        return Work(self.computed * factor, self.needed * factor)

    @property
    def padding(self) -> float:
        """Share of the computed operations that nothing needed."""
        return 1 - self.needed / self.computed if self.computed else 0.0


@dataclasses.dataclass(frozen=True)
class Maps:
    """Linear maps applied to so many tokens.

    Attributes:
      paths: path prefixes of their matrices, all layers of a stack together.
    """

    paths: tuple[str, ...]
    tokens: Work


@dataclasses.dataclass(frozen=True)
class Attention:
    """Logits and weighted sum of so many query-key pairs, counted over all layers; all heads together `width` wide."""

    width: int
    pairs: Work


Terms = Sequence[Maps | Attention]


def forward_work(config: ModelConfig, batch: EncoderBatch) -> dict[str, Work]:
    """Returns part -> operations of embedding a batch once; the parts are PARTS."""
    terms: dict[str, list[Maps | Attention]] = {part: [] for part in PARTS}
    for vision in batch.vision:
        terms["vision"] += _vision(config, vision)
    for audio in batch.audio:
        terms["audio"] += _audio(config, audio)
    for beats in batch.beats:
        assert config.beats is not None
        terms["beats"] += _beats(config.beats, beats)
        terms["bridge"] += bridge_terms(Work(beats.fbank.shape[0] * beats.max_tokens, int(beats.tokens.sum())))
    for rows, owner in zip(batch.rows, batch.owners, strict=True):
        asked = owner[..., 0] >= 0
        terms["decoder"] += _decoder(config, rows, asked)
        terms["head"] += head_terms(Work(rows.pool.size, int(asked.sum())))
    return {part: operations(config, parts) for part, parts in terms.items()}


def operations(config: ModelConfig, terms: Terms) -> Work:
    """Returns the operations of a forward through these terms."""
    sizes = matrix_sizes(config)
    return total({str(n): term_operations(sizes, term) for n, term in enumerate(terms)})


def term_operations(sizes: Mapping[str, int], term: Maps | Attention) -> Work:
    """Returns the operations of one term's forward, its matrices as large as `sizes` says."""
    if isinstance(term, Attention):
        return term.pairs * (4.0 * term.width)
    return term.tokens * (2.0 * sum(sizes.get(path, 0) for path in term.paths))


def total(work: Mapping[str, Work]) -> Work:
    """Returns the sum over parts."""
    return sum(work.values(), Work())


@functools.lru_cache(maxsize=32)
def matrix_sizes(config: ModelConfig, only: frozenset[str] | None = None) -> Mapping[str, int]:
    """Returns path prefix ("decoder/layers/mlp") -> values in the matrices under it that one token passes; LoRA included.

    Args:
      only: paths ("head/fc1/kernel") of the parameters to count; None counts all.
    """
    sizes: dict[str, int] = {}
    for path, leaf in abstract_params(config).items():
        if path[-1] in ("kernel", "lora_a", "lora_b", "v") and (only is None or "/".join(path) in only):
            # The gate of BEATs' positions works on every head of a token.
            repeat = config.beats.num_heads if config.beats and path[:1] == ("beats",) and path[-2] == "gate" else 1
            for depth in range(1, len(path) + 1):
                name = "/".join(path[:depth])
                sizes[name] = sizes.get(name, 0) + repeat * int(np.prod(leaf.shape))
    return sizes


# ---------------------------------------------------------------------------------------------------- the terms of each part, from counts


def vision_terms(config: ModelConfig, patches: Work, pairs: Work) -> Terms:
    """Returns the vision tower on so many patches, whose layers see `pairs` in all."""
    merged = patches * (1 / config.vision.merge_size**2)
    maps = [Maps(("vision/patch_embed",), patches), Maps(("vision/layers",), patches), Maps(("vision/merger",), merged)]
    return [*maps, Attention(config.vision.hidden_size, pairs)]


def audio_terms(config: ModelConfig, frames: Work, seen: Work, tokens: Work, pairs: Work) -> Terms:
    """Returns the audio tower on log-mel frames, convolved frames (half as many) and tokens (a quarter)."""
    maps = [Maps(("audio/conv1",), frames), Maps(("audio/conv2", "audio/layers"), seen), Maps(("audio/proj",), tokens)]
    return [*maps, Attention(config.audio.hidden_size, pairs)]


def beats_terms(config: BeatsConfig, patches: Work, taps: Work, pairs: Work) -> Terms:
    """Returns BEATs on so many patches; `taps` of the position convolution fall within their sequences (see `kernel_taps`)."""
    maps = [Maps(("beats/patch_embed",), patches), Maps(("beats/input_proj", "beats/layers"), patches)]
    convolution = Maps(("beats/pos_conv",), taps * (1 / config.conv_pos))
    return [*maps, convolution, Attention(config.hidden_size, pairs)]


def bridge_terms(tokens: Work) -> Terms:
    """Returns the bridge from BEATs to the decoder on so many tokens."""
    return [Maps(("bridge",), tokens)]


def decoder_terms(config: ModelConfig, tokens: Work, pairs: Work, last: tuple[Work, Work] | None = None) -> Terms:
    """Returns the decoder's layers on so many tokens; `pairs` are those of one layer.

    Args:
      last: tokens and pairs for which the last layer computes more than keys and values; None: for all.
    """
    layers = config.decoder.num_layers
    last_tokens, last_pairs = last or (tokens, pairs)
    keys = ("decoder/layers/attn/k", "decoder/layers/attn/v")
    others = ("decoder/layers/attn/q", "decoder/layers/attn/o", "decoder/layers/mlp")
    within = tokens * ((layers - 1) / layers) + last_tokens * (1 / layers)
    return [Maps(keys, tokens), Maps(others, within), Attention(config.decoder.hidden_size, pairs * (layers - 1) + last_pairs)]


def head_terms(prompts: Work) -> Terms:
    """Returns the fusion head on so many prompts."""
    return [Maps(("head",), prompts)]


def kernel_taps(length: int, taps: int) -> int:
    """Returns the taps of a centred kernel that fall within a sequence, over all its positions."""
    place = np.arange(length)
    first, last = np.maximum(place - taps // 2, 0), np.minimum(place - taps // 2 + taps, length)
    return int((last - first).sum())


def row_pairs(tokens: int, causal: bool = True) -> int:
    """Returns the query-key pairs that `attend_causal` multiplies for a row of so many tokens; all where attention is not causal."""
    if not causal:
        return tokens**2
    return sum((stop - start) * stop for start, stop in causal_blocks(tokens))


# ---------------------------------------------------------------------------------------------------------------- counts of a batch


def _vision(config: ModelConfig, batch: VisionBatch) -> Terms:
    cfg = config.vision
    steps, patches = batch.window.shape
    valid = (batch.window >= 0).sum(axis=1)
    windows = sum(int((np.unique(row[row >= 0], return_counts=True)[1] ** 2).sum()) for row in batch.window)
    full = len(set(cfg.full_attention_layers))
    pairs = full * int((valid**2).sum()) + (cfg.num_layers - full) * windows
    return vision_terms(config, Work(steps * patches, int(valid.sum())), Work(cfg.num_layers * steps * patches**2, pairs))


def _audio(config: ModelConfig, batch: AudioBatch) -> Terms:
    layers = config.audio.num_layers
    chunks, frames = batch.mel.shape[:2]
    seen = (batch.frames + 1) // 2
    return audio_terms(
        config,
        frames=Work(chunks * frames, int(batch.frames.sum())),
        seen=Work(chunks * frames // 2, int(seen.sum())),
        tokens=Work(chunks * frames // 4, int((seen // 2).sum())),
        pairs=Work(layers * chunks * (frames // 2) ** 2, layers * int((seen**2).sum())),
    )


def _beats(cfg: BeatsConfig, batch: BeatsBatch) -> Terms:
    segments, frames = batch.fbank.shape[:2]
    patches = frames // cfg.patch_size * cfg.frequency_patches
    valid = batch.frames // cfg.patch_size * cfg.frequency_patches
    return beats_terms(
        cfg,
        patches=Work(segments * patches, int(valid.sum())),
        taps=Work(segments * kernel_taps(patches, cfg.conv_pos), sum(kernel_taps(int(n), cfg.conv_pos) for n in valid)),
        pairs=Work(cfg.num_layers * segments * patches**2, cfg.num_layers * int((valid**2).sum())),
    )


def _decoder(config: ModelConfig, batch: RowBatch, asked: np.ndarray) -> Terms:
    rows, tokens = batch.ids.shape
    causal = config.attention == "causal"
    seen = [_visible_keys(segment, branch, causal) for segment, branch in zip(batch.segment, batch.branch, strict=True)]
    computed = Work(rows * tokens, int((batch.segment > 0).sum())), Work(rows * row_pairs(tokens, causal), int(np.sum(seen)))
    if not config.has_head:
        return decoder_terms(config, *computed)
    pooled = sum(int(counts[pool[used]].sum()) for counts, pool, used in zip(seen, batch.pool, asked, strict=True))
    return decoder_terms(config, *computed, (Work(batch.pool.size, int(asked.sum())), Work(batch.pool.size * tokens, pooled)))


def _visible_keys(segment: np.ndarray, branch: np.ndarray, causal: bool = True) -> np.ndarray:
    """Keys that the decoder's mask shows to each token of a row (S,); none to padding."""
    same = (segment[:, None] == segment[None]) & (segment > 0)[:, None]
    if causal:
        same &= np.tri(len(segment), dtype=bool) & ((branch == 0)[None] | (branch[:, None] == branch[None]))
    return same.sum(axis=1)
