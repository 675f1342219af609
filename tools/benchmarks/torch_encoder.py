"""The encoder's forward in plain torch modules: what the benchmarks run beside omni_jax, on the same arrays, with the same work.

Parameter names and layouts are those of a released checkpoint, so that one state dict fills this and the `transformers` thinker.

Letters: N items, P patches, F frames, T positions, R rows, S tokens, K prompts per row, L layers, C tower width, D decoder width,
H heads, h head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, gelu, linear, pad, scaled_dot_product_attention, silu

from omni_jax.config import AudioConfig, BeatsConfig, DecoderConfig, ModelConfig, VisionConfig


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return torch.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class SwiGLU(nn.Module):
    def __init__(self, width: int, inner: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias)
        self.up_proj = nn.Linear(width, inner, bias)
        self.down_proj = nn.Linear(inner, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


def heads(x: Tensor, count: int) -> Tensor:
    """(N, T, H*h) -> (N, H, T, h)."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    """(N, H, T, h) -> (N, T, H*h)."""
    return x.transpose(1, 2).flatten(2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x (N, H, T, h); cos and sin are (N, 1, T, h) in the dtype of x."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def turns(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine (N, 1, T, h) of angles (N, T, h/2)."""
    both = torch.cat([angles, angles], dim=-1)[:, None]
    return both.cos().to(dtype), both.sin().to(dtype)


def frequencies(width: int, theta: float, device: torch.device) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)


class DecoderAttention(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        width, kv_width = config.hidden_size, config.num_kv_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, kv_width), nn.Linear(width, kv_width)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.counts = (config.num_heads, config.num_kv_heads)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        many, few = self.counts
        q, k, v = heads(self.q_proj(x), many), heads(self.k_proj(x), few), heads(self.v_proj(x), few)
        # Rows are padded on the right, so that causality alone hides the padding and the fastest kernels apply.
        return self.o_proj(
            join(scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=many != few))
        )


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DecoderAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.config = config

    def forward(self, ids: Tensor, media_index: Tensor, positions: Tensor, pool: Tensor, media: Tensor) -> Tensor:
        """Returns the pooled states (R, K, L, D) of rows that hold one segment each, padded on the right."""
        x = torch.where(media_index[..., None] >= 0, media[media_index.clamp(min=0)], self.embed_tokens(ids))
        axis = torch.arange(3, device=ids.device).repeat_interleave(torch.tensor(self.config.mrope_sections, device=ids.device))
        inverse = frequencies(self.config.head_dim, self.config.rope_theta, ids.device)
        cos, sin = turns(positions.float()[axis].permute(1, 2, 0) * inverse, x.dtype)
        index = pool.long()[..., None].expand(-1, -1, x.shape[-1])
        pooled = []
        for layer in self.layers:
            x = layer(x, cos, sin)
            pooled.append(x.gather(1, index))
        pooled[-1] = self.norm(pooled[-1])
        return torch.stack(pooled, dim=2)


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4))
        self.count = config.num_heads

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (heads(f(x), self.count) for f in (self.q, self.k, self.v))
        return self.proj(join(scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, attn_mask=mask)))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(config.hidden_size, config.norm_eps), RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = VisionAttention(config)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, mask)
        return x + self.mlp(self.norm2(x))


