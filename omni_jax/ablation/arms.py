"""Arms of an ablation: a name, and the config fields in which a run of it differs."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence

from omni_jax.io.messages import as_input_error
from omni_jax.objectives import LOSSES
from omni_jax.types import InputError

PREFIX = "--config."
ALL = "all"
PUBLISHED = ("L_A", "L_D", "L_T")
"""What `all` stands for: the three losses of the paper."""

_BY_METRIC = {loss.metric: name for name, loss in LOSSES.items()}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
      name: as in the table.
      changes: "a.b=value", config fields that differ, applied in this order.
    """

    name: str
    changes: tuple[str, ...]


def parse_arms(losses: str, named: Sequence[str] = ()) -> list[Arm]:
    """Returns the arms in the order given; the first is what the others are compared with.

    Args:
      losses: comma-separated sums of losses by their names in metrics, such as "L_A,L_A+L_D,all"; "" for none.
      named: each "NAME=SETTINGS", where SETTINGS are separated by spaces as in a shell: a sum of losses, `--config.a.b=value`, or both.

    Raises:
      InputError: for a loss that does not exist, settings of another form, a name that is given twice, or fewer than two arms.
    """
    arms = [Arm(name, _weights(name, f"--arms {losses}")) for name in filter(None, losses.split(","))]
    for text in named:
        name, sign, settings = text.partition("=")
        where = f"--arm {text!r}"
        if not sign or not name.strip() or name.startswith("-"):
            raise InputError(f"{where}: write NAME=SETTINGS, such as 'half=L_A+L_D --config.losses.weights.distillation=0.5'")
        with as_input_error(f"{where}: cannot be split into settings", "check its quotes", ValueError):
            parts = shlex.split(settings)
        changes: list[str] = []
        for part in parts:
            changes += [part.removeprefix(PREFIX)] if part.startswith(PREFIX) else _weights(part, where)
        arms.append(Arm(name.strip(), tuple(changes)))
    names = [arm.name for arm in arms]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"arm {twice[0]!r} is given twice; give each arm a name of its own")
    if len(arms) < 2:
        raise InputError("an ablation compares arms with the first one; give at least two with --arms or --arm")
    return arms


def losses_of(text: str, where: str) -> tuple[str, ...]:
    """Returns the names in `losses.weights` of a sum of losses. Raises InputError, beginning with `where`, for one that does not exist."""
    chosen = PUBLISHED if text == ALL else tuple(text.split("+"))
    for metric in chosen:
        if metric not in _BY_METRIC:
            raise InputError(f"{where}: there is no loss {metric!r}; add up {', '.join(_BY_METRIC)}, or write {ALL}")
    return tuple(_BY_METRIC[metric] for metric in chosen)


def _weights(text: str, where: str) -> tuple[str, ...]:
    """Returns the weights of a sum of losses: 1 for those named, 0 for the others."""
    chosen = losses_of(text, where)
    return tuple(f"losses.weights.{name}={float(name in chosen)}" for name in _BY_METRIC.values())
