"""Training: what trains, the optimizer, the batch, the streams of a step, the step itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from omni_jax.config.public_names import loaded_when_used

if TYPE_CHECKING:
    from omni_jax.train.batch import BatchShapes, TrainBatch, fit_shapes, pack_micro_batch, pack_update, place_batch, stack_micro_batches
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
    "fit_shapes",
    "kinds_of_update",
    "pack_micro_batch",
    "pack_update",
    "place_batch",
    "report",
    "stack_micro_batches",
    "step_kind",
]

__getattr__, __dir__ = loaded_when_used(
    __name__,
    {
        "batch": "BatchShapes TrainBatch fit_shapes pack_micro_batch pack_update place_batch stack_micro_batches",
        "optimizer": "OptimizerConfig",
        "plan": "LossConfig kinds_of_update step_kind",
        "run_config": "RunConfig",
        "state": "TrainState",
        "step": "StepConfig TrainStep",
        "trainable": "TrainableConfig report",
    },
)
