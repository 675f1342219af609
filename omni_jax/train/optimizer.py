"""The optimizer of the release: AdamW with warm-up, cosine and clipping (SPEC section 7), as optax transformations over named arrays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from omni_jax.config import ConfigError
from omni_jax.config.errors import check_fields, positive
from omni_jax.objectives import SCALARS
from omni_jax.train.trainable import Arrays

DECAYED = ("kernel", "lora_a", "lora_b", "embedding", "v")
NOT_DECAYED = ("bias", "scale", "g", "gate_scale", *(scalar.path.rpartition("/")[2] for scalar in SCALARS.values()))
"""Last parts of parameter paths: matrices and tables decay; biases, norms, gains and the scalars of losses do not."""

TORCH_CLIP_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW of the release.

    Attributes:
      total_steps: steps of the whole schedule.
      learning_rate: peak, reached at the end of the warm-up.
      warmup_ratio: share of the steps in which the learning rate rises linearly.
      warmup_steps: None for ceil(warmup_ratio * total_steps).
      final_fraction: share of the learning rate that the cosine ends at.
      b1, b2: decay rates of the first and the second moment.
      eps: added to the root of the second moment.
      weight_decay: of matrices and tables; biases, norms and gains do not decay.
      clip_norm: largest global norm of a gradient.
    """

    total_steps: int
    learning_rate: float = 1e-5
    warmup_ratio: float = 0.03
    warmup_steps: int | None = None
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        what = "optimizer field "
        check_fields(self, what, "total_steps", lambda value: value >= 1, "must be at least 1")
        check_fields(self, what, "learning_rate eps clip_norm", positive, "must be positive")
        check_fields(self, what, "warmup_ratio final_fraction", lambda value: 0 <= value <= 1, "must be between 0 and 1")
        # 1 would divide by zero where the moments' start is corrected.
        check_fields(self, what, "b1 b2", lambda value: 0 <= value < 1, "must be at least 0 and below 1")
        if self.weight_decay < 0 or (self.warmup_steps or 0) < 0:
            raise ConfigError("optimizer fields weight_decay and warmup_steps must not be negative")

    @property
    def warmup(self) -> int:
        """Updates of the warm-up."""
        return math.ceil(self.warmup_ratio * self.total_steps) if self.warmup_steps is None else self.warmup_steps


def schedule(config: OptimizerConfig) -> Callable[[Any], jax.Array]:
    """Returns step number (from 0) -> learning rate: rising from 0 in a line, then a cosine down to `final_fraction` of it."""
    rise, fall = config.warmup, max(1, config.total_steps - config.warmup)

    def rate(count: Any) -> jax.Array:
        u = jnp.asarray(count, jnp.float32)
        turn = jnp.clip((u - rise) / fall, 0.0, 1.0)
        share = config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * turn))
        return config.learning_rate * jnp.where(u < rise, u / max(rise, 1), share)

    return rate


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Scales gradients by min(1, limit / (norm + 1e-6)): torch's rule, whose epsilon optax does not have."""

    def clipped(updates: Any, _: Any) -> Any:
        factor = jnp.minimum(1.0, limit / (optax.tree.norm(updates) + TORCH_CLIP_EPSILON))
        return jax.tree.map(lambda g: g * factor, updates)

    return optax.stateless(clipped)


def decays(path: str) -> bool:
    """Whether weight decay applies to a parameter, by the last part of its path.

    Raises:
      ConfigError: for a kind of parameter this rule does not know.
    """
    kind = path.rpartition("/")[2]
    if kind not in DECAYED + NOT_DECAYED:
        raise ConfigError(f"parameter {path}: add {kind!r} to DECAYED or NOT_DECAYED in omni_jax/train/optimizer.py")
    return kind in DECAYED


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns the optimizer over flat dicts path -> array: clip, Adam, decoupled weight decay, schedule."""

    def mask(params: Arrays) -> dict[str, bool]:
        return {path: decays(path) for path in params}

    return optax.chain(
        clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask),
        optax.scale_by_learning_rate(schedule(config)),
    )
