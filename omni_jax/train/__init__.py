"""Training: what trains, the optimizer, the batch, the streams of a step, the step itself."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOME = {
    "BatchShapes": "batch",
    "TrainBatch": "batch",
    "UpdateBatch": "batch",
    "fit_shapes": "batch",
    "pack_micro_batch": "batch",
    "pack_update": "batch",
    "place_batch": "batch",
    "place_update": "batch",
    "stack_micro_batches": "batch",
    "OptimizerConfig": "optimizer",
    "LossConfig": "plan",
    "kinds_of_update": "plan",
    "step_kind": "plan",
    "RunConfig": "run_config",
    "TrainState": "state",
    "StepConfig": "step",
    "TrainStep": "step",
    "TrainableConfig": "trainable",
    "report": "trainable",
}


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first used: who reads the workdir of a run needs no optimizer."""
    if name not in _HOME:
        raise AttributeError(f"module 'omni_jax.train' has no attribute {name!r}")
    return getattr(importlib.import_module(f"omni_jax.train.{_HOME[name]}"), name)
