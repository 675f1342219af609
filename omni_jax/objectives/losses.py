"""The three losses (SPEC section 6): tuple, fusion as teacher, pairwise. Pure functions of batch embeddings (B, D) to float32 scalars.

`options` are those of `info_nce`: the temperature, `axis_name`, and for hard negatives what begins with `hard_`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from omni_jax.objectives.infonce import info_nce, mean_of


def tuple_loss(anchor: jax.Array, positive: jax.Array, hard_negatives: jax.Array | None = None, **options: Any) -> jax.Array:
    """Returns L_T: InfoNCE of z_TVA against the augmented copy's z_T'V'A', hard negative tuples as further columns without gradient."""
    return info_nce(anchor, positive, None if hard_negatives is None else jax.lax.stop_gradient(hard_negatives), **options)


def distillation_loss(teacher: jax.Array, students: Iterable[jax.Array] | Mapping[str, jax.Array], **options: Any) -> jax.Array:
    """Returns L_D: the mean over the students of InfoNCE(stop_gradient(teacher), student).

    Args:
      teacher: (B, D), z_TVA.
      students: the active single-modal embeddings (SPEC: two under the cycle, three under all pairs).
    """
    fixed = jax.lax.stop_gradient(teacher)
    rows = students.values() if isinstance(students, Mapping) else students
    return mean_of([info_nce(fixed, x, **options) for x in rows], "students")


def pairwise_loss(embeddings: Mapping[str, jax.Array], pairs: Sequence[tuple[str, str]], **options: Any) -> jax.Array:
    """Returns L_A: the mean over `pairs` of InfoNCE between two single-modal embeddings.

    Args:
      embeddings: modality -> (B, D).
      pairs: pairs of its keys; `schedule.active_pairs` lists those of a step.
    """
    return mean_of([info_nce(embeddings[x], embeddings[y], **options) for x, y in pairs], "pairs")
