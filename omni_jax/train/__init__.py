"""Training: what trains, the optimizer, the batch, the streams of a step, the step itself."""

from omni_jax.train.batch import (
    BatchShapes,
    TrainBatch,
    UpdateBatch,
    fit_shapes,
    pack_micro_batch,
    pack_update,
    place_batch,
    place_update,
    stack_micro_batches,
)
from omni_jax.train.optimizer import OptimizerConfig
from omni_jax.train.plan import LossConfig, kinds_of_update, step_kind
from omni_jax.train.run_config import RunConfig
from omni_jax.train.state import TrainState
from omni_jax.train.step import StepConfig, TrainStep
from omni_jax.train.trainable import TrainableConfig, report

__all__ = [
    "BatchShapes",
    "LossConfig",
    "OptimizerConfig",
    "RunConfig",
    "StepConfig",
    "TrainBatch",
    "TrainState",
    "TrainStep",
    "TrainableConfig",
    "UpdateBatch",
    "fit_shapes",
    "kinds_of_update",
    "pack_micro_batch",
    "pack_update",
    "place_batch",
    "place_update",
    "report",
    "stack_micro_batches",
    "step_kind",
]
