"""The losses: arrays in, scalars out. Knows no model, no mesh and no file."""

from omni_jax.objectives.infonce import info_nce
from omni_jax.objectives.losses import distillation_loss, pairwise_loss, tuple_loss
from omni_jax.objectives.schedule import HARD_NEGATIVES, PAIRS, hard_negative_in_play, pairs_in_play, students_in_play
from omni_jax.objectives.siglip import siglip_loss, sigmoid_contrast
from omni_jax.objectives.table import LOSSES, SCALARS, Loss, Pool, Scalar

__all__ = [
    "HARD_NEGATIVES",
    "LOSSES",
    "PAIRS",
    "SCALARS",
    "Loss",
    "Pool",
    "Scalar",
    "distillation_loss",
    "hard_negative_in_play",
    "info_nce",
    "pairs_in_play",
    "pairwise_loss",
    "siglip_loss",
    "sigmoid_contrast",
    "students_in_play",
    "tuple_loss",
]
