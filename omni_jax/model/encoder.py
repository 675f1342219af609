"""The whole encoder: towers, bridge, decoder, fusion head.

Letters: N items, R rows, K prompts per row, L layers, D LLM width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from omni_jax.config import ModelConfig
from omni_jax.model import int8
from omni_jax.model.audio import AudioTower
from omni_jax.model.beats import Beats, BeatsProjector
from omni_jax.model.decoder import Decoder
from omni_jax.model.layers import Linear, ParamFactory, gelu
from omni_jax.model.vision import VisionTower
from omni_jax.parallel import constrain, sharding
from omni_jax.types import RowBatch


class FusionHead(nnx.Module):
    """The pooled states of all layers, concatenated, to one embedding (`classify_linear` of the release)."""

    def __init__(self, make: ParamFactory, layers: int, width: int):
        self.fc1 = Linear(make / "fc1", layers * width, width, ("fused", "mlp"))
        self.fc2 = Linear(make / "fc2", width, width, ("mlp", "embed"))

    def __call__(self, pooled: jax.Array) -> jax.Array:
        """(B, L, D) -> (B, D) in the dtype of the states.

        The concatenated states change from rows split over fsdp to widths split over it, as the weight's are: each device sends each other
        its share and none holds them whole (206 MB of 1,024 rows at 7B). Without these constraints the compiler gathers the 686 MiB weight.
        """
        x = constrain(rearrange(pooled, "b layers width -> b (layers width)"), "batch", None)
        x = constrain(x, "batch_data", "fused")
        x = constrain(self.fc1(x), "batch", "features")
        return self.fc2(gelu(x))


class Encoder(nnx.Module):
    """A backbone with an optional LoRA adapter; BEATs and the fusion head where its configuration has them.

    `dtype` is that of activations; weights keep the dtype they are stored in. What else a checkpoint has, `carried_shapes` lists.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None, *, param_dtype: Any = jnp.float32, dtype: Any = None):
        make = ParamFactory(rngs, jnp.dtype(param_dtype), config.lora, weights=(config.weights, config.kept))
        width = config.decoder.hidden_size
        self.vision = VisionTower(make / "vision", config.vision)
        self.audio = AudioTower(make / "audio", config.audio)
        self.beats = Beats(make / "beats", config.beats) if config.beats else None
        self.bridge = BeatsProjector(make / "bridge", config.beats.hidden_size, width) if config.beats else None
        self.decoder = Decoder(make / "decoder", config.decoder, causal=config.attention == "causal", mean=not config.has_head)
        self.head = FusionHead(make / "head", config.decoder.num_layers, width) if config.has_head else None
        self.config = config
        self.dtype = jnp.dtype(dtype or param_dtype)

    def video_tokens(self, patches: jax.Array, coords: jax.Array, window: jax.Array) -> jax.Array:
        """Returns (N, P/4, D) merged video tokens; arguments as in `types.VisionBatch`."""
        return self.vision(patches, coords, window, dtype=self.dtype)

    def whisper_tokens(self, mel: jax.Array, frames: jax.Array) -> jax.Array:
        """Returns (N, 50, D) audio-tower tokens; arguments as in `types.AudioBatch`."""
        return self.audio(mel, frames, dtype=self.dtype)

    def beats_tokens(self, fbank: jax.Array, frames: jax.Array, max_tokens: int) -> jax.Array:
        """Returns (N, max_tokens, D) BEATs tokens at the audio tower's rate; arguments as in `types.BeatsBatch`."""
        assert self.beats is not None and self.bridge is not None, "this backbone has no BEATs"
        features, _ = self.beats(fbank, frames, dtype=self.dtype)
        return self.bridge(features, max_tokens)

    def pool(self, rows: RowBatch, media: jax.Array, **options: Any) -> jax.Array:
        """Returns the states (..., K, L, D) of the prompts of packed rows.

        Args:
          rows: with one leading axis or more.
          media: (M, D) one media table for all rows, or (B, M, D) one for the rows of each index of the first leading axis.
          options: those of the decoder.
        """
        leading = rows.ids.shape[:-1]
        flat = {name: rearrange(getattr(rows, name), "... s -> (...) s") for name in ("ids", "media_index", "segment", "branch", "pool")}
        positions = rearrange(rows.positions, "... xyz s -> xyz (...) s")
        pooled = self.decoder(**flat, positions=positions, media=media, dtype=self.dtype, **options)
        return pooled.reshape(*leading, *pooled.shape[1:])

    def embed_rows(self, rows: RowBatch, media: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
        """Returns the pooled prompts through each head, `fuse` and `last`: (..., K, D) each; arguments as of `pool`."""
        pooled = self.pool(rows, media, **options)
        return self.fuse(pooled), self.last(pooled)

    def last(self, pooled: jax.Array) -> jax.Array:
        """Returns the last of the pooled states (..., L, D): (..., D) float32, not normalised."""
        return pooled[..., -1, :].astype(jnp.float32)

    def fuse(self, pooled: jax.Array) -> jax.Array:
        """Returns pooled states (..., L, D) through the fusion head: (..., D) float32, not normalised; without a head the last state."""
        if self.head is None:
            return self.last(pooled)
        fused = self.head(rearrange(pooled, "... layers width -> (...) layers width"))
        return fused.reshape(*pooled.shape[:-2], -1).astype(jnp.float32)


def abstract_encoder(config: ModelConfig, *, param_dtype: Any = jnp.float32, dtype: Any = None) -> Encoder:
    """Returns an encoder whose parameters are shapes without storage, in milliseconds at any size."""
    return Encoder(config, None, param_dtype=param_dtype, dtype=dtype)


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Returns path -> shape and dtype of every parameter: `dtype`, but for int8 matrices and their scales."""
    own: dict[tuple[str, ...], Any] = {}
    for path in rounded_maps(config):
        own[(*path, "kernel")], own[(*path, int8.SCALE)] = jnp.int8, jnp.float32
    return {path: jax.ShapeDtypeStruct(shape, own.get(path, dtype)) for path, (shape, _) in _leaves(config).items()}


def rounded_maps(config: ModelConfig) -> frozenset[tuple[str, ...]]:
    """Returns the paths of the linear maps whose matrices are held in int8."""
    return frozenset(path[:-1] for path in _leaves(config) if path[-1] == int8.SCALE)


def carried_shapes(config: ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Returns path -> shape of what a checkpoint has besides the model and no embedding depends on: kept for the way back, never loaded."""
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {
        ("lm_head", "kernel"): (config.decoder.hidden_size, config.decoder.vocab_size),
        ("audio", "bos_eos", "embedding"): (2, config.audio.output_size),
    }
    if config.beats is not None and (classes := config.beats.predictor_classes):
        width = config.beats.hidden_size
        shapes |= {("beats", "predictor", "kernel"): (width, classes), ("beats", "predictor", "bias"): (classes,)}
        if config.lora and "beats/predictor" in config.lora.targets:
            rank = config.lora.rank
            shapes |= {("beats", "predictor", "lora_a"): (width, rank), ("beats", "predictor", "lora_b"): (rank, classes)}
    return shapes


def param_axes(config: ModelConfig) -> dict[tuple[str, ...], tuple[str | None, ...]]:
    """Returns path -> logical axis names of every parameter."""
    return {path: axes for path, (_, axes) in _leaves(config).items()}


def param_shardings(config: ModelConfig, mesh: Mesh | AbstractMesh) -> dict[tuple[str, ...], NamedSharding]:
    """Returns path -> the sharding of each parameter on a mesh."""
    shapes = abstract_params(config)
    return {path: sharding(axes, shapes[path].shape, mesh) for path, axes in param_axes(config).items()}


def with_params(encoder: Encoder, params: dict[tuple[str, ...], jax.Array]) -> Encoder:
    """Returns the (abstract) encoder filled with these parameters.

    Raises:
      ValueError: naming parameters that are missing, unknown or misshapen.
    """
    graph, state = nnx.split(encoder)
    slots = _flat(state)
    missing, unknown = sorted(slots.keys() - params.keys()), sorted(params.keys() - slots.keys())
    wrong = [path for path in slots.keys() & params.keys() if slots[path].shape != params[path].shape]
    for what, paths in (("missing", missing), ("unknown", unknown), ("misshapen", sorted(wrong))):
        if paths:
            names = ", ".join("/".join(p) for p in paths[:5])
            raise ValueError(f"{len(paths)} parameters are {what}: {names}{' ...' if len(paths) > 5 else ''}")
    filled = [(path, slots[path].replace(params[path])) for path in slots]
    return nnx.merge(graph, nnx.from_flat_state(filled))


@functools.lru_cache(maxsize=8)
def _leaves(config: ModelConfig) -> Mapping[tuple[str, ...], tuple[tuple[int, ...], tuple[str | None, ...]]]:
    """Shape and logical axes of every parameter. Kept: tracing an encoder takes a second, and training asks several times."""
    return {path: (p.shape, p.get_metadata()["axes"]) for path, p in _flat(abstract_encoder(config)).items()}


def _flat(tree: Encoder | nnx.State) -> dict[tuple[str, ...], Any]:
    state = nnx.state(tree, nnx.Param) if isinstance(tree, Encoder) else tree
    return {tuple(str(part) for part in path): leaf for path, leaf in nnx.to_flat_state(state)}
