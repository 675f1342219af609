"""The losses that a run can weigh, a row each, and the scalars that they train.

Letters: B clips (of this shard, under `axis_name`), D width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from omni_jax.objectives.infonce import AxisName
from omni_jax.objectives.losses import distillation_loss, pairwise_loss, tuple_loss
from omni_jax.objectives.schedule import JOINT
from omni_jax.objectives.siglip import siglip_loss


@dataclasses.dataclass(frozen=True)
class Pool:
    """What a loss is computed from: the clips that are one another's negatives.

    Attributes:
      z: name -> (B, D): "anchor", "positive", "hard", and the active modalities.
      singles, pairs: the active modalities and pairs.
      scalars: name -> value, of those that the loss names.
      axis_name: mesh axes the clips are split over; None where they are the whole pool.
      hard_scope, hard_blocks, hard_weight: as `info_nce` takes them.
    """

    z: Mapping[str, jax.Array]
    singles: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    scalars: Mapping[str, jax.Array]
    axis_name: AxisName | None = None
    hard_scope: str = "local"
    hard_blocks: int | None = None
    hard_weight: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """What every loss reads of it besides embeddings."""
        return {"temperature": self.scalars["temperature"], "axis_name": self.axis_name}

    @property
    def hard_options(self) -> dict[str, Any]:
        """The same for a loss with hard negatives."""
        return self.options | {name: getattr(self, name) for name in ("hard_scope", "hard_blocks", "hard_weight")}


@dataclasses.dataclass(frozen=True)
class Scalar:
    """A number that losses read and that may train.

    Attributes:
      about: what it is, for people who watch a run.
      path: of the array that trains, among the trainable parameters.
      start: where it begins unless the config says otherwise.
      to_array, to_value: from its value to what trains, and back.
    """

    about: str
    path: str
    start: float
    to_array: Callable[[float], float] = float
    to_value: Callable[[jax.Array], jax.Array] = lambda x: x


@dataclasses.dataclass(frozen=True)
class Loss:
    """One loss.

    Attributes:
      metric: its name in metrics.
      about: what it compares, for people who watch a run.
      needs: what is embedded for it: "anchor", "positive", "hard", "singles" (the active modalities), "pairs" (those in pairs),
        "duals" (the active modalities, and two of them together).
      value: the pool to a float32 scalar, the same on every shard.
      scalars: names in SCALARS.
    """

    metric: str
    about: str
    needs: frozenset[str]
    value: Callable[[Pool], jax.Array]
    scalars: tuple[str, ...] = ("temperature",)


HEAD = "loss/"
"""Head of the paths of all scalars: they are not the encoder's."""

SCALARS = {
    "temperature": Scalar(
        "Divisor of the similarities.", f"{HEAD}log_inverse_temperature", 0.01, lambda tau: -math.log(tau), lambda x: jnp.exp(-x)
    ),
    "siglip_bias": Scalar("What the sigmoid loss adds to each logit.", f"{HEAD}siglip_bias", -10.0),
}

LOSSES = {
    "tuple": Loss(
        "L_T",
        "Tuple loss: the whole tuple against the augmented copy, with hard negatives.",
        frozenset({"anchor", "positive", "hard"}),
        lambda p: tuple_loss(p.z["anchor"], p.z["positive"], p.z["hard"], **p.hard_options),
    ),
    "distillation": Loss(
        "L_D",
        "Distillation loss: similarities of single modalities towards those of the whole tuple.",
        frozenset({"anchor", "singles"}),
        lambda p: distillation_loss(p.z["anchor"], [p.z[name] for name in p.singles], **p.options),
    ),
    "pairwise": Loss(
        "L_A",
        "Pairwise alignment loss: InfoNCE in both directions over pairs of modalities.",
        frozenset({"pairs"}),
        lambda p: pairwise_loss(p.z, p.pairs, **p.options),
    ),
    "joint": Loss(
        "L_J",
        "Joint alignment loss, not in the paper: InfoNCE in both directions between a modality and the two others together.",
        frozenset({"duals"}),
        lambda p: pairwise_loss(p.z, [pair for pair in JOINT if pair[1] in p.z], **p.options),
    ),
    "siglip": Loss(
        "L_S",
        "Sigmoid loss over pairs of modalities: each pair of the batch judged by itself.",
        frozenset({"pairs"}),
        lambda p: siglip_loss(p.z, p.pairs, bias=p.scalars["siglip_bias"], **p.options),
        scalars=("temperature", "siglip_bias"),
    ),
}
