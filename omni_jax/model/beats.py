"""BEATs: Kaldi fbank in, one feature per 16 x 16 patch out, with gated relative positions and deep norm.

Source: SPEC section 1 (settings and formulas of the published encoder).

Letters: N segments, F fbank frames, T patches (time-major, frequency minor), E patch width, C width, H heads, h head width.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from flax import nnx

from omni_jax.config import BeatsConfig
from omni_jax.model.decoder import Embed
from omni_jax.model.layers import (
    LONGEST_BLOCK,
    ONES,
    WEIGHT_INIT,
    ZEROS,
    LayerNorm,
    Linear,
    ParamFactory,
    attend,
    gelu,
    query_blocks,
    scan_layers,
    split_heads,
)
from omni_jax.parallel import constrain

PositionBias = Callable[[int, int], jax.Array]
"""Bias (H, stop - start, T) of the queries from start to stop against all keys."""


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Returns bucket numbers (2*length - 1,) int32 of the distances key - query = -(length-1) .. length-1.

    As in T5, both directions: half the buckets for each sign, exact below a quarter of `num_buckets`, logarithmic up to `max_distance`.
    """
    distance = np.arange(-(length - 1), length)
    half = num_buckets // 2
    exact = half // 2
    size = np.abs(distance)
    # In float32 throughout, as the published encoder: where a distance falls on the edge of a bucket, the rounding decides.
    large = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact)) / np.float32(np.log(max_distance / exact))
    large = large * np.float32(half - exact)
    bucket = np.where(size < exact, size, np.minimum(exact + large.astype(np.int64), half - 1))
    return (bucket + np.where(distance > 0, half, 0)).astype(np.int32)


