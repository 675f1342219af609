"""The three losses (SPEC section 6): tuple, fusion as teacher, pairwise. Pure functions of batch embeddings (B, D) to float32 scalars.

`temperature`, `axis_name` and what begins with `hard_` are those of `info_nce`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import jax

from omni_jax.objectives.infonce import AxisName, info_nce, mean_of


def tuple_loss(
    anchor: jax.Array,
    positive: jax.Array,
    hard_negatives: jax.Array | None = None,
    *,
    temperature: float | jax.Array,
    axis_name: AxisName | None = None,
    hard_scope: str = "local",
    hard_blocks: int | None = None,
    hard_weight: float = 1.0,
) -> jax.Array:
    """Returns L_T: InfoNCE of z_TVA against the augmented copy's z_T'V'A', hard negative tuples as further columns without gradient."""
    hard = None if hard_negatives is None else jax.lax.stop_gradient(hard_negatives)
    return info_nce(
        anchor,
        positive,
        hard,
        temperature=temperature,
        axis_name=axis_name,
        hard_scope=hard_scope,
        hard_blocks=hard_blocks,
        hard_weight=hard_weight,
    )


def distillation_loss(
    teacher: jax.Array,
    students: Iterable[jax.Array] | Mapping[str, jax.Array],
    *,
    temperature: float | jax.Array,
    axis_name: AxisName | None = None,
) -> jax.Array:
    """Returns L_D: the mean over the students of InfoNCE(stop_gradient(teacher), student).

    Args:
      teacher: (B, D), z_TVA.
      students: the active single-modal embeddings (SPEC: two under the cycle, three under all pairs).
    """
    fixed = jax.lax.stop_gradient(teacher)
    rows = students.values() if isinstance(students, Mapping) else students
    return mean_of([info_nce(fixed, x, temperature=temperature, axis_name=axis_name) for x in rows], "students")


def pairwise_loss(
    embeddings: Mapping[str, jax.Array],
    pairs: Sequence[tuple[str, str]],
    *,
    temperature: float | jax.Array,
    axis_name: AxisName | None = None,
) -> jax.Array:
    """Returns L_A: the mean over `pairs` of InfoNCE between two single-modal embeddings.

    Args:
      embeddings: modality -> (B, D).
      pairs: pairs of its keys; `schedule.active_pairs` lists those of a step.
    """
    terms = [info_nce(embeddings[x], embeddings[y], temperature=temperature, axis_name=axis_name) for x, y in pairs]
    return mean_of(terms, "pairs")
