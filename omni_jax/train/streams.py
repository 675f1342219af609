"""One micro-batch through the encoder: towers once per clip, then every embedding that the losses need.

Arrays here are one micro-batch's: the fields of `batch.TrainBatch` without their leading axis n.

Letters: B clips, C copies of a clip, R rows, S tokens, K prompts per row, L layers, D LLM width, M media tokens of a copy, G blocks.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from omni_jax.model import Encoder
from omni_jax.model.layers import Remat
from omni_jax.parallel import batch_shards, constrain
from omni_jax.towers import of_modalities, towers_of
from omni_jax.train.batch import TrainBatch
from omni_jax.types import MediaBatch, RowBatch, StepKind

AT_ONCE = 2**26
"""Bytes of a device's states that go through the decoder together, 4 clips at 7B: with more, the TPU's products take longer a token."""

Features = dict[str, jax.Array]
"""Tower name -> features of each copy: vision (B, C, t * P/4, D), audio (B, C, c * 50, D), beats (B, C, c * 100 at most, BEATs width): what
precedes the bridge."""


def run_towers(model: Encoder, clips: MediaBatch, towers: Collection[str]) -> Features:
    """Returns the features that the named towers give, clips and their copies in one call."""
    features: Features = {}
    for tower in towers_of(model.config):
        if tower.name in towers:
            batch = getattr(clips, tower.name)
            axes = tower.fields.values()
            arrays = [x.reshape(-1, *x.shape[x.ndim - own :]) for x, own in zip(tower.arrays(batch), axes, strict=False)]
            found = tower.features(model, arrays, tower.made(batch))
            found = found.reshape(*clips.beats.frames.shape, -1, found.shape[-1])
            features[tower.name] = constrain(found, "batch", None, "tokens", "features")
    return features


def media_table(model: Encoder, features: Features, clips: MediaBatch) -> jax.Array:
    """Returns (B, C * M, D): the tokens of each tower for each copy, in the order of `towers.TOWERS`, zeros where a tower did not run."""
    copies = next(iter(features.values())).shape[1] if features else 1
    parts = []
    for tower in towers_of(model.config):
        batch = getattr(clips, tower.name)
        tokens = tower.clip_tokens(batch)
        if tower.name in features:
            found = tower.project(model, rearrange(features[tower.name], "b c t d -> (b c) t d"), tokens)
            parts.append(rearrange(found, "(b c) t d -> b c t d", c=copies))
        else:
            parts.append(jnp.zeros((clips.beats.frames.shape[0], copies, tokens, model.config.decoder.hidden_size), model.dtype))
    table = jnp.concatenate(parts, axis=2)
    return constrain(rearrange(table, "b c m d -> b (c m) d"), "batch", "tokens", "features")


def shuffle_clips(x: jax.Array, shuffle: jax.Array) -> jax.Array:
    """Returns x (B, ...) with each clip's entry taken from another of its block; `shuffle` is (G, B / G)."""
    blocks = x.reshape(*shuffle.shape, *x.shape[1:])
    return jax.vmap(lambda block, index: block[index])(blocks, shuffle).reshape(x.shape)