class PositionConv(nnx.Module):
    """Grouped convolution over time whose kernel is g * v / ||v||, the norm taken per kernel tap."""

    def __init__(self, make: ParamFactory, config: BeatsConfig):
        width = config.hidden_size
        self.v = make.param((config.conv_pos, width // config.conv_pos_groups, width), ("kernel", None, None), WEIGHT_INIT)
        self.g = make.param((config.conv_pos,), ("kernel",), ONES)
        self.bias = make.param((width,), ("norm",), ZEROS)
        self.groups = config.conv_pos_groups

    def kernel(self) -> jax.Array:
        """(taps, C/groups, C) float32."""
        v = self.v[...].astype(jnp.float32)
        norm = jnp.sqrt(jnp.sum(jnp.square(v), axis=(1, 2), keepdims=True))
        return self.g[...].astype(jnp.float32)[:, None, None] * v / norm

    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, T, C) -> (N, T, C): half the taps of zeros on both sides, the surplus last output of an even kernel dropped."""
        taps = self.v.shape[0]
        # A convolution for each group: of one with feature_group_count XLA's partitioner adds the kernel's gradient up once for every
        # shard of a mesh axis on which nothing here is split.
        inputs, kernels = jnp.split(x, self.groups, axis=-1), jnp.split(self.kernel().astype(x.dtype), self.groups, axis=-1)
        parts = [
            jax.lax.conv_general_dilated(
                part, kernel, window_strides=(1,), padding=[(taps // 2, taps // 2 - 1 + taps % 2)], dimension_numbers=("NWC", "WIO", "NWC")
            )
            for part, kernel in zip(inputs, kernels, strict=True)
        ]
        return jnp.concatenate(parts, axis=-1) + self.bias[...].astype(x.dtype)


class Attention(nnx.Module):
    """Attention whose relative-position bias is scaled per query and head by a gate on the query."""

    def __init__(self, make: ParamFactory, config: BeatsConfig):
        width = config.hidden_size
        self.q = Linear(make / "q", width, width, ("embed", "heads"))
        self.k = Linear(make / "k", width, width, ("embed", "heads"))
        self.v = Linear(make / "v", width, width, ("embed", "heads"))
        self.out = Linear(make / "out", width, width, ("heads", "embed"))
        self.gate = Linear(make / "gate", config.head_dim, 8, (None, None))
        self.gate_scale = make.param((config.num_heads,), (None,), ONES)
        self.num_heads = config.num_heads

    def __call__(self, x: jax.Array, position_bias: PositionBias, mask: jax.Array) -> jax.Array:
        """x (N, T, C), position_bias (start, stop) -> (H, stop - start, T) float32, mask (N, T, T) -> (N, T, C)."""
        q = split_heads(self.q(x), self.num_heads)
        gates = self.gate(q)
        gates = jax.nn.sigmoid(reduce(gates, "n t h (gate four) -> n t h gate", "sum", four=4).astype(jnp.float32))
        gate = gates[..., 0] * (gates[..., 1] * self.gate_scale[...].astype(jnp.float32) - 1.0) + 2.0
        gate = rearrange(gate, "n t h -> n h t 1")
        k, v = split_heads(self.k(x), self.num_heads), split_heads(self.v(x), self.num_heads)
        blocks = [
            attend(q[:, i:j], k, v, mask[:, i:j], gate[:, :, i:j] * position_bias(i, j)) for i, j in query_blocks(x.shape[1], LONGEST_BLOCK)
        ]
        return self.out(jnp.concatenate(blocks, axis=1))


class Block(nnx.Module):
    """Post-norm block with the residual branch scaled by the deep-norm factor."""

    def __init__(self, make: ParamFactory, config: BeatsConfig):
        self.attn = Attention(make / "attn", config)
        self.norm1 = LayerNorm(make, config.hidden_size, config.norm_eps)
        self.fc1 = Linear(make / "fc1", config.hidden_size, config.intermediate_size, ("embed", "mlp"))
        self.fc2 = Linear(make / "fc2", config.intermediate_size, config.hidden_size, ("mlp", "embed"))
        self.norm2 = LayerNorm(make, config.hidden_size, config.norm_eps)
        self.residual_scale = config.residual_scale

    def __call__(self, x: jax.Array, position_bias: PositionBias, mask: jax.Array) -> jax.Array:
        x = self.norm1(x * self.residual_scale + self.attn(x, position_bias, mask))
        return self.norm2(x * self.residual_scale + self.fc2(gelu(self.fc1(x))))


class Beats(nnx.Module):
    """The BEATs encoder."""

    def __init__(self, make: ParamFactory, config: BeatsConfig):
        self.patch_embed = Linear(make / "patch_embed", config.patch_size**2, config.embed_dim, ("patch", "embed"), bias=config.conv_bias)
        self.norm_patches = LayerNorm(make, config.embed_dim, config.norm_eps)
        project = config.has_input_projection
        self.input_proj = Linear(make / "input_proj", config.embed_dim, config.hidden_size, ("mlp", "embed")) if project else None
        self.pos_conv = PositionConv(make, config)
        self.norm = LayerNorm(make, config.hidden_size, config.norm_eps)
        self.relative_bias = Embed(make, config.num_buckets, config.num_heads, ("table", "norm"))
        self.layers = Block((make / "layers").stack(config.num_layers), config)
        self.config = config

    def __call__(self, fbank: jax.Array, frames: jax.Array, *, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Returns features (N, T, C), zero beyond the valid patches, and the valid patches (N,) int32.

        Args:
          fbank: (N, F, 128) normalised fbank, F a multiple of 16; frames: (N,) int32 valid frames, of which whole patches count.
        """
        side = self.config.patch_size
        x = rearrange(fbank, "n (t p) (f q) -> n (t f) (p q)", p=side, q=side).astype(dtype)
        patches = (frames // side) * (fbank.shape[2] // side)
        valid = jnp.arange(x.shape[1]) < patches[:, None]

        x = self.norm_patches(self.patch_embed(x))
        if self.input_proj is not None:
            x = self.input_proj(x)
        x = jnp.where(valid[..., None], x, 0)
        x = constrain(self.norm(x + gelu(self.pos_conv(x))), "batch", "tokens", "features")

        position_bias = self._position_bias(x.shape[1])
        mask = valid[:, None, :] | ~valid[:, :, None]

        def body(block: Block, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return constrain(block(x, position_bias, mask), "batch", "tokens", "features"), None

        x, _ = scan_layers(self.layers, body, x)
        return constrain(jnp.where(valid[..., None], x, 0), "batch", "tokens", "features"), patches

    def _position_bias(self, tokens: int) -> PositionBias:
        """Returns the function that gives the relative-position bias of a block of queries."""
        buckets = relative_buckets(tokens, self.config.num_buckets, self.config.max_distance)
        by_distance = self.relative_bias(jnp.asarray(buckets), jnp.float32)

        def block(start: int, stop: int) -> jax.Array:
            distance = jnp.arange(tokens)[None, :] - jnp.arange(start, stop)[:, None]
            return rearrange(by_distance[distance + tokens - 1], "query key heads -> heads query key")

        if tokens > LONGEST_BLOCK:
            return block  # made again in every layer: all of it at once would be heads x tokens x tokens
        whole = block(0, tokens)
        return lambda start, stop: whole[:, start:stop]


class BeatsProjector(nnx.Module):
    """Brings BEATs features to the audio tower's rate and the decoder's width: pairs averaged, layer norm, two linear maps."""

    def __init__(self, make: ParamFactory, width: int, output: int, eps: float = 1e-5):
        self.norm = LayerNorm(make, width, eps)
        self.fc1 = Linear(make / "fc1", width, output, (None, "mlp"))
        self.fc2 = Linear(make / "fc2", output, output, ("mlp", "embed"))

    def __call__(self, features: jax.Array, tokens: int) -> jax.Array:
        """(N, T, C) -> (N, tokens, D): cut or zero-padded to 2 * tokens rows, neighbours averaged."""
        rows = 2 * tokens
        x = jnp.pad(features[:, :rows], ((0, 0), (0, max(0, rows - features.shape[1])), (0, 0)))
        x = reduce(x, "n (t pair) c -> n t c", "mean", pair=2)
        return self.fc2(gelu(self.fc1(self.norm(x))))
