"""Loss and gradient of one step: plainly over one micro-batch, or cached over many (one pool of negatives, memory of one micro-batch).

Letters: n micro-batches, B clips of a micro-batch, D LLM width.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from omni_jax.config import ModelConfig
from omni_jax.model import Encoder, abstract_encoder, with_params
from omni_jax.model.layers import Remat
from omni_jax.objectives import LOSSES, Pool, health
from omni_jax.parallel import batch_axes, constrain, writes_gathers
from omni_jax.towers import NAMES, of_modalities
from omni_jax.train.batch import TrainBatch
from omni_jax.train.plan import LossConfig
from omni_jax.train.streams import Features, embed_hard_negatives, embed_streams, run_towers
from omni_jax.train.trainable import Arrays, is_lora, join, loss_scalars
from omni_jax.types import StepKind

Embeddings = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def compute_losses(embeddings: Embeddings, scalars: Arrays, losses: LossConfig, kind: StepKind, blocks: int) -> tuple[jax.Array, Metrics]:
    """Returns the weighted sum of the active losses; each of them, the scalars that they read and HEALTH, float32 scalars.

    A loss on the first 256 dimensions alone is named with their number ("L_A_256"). On a mesh each shard computes them of its own clips,
    against the gathered embeddings of all.

    Args:
      embeddings: (B, D) of the whole pool, as `embed_streams` names them.
      scalars: path -> those that train, see `LossConfig.trained`.
      blocks: blocks of consecutive clips that see one another's hard negatives, where those are local.
    """

    whole = next(iter(embeddings.values())).shape[-1]
    widths = losses.widths(whole)

    def named(name: str, width: int) -> str:
        return LOSSES[name].metric + (f"_{width}" if width < whole else "")

    def terms(z: Embeddings, values: Mapping[str, Any], axis_name: tuple[str, ...] | None = None) -> Metrics:
        found = {}
        for width in widths:
            cut = {name: x[:, :width] for name, x in z.items()} if width < whole else z
            pool = Pool(cut, kind.singles, kind.pairs, values, axis_name, losses.hard_scope, blocks, losses.hard_weight)
            found |= {named(name, width): LOSSES[name].value(pool) for name in losses.weights}
            if width == whole:
                found |= health(pool, kind.hard)
        return found

    mesh, values = jax.sharding.get_abstract_mesh(), losses.values(scalars)
    if writes_gathers(mesh):
        axes = batch_axes(mesh)
        split = functools.partial(terms, axis_name=axes)
        terms = jax.shard_map(split, in_specs=(PartitionSpec(axes), PartitionSpec()), out_specs=PartitionSpec())
    found = terms(embeddings, values)
    parts = [(factor * weight, named(name, width)) for width, factor in widths.items() for name, weight in losses.weights.items()]
    loss = sum((factor * found[name] for factor, name in parts), jnp.zeros(()))
    metrics = found | {"loss": loss} | {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
    return loss, metrics | collapse_metrics(embeddings["anchor"] if kind.anchor else embeddings[kind.singles[0]])


def collapse_metrics(z: jax.Array) -> Metrics:
    """Returns how far embeddings (B, D) have collapsed: mean cosine between different rows, and the effective rank.

    The effective rank is the participation ratio of the centred unit vectors' covariance, (sum of eigenvalues)^2 / sum of squares: near
    min(B - 1, D) for vectors that fill the space, 1 for vectors on a line, 0 where all are equal.
    """
    z = jax.lax.stop_gradient(z.astype(jnp.float32))
    z = z / jnp.maximum(jnp.linalg.norm(z, axis=1, keepdims=True), 1e-12)
    rows = z.shape[0]
    total = z.sum(axis=0)
    cosine = (jnp.vdot(total, total) - jnp.vdot(z, z)) / float(max(rows * (rows - 1), 1))
    centred = z - total / rows
    gram = centred @ centred.T
    return {"mean_cosine": cosine, "effective_rank": jnp.square(jnp.trace(gram)) / jnp.maximum(jnp.vdot(gram, gram), 1e-12)}


class Forward:
    """The encoder as functions of its trainable and frozen parameters.

    Attributes:
      config: its architecture.
      abstract: the encoder without storage.
      losses: what is computed from the embeddings.
      kept: towers nothing of which trains: they run once per clip, without residuals.
    """

    def __init__(
        self,
        config: ModelConfig,
        losses: LossConfig,
        trainable: frozenset[str],
        dtype: Any,
        remat: Remat,
        attention: str = "plain",
        text_head: str = "last",
    ) -> None:
        """Takes the architecture, the losses and what trains.

        Args:
          remat: what decoder layers keep for the backward pass.
          attention: kernel of the decoder's attention.
          text_head: "last" or "fused", as `Preset.text_head`: what text alone is embedded by.
        """
        self.config, self.losses, self.abstract = config, losses, abstract_encoder(config, dtype=dtype)
        self.kept = tuple(tower for tower in NAMES if not any(name.startswith(f"{tower}/") for name in trainable))
        frozen = all(is_lora(name) for name in trainable if name.startswith("decoder/layers/"))
        self._options: dict[str, Any] = {"remat": remat, "attention": attention, "frozen": frozen, "text_head": text_head}

    def model(self, trainable: Arrays, frozen: Arrays) -> Encoder:
        return with_params(self.abstract, join(trainable, frozen))

    def keep(self, trainable: Arrays, frozen: Arrays, batch: TrainBatch, kind: StepKind) -> Features:
        """Returns the features of the towers that do not train."""
        towers = [tower for tower in of_modalities(kind.media) if tower in self.kept]
        return run_towers(self.model(jax.lax.stop_gradient(trainable), frozen), batch.clips, towers)

    def embed(
        self, trainable: Arrays, frozen: Arrays, batch: TrainBatch, kept: Features, kind: StepKind, key: jax.Array | None, *, hard: bool
    ) -> Embeddings:
        """Returns the embeddings of a micro-batch, those of hard negatives with rows of their own only where `hard` is set."""
        model = self.model(trainable, frozen)
        features = {**kept, **run_towers(model, batch.clips, [tower for tower in of_modalities(kind.media) if tower not in self.kept])}
        keys = (None, None) if key is None else jax.random.split(key)
        embedded = embed_streams(model, batch, features, kind, dropout_key=keys[0], **self._options)
        if hard and batch.hard is not None:
            still = self.model(jax.lax.stop_gradient(trainable), frozen)
            embedded["hard"] = embed_hard_negatives(still, batch, features, kind, dropout_key=keys[1], attention=self._options["attention"])
        return embedded

    def plain(self, trainable: Arrays, frozen: Arrays, batch: TrainBatch, kind: StepKind, key: jax.Array | None) -> tuple[Arrays, Metrics]:
        """Returns gradient and metrics of one micro-batch that is a pool of its own."""
        kept = self.keep(trainable, frozen, batch, kind)

        def loss(trainable: Arrays) -> tuple[jax.Array, Metrics]:
            embeddings = self.embed(trainable, frozen, batch, kept, kind, key, hard=True)
            return compute_losses(embeddings, loss_scalars(trainable), self.losses, kind, batch.shuffle.shape[0])

        gradients, metrics = jax.grad(loss, has_aux=True)(trainable)
        return gradients, metrics

    def cached(
        self, trainable: Arrays, frozen: Arrays, batches: TrainBatch, kind: StepKind, keys: jax.Array | None
    ) -> tuple[Arrays, Metrics]:
        """Returns gradient and metrics of all micro-batches as one pool, as the whole batch at once would give them.

        Embeddings first, without residuals; then the loss and dL/dz of the pool; then each micro-batch again with its part of dL/dz. Tower
        outputs are kept from the first pass to the second.

        Args:
          batches: arrays with the leading axis n.
          keys: (n, 2) dropout keys: both passes draw the same masks.
        """

        def first(_: None, item: Any) -> tuple[None, Any]:
            batch, key = item
            kept = self.keep(trainable, frozen, batch, kind)
            return None, (kept, self.embed(trainable, frozen, batch, kept, kind, key, hard=True))

        _, (kept, embeddings) = jax.lax.scan(first, None, (batches, keys))
        pool = {name: constrain(z.reshape(-1, z.shape[-1]), "batch", "features") for name, z in embeddings.items()}
        blocks = batches.shuffle.shape[0] * batches.shuffle.shape[1]

        def loss(pool: Embeddings, scalars: Arrays) -> tuple[jax.Array, Metrics]:
            return compute_losses(pool, scalars, self.losses, kind, blocks)

        (by_z, by_scalar), metrics = jax.grad(loss, argnums=(0, 1), has_aux=True)(pool, loss_scalars(trainable))
        by_z = {name: by_z[name].reshape(z.shape) for name, z in embeddings.items() if name != "hard"}

        def second(total: Arrays, item: Any) -> tuple[Arrays, None]:
            batch, key, kept, by_z = item

            def again(trainable: Arrays) -> Embeddings:
                embeddings = self.embed(trainable, frozen, batch, kept, kind, key, hard=False)
                return {name: embeddings[name] for name in by_z}

            _, pull = jax.vjp(again, trainable)
            return jax.tree.map(jnp.add, total, pull(by_z)[0]), None

        gradients, _ = jax.lax.scan(second, jax.tree.map(jnp.zeros_like, trainable), (batches, keys, kept, by_z))
        return {**gradients, **by_scalar}, metrics
