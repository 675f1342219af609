"""What the embeddings of a step say of a training run, beside its losses: arrays in, scalars out, without gradient.

Alignment and uniformity are those of Wang and Isola (arXiv 2005.10242), the gap that of Liang et al. (arXiv 2203.02053). All are of rows of
length 1.

Letters: b clips of this shard, B of the batch, D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from omni_jax.objectives.infonce import all_rows, cosines, l2_normalize, own_columns
from omni_jax.objectives.schedule import HARD_NEGATIVES, PAIRS
from omni_jax.objectives.table import Pool

HEALTH: dict[str, str] = {
    **{
        f"alignment_{m}": f"Mean squared distance of {m} from the whole tuple of its clip, or from the other active modalities where that "
        "is not embedded; 0 is best, 2 is chance."
        for m in HARD_NEGATIVES
    },
    **{
        f"uniformity_{m}": f"Log of the mean of exp(-2 squared distance) over pairs of clips, {m}; 0 where all are equal, about -4 where "
        "they spread over the sphere."
        for m in HARD_NEGATIVES
    },
    **{f"effective_rank_{m}": f"Participation ratio of the covariance of {m}; near 1 it has collapsed." for m in HARD_NEGATIVES},
    **{f"gap_{x}_{y}": f"Distance between the means of {x} and of {y}: 0 where they share a place." for x, y in PAIRS},
    **{
        f"hard_share_{m}": f"Share of hard negatives that exchange {m} and are nearer than the nearest other clip of the batch."
        for m in HARD_NEGATIVES
    },
    **{
        f"teacher_margin_{m}": f"How much better the whole tuple separates its own {m} from other clips than the other active "
        "modalities do; where it is not above 0, the distillation loss teaches nothing."
        for m in HARD_NEGATIVES
    },
}
"""Metric -> what it is, for people who watch a run."""


def health(pool: Pool, hard: str | None) -> dict[str, jax.Array]:
    """Returns those metrics of HEALTH that the embeddings of a step allow, float32 scalars, the same on every shard.

    Args:
      hard: the modality that the hard negatives exchange.
    """
    axis = pool.axis_name
    rows = {name: jax.lax.stop_gradient(l2_normalize(x)) for name, x in pool.z.items() if name != "hard"}
    columns = {name: all_rows(x, axis) for name, x in rows.items()}
    first = next(iter(rows))
    count = columns[first].shape[0]
    if count < 2:
        return {}
    itself = own_columns(rows[first], axis)[:, None] == jnp.arange(count)

    def nearest_other(x: str, y: str) -> tuple[jax.Array, jax.Array]:
        """Cosines (b,) of each row of x with its own clip's y, and with the nearest of the other clips."""
        found = cosines(rows[x], columns[y])
        return jnp.sum(jnp.where(itself, found, 0), axis=1), jnp.max(jnp.where(itself, -jnp.inf, found), axis=1)

    def margin(x: str, y: str) -> jax.Array:
        same, other = nearest_other(x, y)
        return same - other

    # Sums over the clips of this shard; those of all shards are added at once.
    sums: dict[str, jax.Array] = {}
    center = {m: columns[m].mean(axis=0) for m in pool.singles}
    for m in pool.singles:
        partners = ["anchor"] if "anchor" in rows else [other for other in pool.singles if other != m]
        if partners:
            sums[f"alignment_{m}"] = sum((2 - 2 * jnp.sum(rows[m] * rows[x]) / len(rows[m]) for x in partners), jnp.zeros(())) / len(
                partners
            )
        # By rows: libtpu 0.0.42 ends with a fault for v5p where exponentials of the whole matrix are summed.
        rows_of_m = jax.nn.logsumexp(4 * cosines(rows[m], columns[m]) - 4, axis=1, where=~itself)
        sums[f"uniformity_{m}"] = jnp.sum(jnp.exp(rows_of_m))
        spread = rows[m] - center[m]
        sums[f"effective_rank_{m}"] = jnp.stack([jnp.vdot(spread, spread), jnp.sum(jnp.square(cosines(spread, columns[m] - center[m])))])
        others = [other for other in pool.singles if other != m]
        if "anchor" in rows and others:
            students = sum((margin(other, m) for other in others), jnp.zeros(())) / len(others)
            sums[f"teacher_margin_{m}"] = jnp.mean(margin("anchor", m) - students)
    for x, y in PAIRS:
        if x in center and y in center:  # the mean over clips of x - y is the difference of the centers
            sums[f"gap_{x}_{y}"] = jnp.mean((rows[x] - rows[y]) @ (center[x] - center[y]))
    if hard is not None and {"anchor", "positive", "hard"} <= pool.z.keys():
        near = jnp.sum(rows["anchor"] * jax.lax.stop_gradient(l2_normalize(pool.z["hard"])), axis=1)
        sums[f"hard_share_{hard}"] = jnp.mean(near > nearest_other("anchor", "positive")[1])
    shards = count // len(rows[first])
    totals = sums if axis is None else jax.lax.psum(sums, axis)
    return {name: _of_sums(name, value, count, shards) for name, value in totals.items()}


def _of_sums(name: str, value: jax.Array, count: int, shards: int) -> jax.Array:
    """Returns a metric from what the shards' sums, or means, come to."""
    if name.startswith("uniformity"):
        return jnp.log(value / (count * (count - 1)))
    if name.startswith("effective_rank"):
        return jnp.square(value[0]) / jnp.maximum(value[1], 1e-12)
    return jnp.sqrt(jnp.maximum(value / shards, 0)) if name.startswith("gap") else value / shards
