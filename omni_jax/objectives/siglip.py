"""The sigmoid loss of SigLIP (arXiv 2303.15343), which the release names as `use_siglip_loss` with a learned `siglip_bias`.

Letters: B rows of the batch (of this shard, under `axis_name`), D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from omni_jax.objectives.infonce import AxisName, all_rows, check_pairs, cosines, l2_normalize, mean_of, own_columns


def sigmoid_contrast(
    a: jax.Array, b: jax.Array, *, temperature: float | jax.Array, bias: float | jax.Array, axis_name: AxisName | None = None
) -> jax.Array:
    """Returns the mean over rows of the sum over columns of -log sigmoid(y (cosine / temperature + bias)): a float32 scalar.

    Each pair of the global batch is a question of its own: y is 1 where row i of `a` meets row i of `b`, -1 elsewhere.

    Args:
      a: (B, D) embeddings, any float type, need not be normalised; computed in float32.
      b: (B, D).
      temperature: a number, or a scalar array where it is learned.
      bias: the same, added to every logit; -10 at first, so that the many pairs that do not belong together weigh little.
      axis_name: as for `info_nce`.

    Raises:
      ValueError: for shapes that do not fit together.
    """
    check_pairs(a, b)
    rows, columns = l2_normalize(a), all_rows(l2_normalize(b), axis_name)
    logits = cosines(rows, columns) / temperature + bias
    same = own_columns(rows, axis_name)[:, None] == jnp.arange(columns.shape[0])
    loss = -jnp.mean(jnp.sum(jax.nn.log_sigmoid(jnp.where(same, logits, -logits)), axis=1))
    return loss if axis_name is None else jax.lax.pmean(loss, axis_name)


def siglip_loss(embeddings: Mapping[str, jax.Array], pairs: Sequence[tuple[str, str]], **options: Any) -> jax.Array:
    """Returns L_S: the mean over `pairs` of the sigmoid loss between two single-modal embeddings, as L_A has InfoNCE between them.

    Args:
      embeddings: modality -> (B, D).
      pairs: pairs of its keys; `schedule.active_pairs` lists those of a step.
      options: those of `sigmoid_contrast`.
    """
    return mean_of([sigmoid_contrast(embeddings[x], embeddings[y], **options) for x, y in pairs], "pairs")
