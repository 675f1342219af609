"""Small encoders of odd sizes with random weights, and ways to call their parts compiled."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni_jax.config import AudioConfig, BeatsConfig, DecoderConfig, LoraConfig, ModelConfig, SpecialTokens, VisionConfig
from omni_jax.model import Encoder, abstract_encoder, abstract_params, with_params
from omni_jax.model.layers import ParamFactory
from omni_jax.types import RowBatch
from tests.model.reference import Weights

# Head widths 10, 20, 12 and 14, three query heads a KV head, windows of 3x3 merged tokens, 7 tokens an audio chunk,
# 14 channels a convolution group: nothing is a power of two, and nothing equals something else by chance.
ODD = ModelConfig(
    decoder=DecoderConfig(
        hidden_size=60, intermediate_size=52, num_layers=3, num_heads=6, num_kv_heads=2, vocab_size=270, mrope_sections=(1, 1, 3)
    ),
    vision=VisionConfig(
        hidden_size=40,
        intermediate_size=28,
        num_layers=3,
        num_heads=2,
        output_size=60,
        full_attention_layers=(1,),
        window_size=84,
    ),
    audio=AudioConfig(
        hidden_size=36,
        intermediate_size=44,
        num_layers=2,
        num_heads=3,
        output_size=60,
        n_window=14,
        max_source_positions=90,
    ),
    beats=BeatsConfig(
        num_layers=2,
        hidden_size=42,
        intermediate_size=30,
        num_heads=3,
        embed_dim=20,
        conv_pos=10,
        conv_pos_groups=3,
        num_buckets=12,
        max_distance=20,
        predictor_classes=5,
    ),
    tokens=SpecialTokens(pad=256, audio=257, audio_bos=258, audio_eos=259, video=260, vision_bos=261, vision_eos=262),
)

# Widths that eight devices divide, so that every shard is smaller than its whole.
EVEN = dataclasses.replace(
    ODD,
    decoder=dataclasses.replace(
        ODD.decoder,
        hidden_size=64,
        intermediate_size=48,
        num_layers=2,
        num_heads=8,
        num_kv_heads=4,
        vocab_size=272,
        mrope_sections=(1, 1, 2),
    ),
    vision=dataclasses.replace(ODD.vision, hidden_size=32, intermediate_size=24, num_layers=2, output_size=64),
    audio=dataclasses.replace(ODD.audio, hidden_size=32, intermediate_size=40, num_heads=4, output_size=64),
    beats=dataclasses.replace(ODD.beats, hidden_size=48, intermediate_size=32, num_heads=4, embed_dim=24),
    lora=LoraConfig(rank=3, alpha=7.0),
)

# The published widths (SPEC section 1).
SEVEN_B = ModelConfig(
    decoder=DecoderConfig(hidden_size=3584, intermediate_size=18944, num_layers=28, num_heads=28, num_kv_heads=4, vocab_size=152064),
    vision=VisionConfig(
        hidden_size=1280, intermediate_size=3420, num_layers=32, num_heads=16, output_size=3584, full_attention_layers=(7, 15, 23, 31)
    ),
    audio=AudioConfig(hidden_size=1280, intermediate_size=5120, num_layers=32, num_heads=20, output_size=3584),
    beats=BeatsConfig(),
    tokens=SpecialTokens(pad=151643, audio=151646, audio_bos=151647, audio_eos=151648, video=151656, vision_bos=151652, vision_eos=151653),
    lora=LoraConfig(),
)


def random_value(path: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Float32 noise of the size a trained parameter of this name has; no bias, scale, gate or adapter is left at its initial value."""
    noise = np.random.default_rng([zlib.crc32(path.encode()), seed]).standard_normal(shape)
    kind = path.rsplit("/", 1)[-1]
    if kind in ("scale", "g", "gate_scale"):
        noise = 1 + 0.3 * noise
    elif kind == "bias":
        noise = 0.2 * noise
    elif kind in ("kernel", "lora_a", "lora_b", "v"):
        stacked = "layers/" in path
        fan_in = int(np.prod(shape[stacked:-1]))
        # Below unit gain: at unit gain these nets amplify float32's own rounding beyond what the tests want to see.
        noise = 0.7 * noise / np.sqrt(fan_in)
    return noise.astype(np.float32)


def random_encoder(config: ModelConfig, seed: int = 0, host: bool = False, **options: Any) -> tuple[Encoder, Weights]:
    """Returns an encoder with random weights (NumPy arrays if `host`, for placing on a mesh), and the same weights in float64."""
    arrays = {"/".join(path): random_value("/".join(path), s.shape, seed) for path, s in abstract_params(config).items()}
    kind = options.get("param_dtype", jnp.float32)
    params: dict[tuple[str, ...], Any] = {tuple(name.split("/")): a.astype(kind) for name, a in arrays.items()}
    if not host:
        params = {path: jnp.asarray(a) for path, a in params.items()}
    return with_params(abstract_encoder(config, **options), params), Weights(arrays)


