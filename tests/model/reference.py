"""The model's parts once more, in plain NumPy float64, written from the formulas and not from the product: loops, no masks, one prompt.

Parameters come as `Weights`, a tree of float64 arrays under the product's names. Linear kernels are (in, out).

Letters: S tokens, H heads, K KV heads, h head width, L layers, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import erf

from omni_jax.config import DecoderConfig


class Weights:
    """Arrays by slash-joined name; `w / "attn"` is the part below attn, `w.layer(i)` one layer of a stack."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays = {name: np.asarray(a, np.float64) for name, a in arrays.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __truediv__(self, part: str) -> Weights:
        below = {name.removeprefix(f"{part}/"): a for name, a in self.arrays.items() if name.startswith(f"{part}/")}
        assert below, f"no weights below {part}"
        return Weights(below)

    def layer(self, index: int) -> Weights:
        return Weights({name: a[index] for name, a in self.arrays.items()})


# ------------------------------------------------------------------------------------------------------------------ small parts


def linear(w: Weights, x: np.ndarray) -> np.ndarray:
    y = x @ w["kernel"]
    return y + w["bias"] if "bias" in w else y


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + erf(x / np.sqrt(2))) / 2


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def rms_norm(w: Weights, x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * w["scale"]


def layer_norm(w: Weights, x: np.ndarray, eps: float) -> np.ndarray:
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + eps) * w["scale"] + w["bias"]


def swiglu(w: Weights, x: np.ndarray) -> np.ndarray:
    gate = linear(w / "gate", x)
    return linear(w / "down", gate * sigmoid(gate) * linear(w / "up", x))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def heads_of(x: np.ndarray, heads: int) -> np.ndarray:
    return x.reshape(len(x), heads, -1)


def attend_all(q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """Every query sees every key: q, k, v (S, H, h), bias (H, S, S) or None -> (S, H*h)."""
    out = np.zeros_like(q)
    for head in range(q.shape[1]):
        for s in range(len(q)):
            logits = k[:, head] @ q[s, head] / np.sqrt(q.shape[2])
            if bias is not None:
                logits = logits + bias[head, s]
            out[s, head] = softmax(logits) @ v[:, head]
    return out.reshape(len(q), -1)


def attend_causal(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Query s sees keys 0..s; head i of q reads KV head i // (H/K). q (S, H, h), k and v (S, K, h) -> (S, H*h)."""
    out = np.zeros_like(q)
    share = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        for s in range(len(q)):
            seen_k, seen_v = k[: s + 1, head // share], v[: s + 1, head // share]
            out[s, head] = softmax(seen_k @ q[s, head] / np.sqrt(q.shape[2])) @ seen_v
    return out.reshape(len(q), -1)


def turn(x: np.ndarray, pair: int, angle: np.ndarray) -> None:
    """Rotates, in place, coordinates (pair, pair + h/2) of every head of x (S, H, h) by the token's angle (S,)."""
    other = pair + x.shape[2] // 2
    a, b = x[:, :, pair].copy(), x[:, :, other].copy()
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    x[:, :, pair] = a * cos - b * sin
    x[:, :, other] = b * cos + a * sin


# ---------------------------------------------------------------------------------------------------------------------- decoder


def tmrope(x: np.ndarray, positions: np.ndarray, theta: float, sections: Sequence[int]) -> np.ndarray:
    """x (S, H, h) turned by positions (3, S): `sections` says how many of the h/2 frequencies each axis drives, in turn."""
    x = x.copy()
    pair = 0
    for axis, count in enumerate(sections):
        for _ in range(count):
            turn(x, pair, positions[axis] * theta ** (-2 * pair / x.shape[2]))
            pair += 1
    assert pair == x.shape[2] // 2
    return x


def decoder_attention(w: Weights, config: DecoderConfig, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    q = tmrope(heads_of(linear(w / "q", x), config.num_heads), positions, config.rope_theta, config.mrope_sections)
    k = tmrope(heads_of(linear(w / "k", x), config.num_kv_heads), positions, config.rope_theta, config.mrope_sections)
    v = heads_of(linear(w / "v", x), config.num_kv_heads)
    return linear(w / "o", attend_causal(q, k, v))


def decoder_layer(w: Weights, config: DecoderConfig, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    x = x + decoder_attention(w / "attn", config, rms_norm(w / "norm_attn", x, config.rms_norm_eps), positions)
    return x + swiglu(w / "mlp", rms_norm(w / "norm_mlp", x, config.rms_norm_eps))


def decoder(w: Weights, config: DecoderConfig, embeddings: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Hidden states of one prompt after each layer, the last one after the final norm: (L, S, D)."""
    x, states = embeddings, []
    for i in range(config.num_layers):
        x = decoder_layer((w / "layers").layer(i), config, x, positions)
        states.append(x)
    states[-1] = rms_norm(w / "norm", x, config.rms_norm_eps)
    return np.stack(states)


def embed_prompt(w: Weights, ids: np.ndarray, media: Mapping[int, np.ndarray]) -> np.ndarray:
    """Token embeddings (S, D) of a prompt; `media` maps places of the prompt to the vectors that stand there."""
    x = w["embed/embedding"][ids].copy()
    for place, vector in media.items():
        x[place] = vector
    return x


# ------------------------------------------------------------------------------------------------------------------ fusion head


def fusion_head(w: Weights, states: np.ndarray) -> np.ndarray:
    """(L, D) last-token states to one embedding (D,)."""
    return linear(w / "fc2", gelu(linear(w / "fc1", np.concatenate(list(states)))))


# ------------------------------------------------------------------------------------------------------------------------- LoRA


def merged(w: Weights, scale: float) -> Weights:
    """The same weights with every adapter folded in: W + scale * A B, layer by layer."""
    arrays = {name: a for name, a in w.arrays.items() if "/lora_" not in name}
    for name, a in w.arrays.items():
        if name.endswith("/lora_a"):
            base = name.removesuffix("lora_a")
            arrays[f"{base}kernel"] = w[f"{base}kernel"] + scale * np.matmul(a, w[f"{base}lora_b"])
    return Weights(arrays)
