"""The audio tower: log-mel chunks in, 50 tokens a chunk out. Convolution and attention never leave a chunk.

Letters: N chunks, F mel frames (200), T convolved frames (100), C tower width, D output width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from flax import nnx

from omni_jax.config import AudioConfig
from omni_jax.model.layers import WEIGHT_INIT, ZEROS, LayerNorm, Linear, ParamFactory, attend, gelu, scan_layers, split_heads
from omni_jax.parallel import constrain


class Conv3(nnx.Module):
    """Convolution over time, kernel 3, one frame of zeros on each side."""

    def __init__(self, make: ParamFactory, inputs: int, outputs: int, stride: int):
        self.kernel = make.param((3, inputs, outputs), ("kernel", None, "embed"), WEIGHT_INIT)
        self.bias = make.param((outputs,), ("embed",), ZEROS)
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, F, in) -> (N, F / stride, out). Three shifted products: plain matrix multiplications on every backend."""
        frames = x.shape[1]
        padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
        taps = [padded[:, k : k + frames : self.stride] for k in range(3)]
        kernel = self.kernel[...].astype(x.dtype)
        return jnp.concatenate(taps, axis=-1) @ kernel.reshape(-1, kernel.shape[-1]) + self.bias[...].astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head attention; k has no bias."""

    def __init__(self, make: ParamFactory, config: AudioConfig):
        width = config.hidden_size
        self.q = Linear(make / "q", width, width, ("embed", "heads"))
        self.k = Linear(make / "k", width, width, ("embed", "heads"), bias=False)
        self.v = Linear(make / "v", width, width, ("embed", "heads"))
        self.out = Linear(make / "out", width, width, ("heads", "embed"))
        self.num_heads = config.num_heads

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        q, k, v = (split_heads(f(x), self.num_heads) for f in (self.q, self.k, self.v))
        return self.out(attend(q, k, v, mask))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + fc2(gelu(fc1(norm(x))))."""

    def __init__(self, make: ParamFactory, config: AudioConfig):
        self.norm1 = LayerNorm(make, config.hidden_size, config.norm_eps)
        self.attn = Attention(make / "attn", config)
        self.norm2 = LayerNorm(make, config.hidden_size, config.norm_eps)
        self.fc1 = Linear(make / "fc1", config.hidden_size, config.intermediate_size, ("embed", "mlp"))
        self.fc2 = Linear(make / "fc2", config.intermediate_size, config.hidden_size, ("mlp", "embed"))

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.fc2(gelu(self.fc1(self.norm2(x))))


def sinusoids(length: int, width: int) -> np.ndarray:
    """Returns Whisper's fixed positions (length, width) float32: sines, then cosines, wavelengths from 2 pi to 10,000 x 2 pi."""
    step = np.log(10000.0) / (width // 2 - 1)
    inverse = np.exp(-step * np.arange(width // 2, dtype=np.float32)).astype(np.float32)
    angles = np.arange(length, dtype=np.float32)[:, None] * inverse
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


class AudioTower(nnx.Module):
    """Whisper-style encoder on chunks of 200 log-mel frames."""

    def __init__(self, make: ParamFactory, config: AudioConfig):
        width = config.hidden_size
        self.conv1 = Conv3(make, config.num_mel_bins, width, stride=1)
        self.conv2 = Conv3(make, width, width, stride=2)
        self.layers = Block((make / "layers").stack(config.num_layers), config)
        self.norm = LayerNorm(make, width, config.norm_eps)
        self.proj = Linear(make / "proj", width, config.output_size, ("mlp", "embed"))
        self.config = config

    def __call__(self, mel: jax.Array, frames: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
        """Returns (N, 50, D). Of a chunk with F valid frames the first ((F-1)//2 + 1) // 2 tokens mean something.

        Args:
          mel: (N, 200, 128) log-mel, zero beyond the valid frames; frames: (N,) int32.
        """
        valid = jnp.arange(mel.shape[1]) < frames[:, None]
        x = jnp.where(valid[..., None], mel, 0).astype(dtype)
        x = jnp.where(valid[..., None], gelu(self.conv1(x)), 0)
        x = gelu(self.conv2(x))
        x = x + jnp.asarray(sinusoids(x.shape[1], x.shape[2]), dtype)
        x = constrain(x, "batch", "tokens", "features")
        seen = jnp.arange(x.shape[1]) < ((frames - 1) // 2 + 1)[:, None]
        # A chunk of padding alone sees itself, so that no softmax is empty.
        mask = seen[:, None, :] | ~seen[:, :, None]

        def body(block: Block, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return constrain(block(x, mask), "batch", "tokens", "features"), None

        x, _ = scan_layers(self.layers, body, x)
        # Pinned again: left to itself, the compiler lays the last carry out by its reader's weights, and on some meshes gets it wrong.
        x = constrain(x, "batch", "tokens", "features")
        return self.proj(self.norm(reduce(x, "n (t pair) c -> n t c", "mean", pair=2)))
