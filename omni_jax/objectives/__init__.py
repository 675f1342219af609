"""The losses: arrays in, scalars out. Knows no model, no mesh and no file."""

from omni_jax.objectives.health import HEALTH, health
from omni_jax.objectives.infonce import info_nce
from omni_jax.objectives.losses import distillation_loss, pairwise_loss, tuple_loss
from omni_jax.objectives.schedule import active_duals, active_hard_negative, active_pairs, active_students
from omni_jax.objectives.siglip import siglip_loss, sigmoid_contrast
from omni_jax.objectives.table import LOSSES, SCALARS, Pool
