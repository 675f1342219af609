"""Loss configuration and the kind of each micro-batch. Source: SPEC section 6."""

from __future__ import annotations

import dataclasses
import math

from omni_jax import objectives
from omni_jax.config import ConfigError
from omni_jax.types import StepKind

NEGATIVES = ("micro", "global")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The losses and where their negatives come from.

    Attributes:
      tuple_weight, distillation_weight, pairwise_weight: factors of L_T, L_D and L_A; what only a loss of weight 0 needs is not computed.
      temperature: tau; the starting value where it is learned.
      learn_temperature: whether log(1 / tau) trains.
      pairs: "cycle" takes one pair per step, as released, "all" takes the three.
      hard_scope: "local": a row sees the hard negatives of its own block, as released; "global": all of them.
      hn_audio_only: the hard negative always exchanges the audio.
      negatives: "micro": each micro-batch is its own pool and gradients are averaged, as released; "global": one pool for all micro-batches
        of an update (gradient caching). The cycles count micro-batches under "micro" and updates under "global".
    """

    tuple_weight: float = 1.0
    distillation_weight: float = 1.0
    pairwise_weight: float = 1.0
    temperature: float = 0.01
    learn_temperature: bool = False
    pairs: str = "cycle"
    hard_scope: str = "local"
    hn_audio_only: bool = False
    negatives: str = "global"

    def __post_init__(self) -> None:
        for name, allowed in (("pairs", ("cycle", "all")), ("hard_scope", ("local", "global")), ("negatives", NEGATIVES)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"loss field {name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"loss field temperature={self.temperature}: must be positive")
        weights = (self.tuple_weight, self.distillation_weight, self.pairwise_weight)
        if min(weights) < 0 or not math.isfinite(sum(weights)) or sum(weights) == 0:
            raise ConfigError(f"loss weights {weights}: must not be negative, and one at least must be positive")


def step_kind(count: int, losses: LossConfig) -> StepKind:
    """Returns the kind at position `count` of the period-3 cycle; modalities are named "text", "audio", "video"."""
    tuples, single = losses.tuple_weight > 0, losses.distillation_weight > 0 or losses.pairwise_weight > 0
    return StepKind(
        anchor=tuples or losses.distillation_weight > 0,
        positive=tuples,
        hard=objectives.hard_negative_in_play(count, losses.hn_audio_only) if tuples else None,
        singles=objectives.students_in_play(count, losses.pairs) if single else (),
        pairs=objectives.pairs_in_play(count, losses.pairs) if losses.pairwise_weight > 0 else (),
    )


def kinds_of_update(update: int, micro_batches: int, losses: LossConfig) -> tuple[StepKind, ...]:
    """Returns the kind of each micro-batch of an update (from 0)."""
    if losses.negatives == "global":
        return (step_kind(update, losses),) * micro_batches
    return tuple(step_kind(update * micro_batches + i, losses) for i in range(micro_batches))
