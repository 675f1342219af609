"""The text decoder: packed rows in, one pooled vector per layer and prompt out.

Letters: R rows, S tokens, K pooled prompts per row, D width, H heads, h head width, L layers, V vocabulary, M media tokens,
G media tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from omni_jax.config import DecoderConfig
from omni_jax.model.attention import BRANCHES, RowAttention, pooled_attention, row_attention
from omni_jax.model.layers import (
    WEIGHT_INIT,
    Linear,
    ParamFactory,
    Remat,
    RMSNorm,
    SwiGLU,
    materialize_gradient,
    query_blocks,
    run_layer,
    scan_layers,
    split_heads,
)
from omni_jax.model.rope import rotate, tmrope_angles
from omni_jax.parallel import batch_shards, constrain

LARGEST_EXCHANGE = 2**27
"""Bytes that a device receives at once when token embeddings come to their rows; more go in pieces."""

Pick = Callable[[jax.Array], jax.Array]
Turn = Callable[[jax.Array, Pick], jax.Array]
"""Rotates (B, S, H, h) by the angles of the tokens that are picked."""


def _all(x: jax.Array) -> jax.Array:
    return x


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, make: ParamFactory, config: DecoderConfig):
        width, kv_width = config.hidden_size, config.num_kv_heads * config.head_dim
        self.q = Linear(make / "q", width, width, ("embed", "heads"))
        self.k = Linear(make / "k", width, kv_width, ("embed", "heads"))
        self.v = Linear(make / "v", width, kv_width, ("embed", "heads"))
        self.o = Linear(make / "o", width, width, ("heads", "embed"), bias=False)
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads

    def __call__(self, x: jax.Array, turn: Turn, attend: RowAttention, key: jax.Array | None, pick: Pick = _all) -> jax.Array:
        q, k, v = (materialize_gradient(part) for part in (self.q(pick(x), key), self.k(x, key), self.v(x, key)))
        q = turn(split_heads(q, self.num_heads), pick)
        k = turn(split_heads(k, self.num_kv_heads), _all)
        v = split_heads(v, self.num_kv_heads)
        return self.o(attend(q, k, v), key)


class Layer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), of the tokens that `pick` takes out of (R, S, ...)."""

    def __init__(self, make: ParamFactory, config: DecoderConfig):
        self.norm_attn = RMSNorm(make, config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(make / "attn", config)
        self.norm_mlp = RMSNorm(make, config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(make / "mlp", config.hidden_size, config.intermediate_size, bias=False)

    def __call__(self, x: jax.Array, turn: Turn, attend: RowAttention, key: jax.Array | None, pick: Pick = _all) -> jax.Array:
        x = pick(x) + self.attn(self.norm_attn(x), turn, attend, key, pick)
        return x + self.mlp(self.norm_mlp(x), key)


class Embed(nnx.Module):
    """Token embedding table (V, D)."""

    def __init__(self, make: ParamFactory, rows: int, width: int, axes: tuple[str, str] = ("vocab", "embed")):
        self.embedding = make.param((rows, width), axes, WEIGHT_INIT)

    def __call__(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return self.embedding[...][ids].astype(dtype)


def read_media(media: jax.Array, index: jax.Array) -> jax.Array:
    """Returns (R, S, D): rows `index` (R, S) of one table (M, D), or of the table (G, M, D) that each R / G consecutive rows have."""
    if media.ndim == 2:
        return media[index]
    # Indices within a table keep the gather on the device that holds the clip.
    tables = jax.vmap(lambda table, rows: table[rows])(media, index.reshape(media.shape[0], -1))
    return tables.reshape(*index.shape, media.shape[-1])


def segment_means(x: jax.Array, segment: jax.Array, pool: jax.Array) -> jax.Array:
    """Returns (R, K, D) float32: the mean of x (R, S, D) over the segment (R, S) that each token of `pool` (R, K) is in."""
    member = segment[:, None, :] == jnp.take_along_axis(segment, pool, axis=1)[..., None]
    # A sum of products, as a matrix product; at full precision also where the states are bfloat16.
    total = jnp.einsum("rks,rsd->rkd", member.astype(x.dtype), x, preferred_element_type=jnp.float32)
    return total / member.sum(axis=-1, dtype=jnp.float32)[..., None]


class Decoder(nnx.Module):
    """Qwen2.5 decoder with TMRoPE that keeps nothing of a layer but the pooled tokens, and computes of the last layer nothing else."""

    def __init__(self, make: ParamFactory, config: DecoderConfig, *, causal: bool = True, mean: bool = False):
        """Takes whether attention is causal, and whether a prompt is pooled as the mean of its tokens after the last layer."""
        self.embed = Embed(make, config.vocab_size, config.hidden_size)
        self.layers = Layer((make / "layers").stack(config.num_layers), config)
        self.norm = RMSNorm(make, config.hidden_size, config.rms_norm_eps)
        self.config = config
        self.causal, self.mean = causal, mean

    def __call__(
        self,
        ids: jax.Array,
        media_index: jax.Array,
        positions: jax.Array,
        segment: jax.Array,
        branch: jax.Array,
        pool: jax.Array,
        media: jax.Array,
        *,
        dtype: jnp.dtype,
        dropout_key: jax.Array | None = None,
        remat: Remat = None,
        attention: str = "plain",
        branches: int = BRANCHES,
        reach: int = 0,
        frozen: bool = True,
    ) -> jax.Array:
        """Returns the pooled hidden states (R, K, L, D): layers 1 .. L-1 as they are, layer L after the final norm.

        A decoder that pools means returns (R, K, 1, D): of the final norm's states over the segment that the pooled token is in.

        Args:
          ids, media_index, segment, branch: (R, S) int32, as in `types.RowBatch`.
          positions: (3, R, S) int32.
          pool: (R, K) int32, the token pooled for each prompt.
          media: (M, D) media tokens that `media_index` points into, or (G, M, D): one table for each R / G consecutive rows.
          dropout_key: turns LoRA dropout on.
          remat: what the layers keep for the backward pass.
          attention, branches, reach: kernel, largest branch number and length of prompts, as in `attention.row_attention`.
          frozen: whether no gradient is asked of the layers' weights but LoRA's. Both values give the same numbers.
        """
        x = self._look_up(ids, dtype)
        if media.shape[-2]:
            x = jnp.where(media_index[..., None] >= 0, read_media(media.astype(dtype), jnp.maximum(media_index, 0)), x)
        x = constrain(x, "batch", "tokens", "features")
        angles = tmrope_angles(positions, self.config.head_dim, self.config.rope_theta, self.config.mrope_sections)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        attend = row_attention(segment, branch, kernel=attention, branches=branches, causal=self.causal, reach=reach)
        layers = self.config.num_layers
        keys = None if dropout_key is None else jax.random.split(dropout_key, layers)

        def turn(x: jax.Array, pick: Pick) -> jax.Array:
            return rotate(x, pick(cos), pick(sin), product=attention.startswith("splash"))

        def pick(x: jax.Array) -> jax.Array:
            return constrain(jnp.take_along_axis(x, pool[..., None], axis=1), "batch", None, None)

        def body(layer: Layer, x: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
            x = constrain(layer(checkpoint_name(x, "layer_input"), turn, attend, key), "batch", "tokens", "features")
            return x, None if self.mean else pick(x)

        if self.mean:
            x, _ = scan_layers(self.layers, body, x, keys, remat)
            pooled = segment_means(self.norm(x), segment, pool)[:, :, None]
            return constrain(pooled, "batch", None, None, None)

        # Nothing reads the other tokens of the last layer: of them it needs keys and values alone.
        attend_pooled = pooled_attention(segment, branch, pool, causal=self.causal)

        def ending(layer: Layer, x: jax.Array, key: jax.Array | None) -> jax.Array:
            return layer(checkpoint_name(x, "layer_input"), turn, attend_pooled, key, pick)

        x, pooled = scan_layers(self.layers, body, x, keys, remat, count=layers - 1, in_place=_base_weights if frozen else False)
        last = run_layer(self.layers, layers - 1, ending, x, None if keys is None else keys[-1], remat)
        pooled = jnp.moveaxis(jnp.concatenate([pooled, self.norm(last)[None]]), 0, 2)
        return constrain(pooled, "batch", None, None, None)

    def _look_up(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Token embeddings (R, S, D). Looked up in the parts of the table's width, over fsdp, then exchanged."""
        width, itemsize = self.config.hidden_size, jnp.dtype(dtype).itemsize
        mesh = jax.sharding.get_abstract_mesh()
        shards = 1 if mesh.empty else batch_shards(mesh)
        pieces = -(-ids.size * width * itemsize // (shards * LARGEST_EXCHANGE))
        found = []
        for start, stop in query_blocks(ids.shape[1], -(-ids.shape[1] // pieces)):
            part = constrain(ids[:, start:stop], "batch_data", "tokens")
            rows = constrain(self.embed(part, dtype), "batch_data", "tokens", "embed")
            found.append(constrain(rows, "batch", "tokens", "features"))
        return found[0] if len(found) == 1 else jnp.concatenate(found, axis=1)


def _base_weights(path: tuple[Any, ...], _: Any) -> bool:
    """Picks all of a layer's parameters but the adapters'."""
    return not str(path[-1]).startswith("lora_")
