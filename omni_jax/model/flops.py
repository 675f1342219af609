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


def operations(config: ModelConfig, terms: Terms) -> Work:
    """Returns the operations of a forward through these terms."""
    sizes = matrix_sizes(config)
    return sum((term_operations(sizes, term) for term in terms), Work())


def term_operations(sizes: Mapping[str, int], term: Maps | Attention) -> Work:
    """Returns the operations of one term's forward, its matrices as large as `sizes` says."""
    if isinstance(term, Attention):
        return term.pairs * (4.0 * term.width)
    return term.tokens * (2.0 * sum(sizes.get(path, 0) for path in term.paths))


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
