"""The vision tower: temporal grid steps in, merged tokens out.

Every attention stays within one temporal step, so a step is a row of the batch. A step holds a few hundred patches, where a masked
P x P attention costs a few percent of the linear maps and any frame shape fits one bucket; windows are therefore a mask, not a reshape.

Letters: N temporal steps, P patches, C tower width, h head width, D output width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from omni_jax.config import VisionConfig
from omni_jax.model.layers import WEIGHT_INIT, Linear, ParamFactory, RMSNorm, SwiGLU, attend, gelu, scan_layers, split_heads
from omni_jax.model.rope import rotate, vision_angles
from omni_jax.parallel import constrain


class PatchEmbed(nnx.Module):
    """A bias-free projection of flattened patches."""

    def __init__(self, make: ParamFactory, inputs: int, outputs: int):
        self.kernel = make.param((inputs, outputs), ("patch", "embed"), WEIGHT_INIT)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[...].astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head attention with 2-D rotary positions."""

    def __init__(self, make: ParamFactory, config: VisionConfig):
        width = config.hidden_size
        self.q = Linear(make / "q", width, width, ("embed", "heads"))
        self.k = Linear(make / "k", width, width, ("embed", "heads"))
        self.v = Linear(make / "v", width, width, ("embed", "heads"))
        self.proj = Linear(make / "proj", width, width, ("heads", "embed"))
        self.num_heads = config.num_heads

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, mask: jax.Array) -> jax.Array:
        q = rotate(split_heads(self.q(x), self.num_heads), cos, sin)
        k = rotate(split_heads(self.k(x), self.num_heads), cos, sin)
        return self.proj(attend(q, k, split_heads(self.v(x), self.num_heads), mask))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, make: ParamFactory, config: VisionConfig):
        self.norm1 = RMSNorm(make, config.hidden_size, config.norm_eps)
        self.attn = Attention(make / "attn", config)
        self.norm2 = RMSNorm(make, config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(make / "mlp", config.hidden_size, config.intermediate_size, bias=True)

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attn(self.norm1(x), cos, sin, mask)
        return x + self.mlp(self.norm2(x))


class Merger(nnx.Module):
    """Joins each 2x2 group of patches (neighbouring rows of the batch) into one token of the decoder's width."""

    def __init__(self, make: ParamFactory, config: VisionConfig):
        joined = config.hidden_size * config.merge_size**2
        self.norm = RMSNorm(make, config.hidden_size, config.norm_eps)
        self.fc1 = Linear(make / "fc1", joined, joined, ("embed", "mlp"))
        self.fc2 = Linear(make / "fc2", joined, config.output_size, ("mlp", "embed"))
        self.group = config.merge_size**2

    def __call__(self, x: jax.Array) -> jax.Array:
        x = rearrange(self.norm(x), "n (token group) c -> n token (group c)", group=self.group)
        return self.fc2(gelu(self.fc1(x)))


class VisionTower(nnx.Module):
    """Qwen2.5-VL's vision encoder on padded temporal steps."""

    def __init__(self, make: ParamFactory, config: VisionConfig):
        self.patch_embed = PatchEmbed(make, config.patch_values, config.hidden_size)
        self.layers = Block((make / "layers").stack(config.num_layers), config)
        self.merger = Merger(make / "merger", config)
        self.config = config

    def __call__(self, patches: jax.Array, coords: jax.Array, window: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
        """Returns (N, P/4, D): the merged tokens of each step, padding included.

        Args:
          patches: (N, P, 1176), coords: (N, P, 2) int32, window: (N, P) int32, as in `types.VisionBatch`.
        """
        x = constrain(self.patch_embed(patches.astype(dtype)), "batch", "tokens", "features")
        angles = vision_angles(coords, self.config.head_dim, self.config.rope_theta)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        within_window = window[:, :, None] == window[:, None, :]
        within_step = (window >= 0)[:, :, None] == (window >= 0)[:, None, :]
        full = np.isin(np.arange(self.config.num_layers), self.config.full_attention_layers)

        def body(block: Block, x: jax.Array, full: jax.Array) -> tuple[jax.Array, None]:
            mask = jnp.where(full, within_step, within_window)
            return constrain(block(x, cos, sin, mask), "batch", "tokens", "features"), None

        x, _ = scan_layers(self.layers, body, x, jnp.asarray(full))
        return self.merger(constrain(x, "batch", "tokens", "features"))