def random_part(make: Callable[[], Any], seed: int = 0) -> tuple[Any, Weights]:
    """Returns the module that `make` makes, with random weights, and the same weights in float64."""
    graph, state = nnx.split(nnx.eval_shape(make))
    arrays, filled = {}, []
    for path, leaf in nnx.to_flat_state(state):
        name = "/".join(str(p) for p in path)
        arrays[name] = random_value(name, leaf.shape, seed)
        filled.append((path, leaf.replace(jnp.asarray(arrays[name]))))
    return nnx.merge(graph, nnx.from_flat_state(filled)), Weights(arrays)


def maker(lora: LoraConfig | None = None, path: str = "") -> ParamFactory:
    """Returns a maker of float32 parameters."""
    return ParamFactory(nnx.Rngs(0), jnp.dtype(jnp.float32), lora, path)


_COMPILED: dict[Any, tuple[Any, Callable[..., Any]]] = {}


def run(module: Any, *args: Any, method: str = "__call__", **static: Any) -> Any:
    """Returns module.method(*args, **static), compiled once for each module and shape; arrays may be NumPy, None passes.

    The module's weights must not change between calls.
    """
    key = (id(module), method, tuple(static.items()))
    if key not in _COMPILED:
        graph, params = nnx.split(module)
        program = jax.jit(lambda p, a: _call(nnx.merge(graph, p), method, *a, **static))
        # The module is kept with its program, so that its id stays its own.
        _COMPILED[key] = module, functools.partial(program, params)
    return _COMPILED[key][1](jax.tree.map(jnp.asarray, args))


def _call(module: Any, method: str, *args: Any, **static: Any) -> Any:
    return embed_rows(module, *args, **static) if method == "embed_rows" else getattr(module, method)(*args, **static)


def embed_rows(encoder: Any, rows: Mapping[str, Any], media: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
    """Returns what `Encoder.embed_rows` gives for rows of `pack`."""
    return encoder.embed_rows(RowBatch(**{**rows, "positions": jnp.moveaxis(jnp.asarray(rows["positions"]), 1, 0)}), media, **options)


def noise(seed: int, *shape: int) -> np.ndarray:
    """Standard normal float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------------ packed rows


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt by itself: ids (S,), positions (3, S), media_index (S,), -1 for text."""

    ids: np.ndarray
    positions: np.ndarray
    media_index: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def random_prompt(seed: int, length: int, media: int, vocabulary: int) -> Prompt:
    """A prompt whose three position axes differ and whose tokens are, every third one, media."""
    rng = np.random.default_rng(seed)
    index = np.where(np.arange(length) % 3 == 1, rng.integers(0, media, length), -1)
    steps = rng.integers(0, 3, (3, length))
    return Prompt(rng.integers(0, vocabulary, length), np.cumsum(steps, axis=1), index)


def joined(first: Prompt, second: Prompt) -> Prompt:
    """The second prompt after the first."""
    parts = ((getattr(first, f.name), getattr(second, f.name)) for f in dataclasses.fields(Prompt))
    return Prompt(*(np.concatenate(p, axis=-1) for p in parts))


def pack(rows: Sequence[Sequence[tuple[Prompt, int, int]]], pools: Sequence[Sequence[int]], size: int) -> dict[str, np.ndarray]:
    """Returns decoder inputs: each row a list of (piece, segment, branch) laid one after the other; segment 0 is padding.

    Padding keeps the piece's ids, so that a token that sees it changes.
    """
    count = len(rows)
    out = {
        "ids": np.zeros((count, size), np.int32),
        "media_index": np.full((count, size), -1, np.int32),
        "positions": np.zeros((3, count, size), np.int32),
        "segment": np.zeros((count, size), np.int32),
        "branch": np.zeros((count, size), np.int32),
        "pool": np.zeros((count, max(map(len, pools))), np.int32),
    }
    for r, pieces in enumerate(rows):
        start = 0
        for piece, segment, branch in pieces:
            span = slice(start, start + len(piece))
            out["ids"][r, span], out["media_index"][r, span] = piece.ids, piece.media_index
            out["positions"][:, r, span] = piece.positions
            out["segment"][r, span], out["branch"][r, span] = segment, branch
            start = span.stop
        out["pool"][r, : len(pools[r])] = pools[r]
    return out
