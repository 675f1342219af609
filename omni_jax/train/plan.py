"""Loss configuration and the kind of each micro-batch. Source: SPEC section 6."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from omni_jax import objectives
from omni_jax.config import ConfigError
from omni_jax.config.errors import check_choices, check_fields, positive
from omni_jax.objectives import LOSSES, SCALARS
from omni_jax.types import StepKind

NEGATIVES = ("micro", "global")
PUBLISHED = {"tuple": 1.0, "distillation": 1.0, "pairwise": 1.0}

RENAMED = {f"{name}_weight": f"weights.{name}" for name in PUBLISHED}
"""Old name -> new name of loss fields; the next version knows the new ones alone."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The losses and where their negatives come from.

    Attributes:
      weights: loss -> its factor, names in `objectives.LOSSES`; a loss that is not named has weight 0. What only such a loss needs is not
        computed.
      temperature: tau; the starting value where it is learned.
      learn_temperature: whether log(1 / tau) trains.
      scalars: where the other scalars of the losses begin, all of which train; one that is not named begins as `objectives.SCALARS` says.
      pairs: "cycle" takes one pair per step, as released, "all" takes the three.
      hard_scope: "local": a row sees the hard negatives of its own block, as released; "global": all of them.
      hard_weight: what a hard negative counts for beside another clip, 1; 2 counts each twice in the denominator of L_T.
      hn_audio_only: the hard negative always exchanges the audio.
      negatives: "micro": each micro-batch is its own pool and gradients are averaged, as released; "global": one pool for all micro-batches
        of a step (gradient caching). The cycles count micro-batches under "micro" and steps under "global".
      matryoshka_dims: leading dimensions on which every loss is computed, too, after normalising again, so that vectors can be cut to them
        (`MatryoshkaLoss` of sentence-transformers, arXiv 2205.13147). The losses are added, with all dimensions as well; () adds none.
      matryoshka_weights: the factor of each of `matryoshka_dims`; () is 1 for each. All dimensions have 1 unless they are listed, too.
    """

    weights: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict(PUBLISHED), hash=False)
    temperature: float = 0.01
    learn_temperature: bool = False
    scalars: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    pairs: str = "cycle"
    hard_scope: str = "local"
    hard_weight: float = 1.0
    hn_audio_only: bool = False
    negatives: str = "micro"
    matryoshka_dims: tuple[int, ...] = ()
    matryoshka_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_choices(self, "loss field ", pairs=("cycle", "all"), hard_scope=("local", "global"), negatives=NEGATIVES)
        check_fields(self, "loss field ", "temperature hard_weight", positive, "must be positive")
        weights = _numbers("weights", self.weights, tuple(LOSSES))
        if min(weights.values(), default=0.0) < 0 or not any(weights.values()):
            raise ConfigError(f"loss field weights={weights}: must not be negative, and one at least must be positive")
        # Equal configs are equal records, whichever zeros they spell out.
        object.__setattr__(self, "weights", {name: weights[name] for name in LOSSES if weights.get(name)})
        dims, factors = self.matryoshka_dims, self.matryoshka_weights
        if min(dims, default=1) < 1 or len(set(dims)) < len(dims):
            raise ConfigError(f"loss field matryoshka_dims={dims}: must be different positive numbers of dimensions")
        if factors and (len(factors) != len(dims) or not all(math.isfinite(w) and w > 0 for w in factors)):
            raise ConfigError(f"loss field matryoshka_weights={factors}: give one positive number for each of matryoshka_dims={dims}")
        read = [name for name in self.read if name != "temperature"]
        object.__setattr__(self, "scalars", _numbers("scalars", self.scalars, read))

    @property
    def needs(self) -> frozenset[str]:
        """What is embedded for the active losses, as `objectives.Loss.needs`."""
        return frozenset[str]().union(*(LOSSES[name].needs for name in self.weights))

    def widths(self, width: int) -> dict[int, float]:
        """Returns dimensions -> factor of the losses on so many leading ones, all `width` of them first.

        Raises:
          ConfigError: for more dimensions than there are.
        """
        if wide := [dim for dim in self.matryoshka_dims if dim > width]:
            raise ConfigError(f"loss field matryoshka_dims={self.matryoshka_dims}: {wide[0]} is more than the {width} of an embedding")
        factors = self.matryoshka_weights or (1.0,) * len(self.matryoshka_dims)
        return {width: 1.0} | dict(zip(self.matryoshka_dims, factors, strict=True))

    @property
    def read(self) -> tuple[str, ...]:
        """The scalars that the active losses read, names in `objectives.SCALARS`."""
        return tuple(name for name in SCALARS if any(name in LOSSES[loss].scalars for loss in self.weights))

    @property
    def starts(self) -> dict[str, float]:
        """Where each scalar that is read begins."""
        starts = {"temperature": self.temperature, **self.scalars}
        return {name: float(starts.get(name, SCALARS[name].start)) for name in self.read}

    @property
    def trained(self) -> dict[str, float]:
        """Path -> first value of the array of each scalar that trains."""
        starts = {name: start for name, start in self.starts.items() if name != "temperature" or self.learn_temperature}
        return {SCALARS[name].path: SCALARS[name].to_array(start) for name, start in starts.items()}

    def values(self, trainable: Mapping[str, jax.Array]) -> dict[str, jax.Array | float]:
        """Returns the value of each scalar that is read, from trainable arrays by path where it trains."""
        paths = {name: SCALARS[name].path for name in self.read}
        return {name: SCALARS[name].to_value(trainable[path]) if path in trainable else self.starts[name] for name, path in paths.items()}


def _numbers(field: str, given: Mapping[str, Any], known: Sequence[str]) -> dict[str, float]:
    """Returns a field's numbers by name. Raises ConfigError for a name that is not known, and for what is no finite number."""
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"loss field {field}.{name}: unknown; choose among {', '.join(known) or 'none'}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"loss field {field}.{name}={value!r}: must be a number")
    return {name: float(value) for name, value in given.items()}