def embed_streams(
    model: Encoder,
    batch: TrainBatch,
    features: Features,
    kind: StepKind,
    *,
    dropout_key: jax.Array | None = None,
    remat: Remat = None,
    attention: str = "plain",
    frozen: bool = True,
    text_head: str = "last",
) -> dict[str, jax.Array]:
    """Returns the embeddings of the rows that take a gradient, (B, D) float32 each, not normalised.

    Names are "anchor", "positive", each active modality, and "hard" (without gradient) where it shares the anchor's row. Text alone is
    read from the last layer (SPEC section 6) unless `text_head` is "fused", everything else through the fusion head. `remat`, `attention`
    and `frozen` are the decoder's.
    """
    # The only branches: two captions that share the anchor's media.
    branches = 2 if kind.hard and batch.hard is None else 0
    media = media_table(model, features, batch.clips)
    options = {"remat": remat, "attention": attention, "branches": branches, "reach": kind.reach, "frozen": frozen}
    pooled = pool_in_pieces(model, batch.rows, media, dropout_key, **options)
    found = {name: pooled[:, r, k] for r, names in enumerate(kind.pooled(branches > 0)) for k, name in enumerate(names)}
    last = "text" in found and text_head == "last"
    embedded = {"text": model.last(found.pop("text"))} if last else {}
    if found:  # all in one product
        embedded |= dict(zip(found, jnp.moveaxis(model.fuse(jnp.stack(list(found.values()), axis=1)), 1, 0), strict=True))
    if "hard" in embedded:
        embedded["hard"] = jax.lax.stop_gradient(embedded["hard"])
    return embedded


def embed_hard_negatives(
    model: Encoder, batch: TrainBatch, features: Features, kind: StepKind, *, dropout_key: jax.Array | None = None, attention: str = "plain"
) -> jax.Array:
    """Returns z of the hard negatives that have rows of their own, (B, D) float32, without gradient.

    Call it with a model whose parameters are behind `stop_gradient`: then nothing is kept for a backward pass.
    """
    assert batch.hard is not None
    features = {name: jax.lax.stop_gradient(x[:, :1]) for name, x in features.items()}
    swapped = [name for name in of_modalities([kind.hard or ""]) if name in features]
    if batch.hard_media is None:
        features |= {name: shuffle_clips(features[name], batch.shuffle) for name in swapped}
    else:
        features |= run_towers(model, batch.hard_media, swapped)
    media = media_table(model, features, batch.clips)
    pooled = pool_in_pieces(model, batch.hard, media, dropout_key, attention=attention, branches=0)
    return jax.lax.stop_gradient(model.fuse(pooled[:, 0, 0]))


def pool_in_pieces(model: Encoder, rows: RowBatch, media: jax.Array, dropout_key: jax.Array | None, **options: Any) -> jax.Array:
    """Returns what `model.pool` gives of B x R rows and a media table (B, M, D) for each clip's R: the states (B, R, K, L, D).

    The rows of many clips go through the decoder in pieces of AT_ONCE. `options` are the decoder's.
    """
    clips, count, tokens = rows.ids.shape
    each, size = clips // _shards(), count * tokens * model.config.decoder.hidden_size * model.dtype.itemsize
    pieces = next((n for n in range(1, each) if each % n == 0 and each // n * size <= AT_ONCE), max(each, 1))
    if pieces == 1:
        return model.pool(rows, media, dropout_key=dropout_key, **options)
    keys = None if dropout_key is None else jax.random.split(dropout_key, pieces)

    def one(_: None, item: tuple[RowBatch, jax.Array, jax.Array | None]) -> tuple[None, jax.Array]:
        part, table, key = item
        return None, model.pool(part, table, dropout_key=key, **options)

    _, pooled = jax.lax.scan(one, None, (*jax.tree.map(lambda x: split_clips(x, pieces), (rows, media)), keys))
    return join_clips(pooled)


def split_clips(x: jax.Array, pieces: int) -> jax.Array:
    """Returns x (B, ...) as (pieces, B / pieces, ...), of which each piece has the same number of clips from every device."""
    x = jnp.moveaxis(x.reshape(_shards(), pieces, -1, *x.shape[1:]), 1, 0)
    return constrain(x.reshape(pieces, -1, *x.shape[3:]), None, "batch", *[None] * (x.ndim - 3))


def join_clips(x: jax.Array) -> jax.Array:
    """Returns what `split_clips` took apart."""
    x = jnp.moveaxis(x.reshape(x.shape[0], _shards(), -1, *x.shape[2:]), 0, 1)
    return constrain(x.reshape(-1, *x.shape[3:]), "batch", *[None] * (x.ndim - 3))


def _shards() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else batch_shards(mesh)
