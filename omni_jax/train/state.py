"""What changes from step to step, and its places on the devices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from omni_jax.config import ModelConfig
from omni_jax.model import param_axes
from omni_jax.parallel import sharding
from omni_jax.train.trainable import Arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run needs to resume, apart from the frozen weights and the data.

    Attributes:
      step: () int32, steps attempted.
      trainable: path -> float32 array.
      optimizer: state of the optimizer, for `trainable` alone.
      skipped: () int32, steps left out because the loss or the gradient was not finite.
      skipped_in_row: () int32, those since the last step that was made.
      key: (2,) uint32, from which every random draw of the run derives together with `step`; never changes.
    """

    step: Any
    trainable: Arrays
    optimizer: Any
    skipped: Any
    skipped_in_row: Any
    key: Any


def new_state(trainable: Arrays, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Returns the state before the first step."""

    # Each counter is a buffer of its own: a step gives all of them away.
    def zero() -> jax.Array:
        return jnp.zeros((), jnp.int32)

    return TrainState(zero(), trainable, optimizer.init(trainable), zero(), zero(), jax.random.PRNGKey(seed))


def array_shardings(arrays: Arrays, config: ModelConfig, mesh: Mesh | AbstractMesh) -> dict[str, NamedSharding]:
    """Returns path -> sharding for parameters by path; what is not the encoder's is replicated."""
    axes = {"/".join(path): names for path, names in param_axes(config).items()}
    whole = NamedSharding(mesh, PartitionSpec())
    return {path: sharding(axes[path], x.shape, mesh) if path in axes else whole for path, x in arrays.items()}


def state_shardings(state: TrainState, config: ModelConfig, mesh: Mesh | AbstractMesh) -> TrainState:
    """Returns the sharding of every leaf of a state (or of its shapes): moments lie where their parameters do."""
    places = array_shardings(state.trainable, config, mesh)
    whole = NamedSharding(mesh, PartitionSpec())

    def place(path: tuple[Any, ...], _: Any) -> NamedSharding:
        return next((places[k.key] for k in path if isinstance(k, jax.tree_util.DictKey) and k.key in places), whole)

    return jax.tree_util.tree_map_with_path(place, state)
