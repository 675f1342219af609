"""Small training states without a model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from omni_jax.train import OptimizerConfig, TrainState
from omni_jax.train.optimizer import make_optimizer
from omni_jax.train.state import new_state

OPTIMIZER = make_optimizer(OptimizerConfig(total_steps=10))


def state(step: int = 0, mesh: Mesh | None = None, rows: int = 8, fill: float | None = None) -> TrainState:
    """Returns a state of two parameters and their moments, other values for each step; the first is split over fsdp."""
    rng = np.random.default_rng(step)
    draw = (lambda *shape: rng.standard_normal(shape)) if fill is None else (lambda *shape: np.full(shape, fill))
    trainable = {"head/fc1/kernel": jnp.asarray(draw(rows, 4), jnp.float32), "bridge/norm/scale": jnp.asarray(draw(4), jnp.float32)}
    made = new_state(trainable, OPTIMIZER, seed=7)
    moments = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), made.optimizer)
    made = TrainState(jnp.int32(step), trainable, moments, jnp.int32(step // 2), jnp.int32(0), made.key)
    if mesh is None:
        return made

    def place(x: Any) -> jax.Array:
        spec = PartitionSpec("fsdp") if x.shape == (rows, 4) else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, made)


def assert_equal(a: TrainState, b: TrainState) -> None:
    """Asserts that two states agree to the bit."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