def renamed(losses: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields of a `LossConfig` by their present names. Raises ConfigError for a field that is given under both names."""
    found = dict(losses)
    old = {RENAMED[name].partition(".")[2]: found.pop(name) for name in RENAMED if name in found}
    if not old:
        return found
    weights = found.get("weights", {})
    if both := old.keys() & weights.keys():
        raise ConfigError(f"loss fields {min(both)}_weight and weights.{min(both)} are one; give weights.{min(both)} alone")
    return found | {"weights": {**(weights or PUBLISHED), **old}}


def step_kind(count: int, losses: LossConfig, mined: bool = False) -> StepKind:
    """Returns the kind at position `count` of the period-3 cycle; modalities are named "text", "audio", "video".

    Args:
      mined: whether sound and picture of hard negatives may be those of any clip, as mined ones are.
    """
    needs = losses.needs
    hard = objectives.active_hard_negative(count, losses.hn_audio_only) if "hard" in needs else None
    return StepKind(
        anchor="anchor" in needs,
        positive="positive" in needs,
        hard=hard,
        singles=objectives.active_students(count, losses.pairs) if needs & {"singles", "pairs", "duals"} else (),
        pairs=objectives.active_pairs(count, losses.pairs) if "pairs" in needs else (),
        duals=objectives.active_duals(count, losses.pairs) if "duals" in needs else (),
        hard_media=mined and hard in ("audio", "video"),
    )


def kinds_of_update(update: int, micro_batches: int, losses: LossConfig, mined: bool = False) -> tuple[StepKind, ...]:
    """Returns the kind of each micro-batch of a step (from 0); `mined` as for `step_kind`."""
    if losses.negatives == "global":
        return (step_kind(update, losses, mined),) * micro_batches
    return tuple(step_kind(update * micro_batches + i, losses, mined) for i in range(micro_batches))
