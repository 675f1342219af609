"""Floating-point operations of a forward, counted from shapes (see `omni_jax.towers.work`): matrices, decoder, bridge and head.

Letters: S tokens, K prompts per row, L layers, D decoder width.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np

from omni_jax.config import ModelConfig
from omni_jax.model.encoder import abstract_params
from omni_jax.model.layers import causal_blocks
from omni_jax.towers import NAMES
from omni_jax.towers.work import Attention, FlopCount, LinearOps, Terms

PARTS = (*NAMES, "bridge", "decoder", "head")


def operations(config: ModelConfig, terms: Terms) -> FlopCount:
    """Returns the operations of a forward through these terms."""
    sizes = matrix_sizes(config)
    return sum((term_operations(sizes, term) for term in terms), FlopCount())


def term_operations(sizes: Mapping[str, int], term: LinearOps | Attention) -> FlopCount:
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


def bridge_terms(tokens: FlopCount) -> Terms:
    """Returns the bridge from BEATs to the decoder on so many tokens."""
    return [LinearOps(("bridge",), tokens)]


def decoder_terms(config: ModelConfig, tokens: FlopCount, pairs: FlopCount, last: tuple[FlopCount, FlopCount] | None = None) -> Terms:
    """Returns the decoder's layers on so many tokens; `pairs` are those of one layer.

    Args:
      last: tokens and pairs for which the last layer computes more than keys and values; None: for all.
    """
    layers = config.decoder.num_layers
    last_tokens, last_pairs = last or (tokens, pairs)
    keys = ("decoder/layers/attn/k", "decoder/layers/attn/v")
    others = ("decoder/layers/attn/q", "decoder/layers/attn/o", "decoder/layers/mlp")
    within = tokens * ((layers - 1) / layers) + last_tokens * (1 / layers)
    return [LinearOps(keys, tokens), LinearOps(others, within), Attention(config.decoder.hidden_size, pairs * (layers - 1) + last_pairs)]


def head_terms(prompts: FlopCount) -> Terms:
    """Returns the fusion head on so many prompts."""
    return [LinearOps(("head",), prompts)]


def row_pairs(tokens: int, causal: bool = True) -> int:
    """Returns the query-key pairs that `attend_causal` multiplies for a row of so many tokens; all where attention is not causal."""
    if not causal:
        return tokens**2
    return sum((stop - start) * stop for start, stop in causal_blocks(tokens))