class Vision(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        side, joined = config.patch_size, config.hidden_size * config.merge_size**2
        self.patch_embed = nn.Module()
        kernel = (config.temporal_patch_size, side, side)
        self.patch_embed.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel, stride=kernel, bias=False)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_layers))
        self.merger = nn.Module()
        self.merger.ln_q = RMSNorm(config.hidden_size, config.norm_eps)
        self.merger.mlp = nn.Sequential(nn.Linear(joined, joined), nn.GELU(), nn.Linear(joined, config.output_size))
        self.config = config

    def forward(self, patches: Tensor, coords: Tensor, window: Tensor) -> Tensor:
        """(N, P, 1176) and the layout of each step -> (N, P/4, D)."""
        cfg = self.config
        weight: Any = self.patch_embed.proj.weight  # pyright: ignore[reportAttributeAccessIssue]
        x = linear(patches.to(weight.dtype), weight.flatten(1))
        angles = coords.float()[..., None] * frequencies(cfg.head_dim // 2, cfg.rope_theta, coords.device)
        cos, sin = turns(angles.flatten(2), x.dtype)
        same = window[:, None, :, None] == window[:, None, None, :]
        valid = window >= 0
        step = valid[:, None, :, None] == valid[:, None, None, :]
        for number, block in enumerate(self.blocks):
            x = block(x, cos, sin, step if number in cfg.full_attention_layers else same)
        x = self.merger.ln_q(x)  # pyright: ignore[reportCallIssue]
        return self.merger.mlp(x.reshape(x.shape[0], -1, x.shape[2] * cfg.merge_size**2))  # pyright: ignore[reportCallIssue]


class AudioAttention(nn.Module):
    def __init__(self, config: AudioConfig):
        super().__init__()
        width = config.hidden_size
        self.q_proj, self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.count = config.num_heads

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (heads(f(x), self.count) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(join(scaled_dot_product_attention(q, k, v, attn_mask=mask)))


class AudioLayer(nn.Module):
    def __init__(self, config: AudioConfig):
        super().__init__()
        width = config.hidden_size
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(width, config.norm_eps), nn.LayerNorm(width, config.norm_eps)
        self.self_attn = AudioAttention(config)
        self.fc1, self.fc2 = nn.Linear(width, config.intermediate_size), nn.Linear(config.intermediate_size, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask)
        return x + self.fc2(gelu(self.fc1(self.final_layer_norm(x))))


class Audio(nn.Module):
    def __init__(self, config: AudioConfig):
        super().__init__()
        width = config.hidden_size
        self.conv1 = nn.Conv1d(config.num_mel_bins, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.layers = nn.ModuleList(AudioLayer(config) for _ in range(config.num_layers))
        self.ln_post = nn.LayerNorm(width, config.norm_eps)
        self.proj = nn.Linear(width, config.output_size)
        self.config = config

    def forward(self, mel: Tensor, frames: Tensor, whole: bool) -> Tensor:
        """(N, 200, 128) -> (N, 50, D); `whole`: every chunk is full, so that no mask is needed."""
        dtype = self.conv1.weight.dtype
        valid = (torch.arange(mel.shape[1], device=mel.device) < frames[:, None])[:, None]
        x = gelu(self.conv1(mel.to(dtype).transpose(1, 2) * valid)) * valid
        x = gelu(self.conv2(x)).transpose(1, 2)
        half = x.shape[2] // 2
        inverse = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, device=x.device))
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * inverse
        x = x + torch.cat([angles.sin(), angles.cos()], dim=1).to(dtype)
        mask = None
        if not whole:
            seen = torch.arange(x.shape[1], device=x.device) < ((frames - 1) // 2 + 1)[:, None]
            mask = (seen[:, None, :] | ~seen[:, :, None])[:, None]
        for layer in self.layers:
            x = layer(x, mask)
        return self.proj(self.ln_post(x.unflatten(1, (-1, 2)).mean(2)))


class BeatsAttention(nn.Module):
    def __init__(self, config: BeatsConfig, first: bool):
        super().__init__()
        width = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.grep_linear = nn.Linear(config.head_dim, 8)
        self.grep_a = nn.Parameter(torch.ones(1, config.num_heads, 1, 1))
        if first:
            self.relative_attention_bias = nn.Embedding(config.num_buckets, config.num_heads)
        self.count = config.num_heads

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = heads(self.q_proj(x), self.count), heads(self.k_proj(x), self.count), heads(self.v_proj(x), self.count)
        g1, g2 = self.grep_linear(q).unflatten(-1, (2, 4)).sum(-1).sigmoid().split(1, dim=-1)
        gate = g1 * (g2 * self.grep_a - 1.0) + 2.0
        return self.out_proj(join(scaled_dot_product_attention(q, k, v, attn_mask=gate * bias)))


class BeatsLayer(nn.Module):
    def __init__(self, config: BeatsConfig, first: bool):
        super().__init__()
        width = config.hidden_size
        self.self_attn = BeatsAttention(config, first)
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(width, config.norm_eps), nn.LayerNorm(width, config.norm_eps)
        self.fc1, self.fc2 = nn.Linear(width, config.intermediate_size), nn.Linear(config.intermediate_size, width)
        self.scale = config.residual_scale

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.self_attn_layer_norm(x * self.scale + self.self_attn(x, bias))
        return self.final_layer_norm(x * self.scale + self.fc2(gelu(self.fc1(x))))


class PositionConv(nn.Module):
    def __init__(self, config: BeatsConfig):
        super().__init__()
        width, taps = config.hidden_size, config.conv_pos
        self.weight_v = nn.Parameter(torch.empty(width, width // config.conv_pos_groups, taps))
        self.weight_g = nn.Parameter(torch.ones(1, 1, taps))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.normal_(self.weight_v, std=0.02)
        self.groups = config.conv_pos_groups

    def forward(self, x: Tensor) -> Tensor:
        taps = self.weight_v.shape[2]
        kernel = self.weight_g * self.weight_v / self.weight_v.norm(dim=(0, 1), keepdim=True)
        y = conv1d(x.transpose(1, 2), kernel, self.bias, padding=taps // 2, groups=self.groups)
        return gelu(y[:, :, : x.shape[1]]).transpose(1, 2)


class BeatsEncoder(nn.Module):
    def __init__(self, config: BeatsConfig):
        super().__init__()
        self.pos_conv = nn.ModuleList([PositionConv(config)])
        self.layer_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.layers = nn.ModuleList(BeatsLayer(config, first=i == 0) for i in range(config.num_layers))


class Beats(nn.Module):
    """BEATs on whole segments of equal length."""

    def __init__(self, config: BeatsConfig):
        super().__init__()
        self.patch_embedding = nn.Conv2d(1, config.embed_dim, config.patch_size, config.patch_size, bias=config.conv_bias)
        self.layer_norm = nn.LayerNorm(config.embed_dim, config.norm_eps)
        if config.has_input_projection:
            self.post_extract_proj = nn.Linear(config.embed_dim, config.hidden_size)
        self.encoder = BeatsEncoder(config)
        self.config = config

    def forward(self, fbank: Tensor) -> Tensor:
        """(N, F, 128) -> (N, F/2, C)."""
        cfg = self.config
        x = self.patch_embedding(fbank.to(self.layer_norm.weight.dtype)[:, None]).flatten(2).transpose(1, 2)
        x = self.layer_norm(x)
        if cfg.has_input_projection:
            x = self.post_extract_proj(x)
        x = self.encoder.layer_norm(x + self.encoder.pos_conv[0](x))
        table: Any = self.encoder.layers[0].self_attn.relative_attention_bias  # pyright: ignore[reportAttributeAccessIssue]
        bias = table(self.buckets(x.shape[1], x.device)).permute(2, 0, 1)
        for layer in self.encoder.layers:
            x = layer(x, bias)
        return x

    def buckets(self, tokens: int, device: torch.device) -> Tensor:
        """(T, T) bucket numbers of key - query, as in T5."""
        half = self.config.num_buckets // 2
        exact = half // 2
        place = torch.arange(tokens, device=device)
        distance = place[None, :] - place[:, None]
        size = distance.abs()
        large = torch.log(size.clamp(min=1).float() / exact) / math.log(self.config.max_distance / exact) * (half - exact)
        bucket = torch.where(size < exact, size, (exact + large.long()).clamp(max=half - 1))
        return bucket + half * (distance > 0)


class AudioBridge(nn.Module):
    """BEATs and its way to the decoder's width; also what the `transformers` thinker lacks."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, output = config.beats.hidden_size, config.decoder.hidden_size
        self.beats = Beats(config.beats)
        self.beats_ln = nn.LayerNorm(width)
        self.beats_proj = nn.Sequential(nn.Linear(width, output), nn.GELU(), nn.Linear(output, output))

    def beats_tokens(self, fbank: Tensor, tokens: int) -> Tensor:
        """(N, F, 128) -> (N, tokens, D): cut or zero-padded to 2 * tokens rows, neighbours averaged."""
        x = self.beats(fbank)[:, : 2 * tokens]
        x = pad(x, (0, 0, 0, 2 * tokens - x.shape[1])).unflatten(1, (-1, 2)).mean(2)
        return self.beats_proj(self.beats_ln(x))


def fusion_head(config: ModelConfig) -> nn.Sequential:
    width = config.decoder.hidden_size
    return nn.Sequential(nn.Linear(config.decoder.num_layers * width, width), nn.GELU(), nn.Linear(width, width))


class TorchEncoder(AudioBridge):
    """All of it, without `lm_head`."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.visual, self.audio_tower, self.model = Vision(config.vision), Audio(config.audio), Decoder(config.decoder)
        self.classify_linear = fusion_head(config)

    def forward(self, vision: Any, audio: Any, beats: Any, rows: dict[str, Tensor], max_tokens: int) -> Tensor:
        """Returns embeddings (R, K, D) through the fusion head.

        Args:
          vision: (patches, coords, window), audio: (mel, frames, whole), beats: fbank, rows: ids, media_index, positions, pool; one
            array per part, as in `types.EncoderBatch`.
        """
        parts = [self.visual(*vision), self.audio_tower(*audio), self.beats_tokens(beats, max_tokens)]
        media = torch.cat([p.flatten(0, 1) for p in parts])
        return self.classify_linear(self.model(media=media, **rows).flatten(2))


def load(module: nn.Module, weights: dict[str, Any]) -> None:
    """Fills a module from checkpoint arrays; names that it does not have are left out, its own must all be there."""
    found = module.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()}, strict=False)
    if found.missing_keys:
        raise ValueError(f"no weights for {', '.join(found.missing_keys[:5])}")
