"""The towers once more, in plain NumPy float64: windows cut out of the grid, convolutions tap by tap, distances one by one.

Letters: P patches, F mel frames, T tokens, C tower width, D decoder width.
"""

from __future__ import annotations

import math

import numpy as np

from omni_jax.config import AudioConfig, BeatsConfig, VisionConfig
from tests.model.reference import (
    Weights,
    attend_all,
    gelu,
    heads_of,
    layer_norm,
    linear,
    rms_norm,
    sigmoid,
    swiglu,
    turn,
)

# ----------------------------------------------------------------------------------------------------------------------- vision


def patch_order(height: int, width: int, merge: int) -> list[tuple[int, int]]:
    """(row, column) of each patch of a step, in the order of the input: merged tokens by rows, inside each its own patches by rows."""
    return [
        (y * merge + i, x * merge + j)
        for y in range(height // merge)
        for x in range(width // merge)
        for i in range(merge)
        for j in range(merge)
    ]


def windows(height: int, width: int, config: VisionConfig) -> list[list[int]]:
    """The patches of each attention window: the grid cut into squares of window_size pixels, smaller at the right and lower edge."""
    side = config.window_size // config.patch_size
    order = patch_order(height, width, config.merge_size)
    return [
        [n for n, (row, column) in enumerate(order) if top <= row < top + side and left <= column < left + side]
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]


def rope_2d(x: np.ndarray, places: list[tuple[int, int]], theta: float) -> np.ndarray:
    """x (P, H, h) turned by row (first h/4 frequencies) and column (the next h/4)."""
    x = x.copy()
    quarter = x.shape[2] // 4
    for axis in range(2):
        along = np.array([place[axis] for place in places], np.float64)
        for i in range(quarter):
            turn(x, axis * quarter + i, along * theta ** (-i / quarter))
    return x


def vision_attention(w: Weights, config: VisionConfig, x: np.ndarray, places: list[tuple[int, int]], groups: list[list[int]]) -> np.ndarray:
    q, k, v = (heads_of(linear(w / name, x), config.num_heads) for name in "qkv")
    q, k = rope_2d(q, places, config.rope_theta), rope_2d(k, places, config.rope_theta)
    out = np.zeros_like(x)
    for group in groups:
        out[group] = attend_all(q[group], k[group], v[group])
    return linear(w / "proj", out)


def vision_block(w: Weights, config: VisionConfig, x: np.ndarray, places: list[tuple[int, int]], groups: list[list[int]]) -> np.ndarray:
    x = x + vision_attention(w / "attn", config, rms_norm(w / "norm1", x, config.norm_eps), places, groups)
    return x + swiglu(w / "mlp", rms_norm(w / "norm2", x, config.norm_eps))


def vision_tower(w: Weights, config: VisionConfig, patches: np.ndarray, height: int, width: int) -> np.ndarray:
    """One temporal step: patches (P, 1176) -> merged tokens (P/4, D)."""
    places = patch_order(height, width, config.merge_size)
    x = patches @ w["patch_embed/kernel"]
    for i in range(config.num_layers):
        groups = [list(range(len(x)))] if i in config.full_attention_layers else windows(height, width, config)
        x = vision_block((w / "layers").layer(i), config, x, places, groups)
    x = rms_norm(w / "merger" / "norm", x, config.norm_eps)
    joined = np.stack([np.concatenate(list(x[n : n + config.merge_size**2])) for n in range(0, len(x), config.merge_size**2)])
    return linear(w / "merger" / "fc2", gelu(linear(w / "merger" / "fc1", joined)))


# ------------------------------------------------------------------------------------------------------------------------ audio


def conv3(w: Weights, x: np.ndarray, stride: int) -> np.ndarray:
    """Kernel 3 over (F, in), a frame of zeros on each side: output t reads frames stride*t - 1 .. stride*t + 1."""
    out = []
    for centre in range(0, len(x), stride):
        y = w["bias"].copy()
        for tap in range(3):
            if 0 <= centre + tap - 1 < len(x):
                y += x[centre + tap - 1] @ w["kernel"][tap]
        out.append(y)
    return np.stack(out)


def whisper_positions(length: int, width: int) -> np.ndarray:
    """Sines then cosines, wavelengths in geometric progression from 2 pi to 20,000 pi."""
    table = np.zeros((length, width))
    for t in range(length):
        for i in range(width // 2):
            angle = t * 10000 ** (-i / (width // 2 - 1))
            table[t, i], table[t, width // 2 + i] = math.sin(angle), math.cos(angle)
    return table


def audio_attention(w: Weights, config: AudioConfig, x: np.ndarray) -> np.ndarray:
    q, k, v = (heads_of(linear(w / name, x), config.num_heads) for name in "qkv")
    return linear(w / "out", attend_all(q, k, v))


def audio_block(w: Weights, config: AudioConfig, x: np.ndarray) -> np.ndarray:
    x = x + audio_attention(w / "attn", config, layer_norm(w / "norm1", x, config.norm_eps))
    return x + linear(w / "fc2", gelu(linear(w / "fc1", layer_norm(w / "norm2", x, config.norm_eps))))


def audio_chunk(w: Weights, config: AudioConfig, mel: np.ndarray) -> np.ndarray:
    """One chunk's valid frames (F, 128) -> its tokens, with F <= 200."""
    x = gelu(conv3(w / "conv2", gelu(conv3(w / "conv1", mel, 1)), 2))
    x = x + whisper_positions(len(x), config.hidden_size)
    for i in range(config.num_layers):
        x = audio_block((w / "layers").layer(i), config, x)
    pairs = [(x[n] + x[n + 1]) / 2 for n in range(0, len(x) - 1, 2)]
    return linear(w / "proj", layer_norm(w / "norm", np.stack(pairs), config.norm_eps))


def audio_tower(w: Weights, config: AudioConfig, mel: np.ndarray) -> np.ndarray:
    """A whole log-mel (F, 128), cut into chunks."""
    size = 2 * config.n_window
    return np.concatenate([audio_chunk(w, config, mel[n : n + size]) for n in range(0, len(mel), size)])


# ------------------------------------------------------------------------------------------------------------------------ BEATs


def bucket(distance: int, num_buckets: int, max_distance: int) -> int:
    """T5's bucket of key - query, both directions; single precision, since on the edge of a bucket the rounding decides."""
    half = num_buckets // 2
    exact = half // 2
    side = half if distance > 0 else 0
    size = abs(distance)
    if size < exact:
        return side + size
    ratio = np.log(np.float32(size) / np.float32(exact)) / np.float32(math.log(max_distance / exact))
    return side + min(exact + int(ratio * np.float32(half - exact)), half - 1)


def position_conv(w: Weights, x: np.ndarray, groups: int) -> np.ndarray:
    """Grouped convolution (T, C) -> (T, C): tap k of output t reads token t + k - taps//2; the weight of a tap is g * v / ||v||."""
    taps = len(w["v"])
    each = x.shape[1] // groups
    out = np.tile(w["bias"], (len(x), 1))
    for k in range(taps):
        kernel = w["g"][k] * w["v"][k] / np.sqrt((w["v"][k] ** 2).sum())
        for t in range(len(x)):
            source = t + k - taps // 2
            if not 0 <= source < len(x):
                continue
            for group in range(groups):
                span = slice(group * each, (group + 1) * each)
                out[t, span] += x[source, span] @ kernel[:, span]
    return out


def beats_attention(w: Weights, config: BeatsConfig, table: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Gated relative attention on (T, C); `table` (num_buckets, H)."""
    q, k, v = (heads_of(linear(w / name, x), config.num_heads) for name in "qkv")
    reach = range(-(len(x) - 1), len(x))
    buckets = {distance: bucket(distance, config.num_buckets, config.max_distance) for distance in reach}
    bias = np.zeros((config.num_heads, len(x), len(x)))
    for head in range(config.num_heads):
        for query in range(len(x)):
            eight = linear(w / "gate", q[query, head])
            g1, g2 = sigmoid(eight[:4].sum()), sigmoid(eight[4:].sum())
            gate = g1 * (g2 * w["gate_scale"][head] - 1) + 2
            for key in range(len(x)):
                bias[head, query, key] = gate * table[buckets[key - query], head]
    return linear(w / "out", attend_all(q, k, v, bias))


def beats_block(w: Weights, config: BeatsConfig, table: np.ndarray, x: np.ndarray) -> np.ndarray:
    a = (2 * config.num_layers) ** 0.25
    x = layer_norm(w / "norm1", a * x + beats_attention(w / "attn", config, table, x), config.norm_eps)
    return layer_norm(w / "norm2", a * x + linear(w / "fc2", gelu(linear(w / "fc1", x))), config.norm_eps)


def beats(w: Weights, config: BeatsConfig, fbank: np.ndarray) -> np.ndarray:
    """fbank (F, bins) -> features (T, C): one token per whole patch, time-major."""
    side = config.patch_size
    patches = [
        fbank[t : t + side, f : f + side].ravel()
        for t in range(0, len(fbank) - side + 1, side)
        for f in range(0, fbank.shape[1] - side + 1, side)
    ]
    x = layer_norm(w / "norm_patches", linear(w / "patch_embed", np.stack(patches)), config.norm_eps)
    if config.embed_dim != config.hidden_size:
        x = linear(w / "input_proj", x)
    x = layer_norm(w / "norm", x + gelu(position_conv(w / "pos_conv", x, config.conv_pos_groups)), config.norm_eps)
    for i in range(config.num_layers):
        x = beats_block((w / "layers").layer(i), config, w["relative_bias/embedding"], x)
    return x


def bridge(w: Weights, features: np.ndarray, tokens: int) -> np.ndarray:
    """BEATs features (T, C) -> (tokens, D): cut or zero-padded to two rows a token, averaged, projected."""
    rows = np.zeros((2 * tokens, features.shape[1]))
    kept = min(len(rows), len(features))
    rows[:kept] = features[:kept]
    pairs = np.stack([(rows[2 * n] + rows[2 * n + 1]) / 2 for n in range(tokens)])
    return linear(w / "fc2", gelu(linear(w / "fc1", layer_norm(w / "norm", pairs, 1e-5))))
