"""InfoNCE over batch embeddings, on the global batch or on the shards of one.

Letters: B rows of the batch (of this shard, under `axis_name`), D width, H hard negatives.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

EPSILON = 1e-12  # smallest norm divided by, as torch.nn.functional.normalize has it

AxisName = str | tuple[str, ...]


def unit(x: jax.Array) -> jax.Array:
    """Returns the rows of `x` (..., D) divided by their norms, float32. A zero row stays zero and has a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), EPSILON**2))


def info_nce(
    a: jax.Array,
    b: jax.Array,
    hard_negatives: jax.Array | None = None,
    *,
    temperature: float | jax.Array,
    axis_name: AxisName | None = None,
    hard_scope: str = "local",
    hard_blocks: int = 1,
) -> jax.Array:
    """Returns the mean of the two cross-entropies a -> b and b -> a over cosines divided by the temperature: a float32 scalar.

    Row i of `a` belongs to row i of `b`; every other row of the global batch is a negative. Hard negatives become further columns of both
    directions. (SPEC section 6.)

    Args:
      a: (B, D) embeddings, any float type, need not be normalised; computed in float32.
      b: (B, D).
      hard_negatives: (H, D) or None; a gradient flows into them here.
      temperature: a number, or a scalar array where it is learned.
      axis_name: mesh axes the batch is split over, inside `jax.shard_map`: negatives are gathered, and every shard returns the value of
        the global batch. None: `a` and `b` are the global batch.
      hard_scope: "local": a row sees the hard negatives of its own shard, as the release trains; "global": those of all shards.
      hard_blocks: without `axis_name` and with "local", the number of shards the batch stands for: it is cut into that many blocks of
        consecutive rows, hard negatives likewise.

    Raises:
      ValueError: for shapes that do not fit together, an unknown scope, or blocks that do not divide the batch.
    """
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"a {a.shape} and b {b.shape} must both be (B, D)")
    if hard_scope not in ("local", "global"):
        raise ValueError(f"hard_scope {hard_scope!r}: choose 'local' or 'global'")
    blocks = hard_blocks if hard_scope == "local" else 1
    if axis_name is not None and blocks != 1:
        raise ValueError(f"hard_blocks={hard_blocks} is for a global batch; under axis_name the shards are the blocks")
    a, b = unit(a), unit(b)
    all_a, all_b, first = a, b, 0
    if axis_name is not None:
        all_a, all_b = _gather(a, axis_name), _gather(b, axis_name)
        first = jax.lax.axis_index(axis_name) * a.shape[0]
    hard = None
    if hard_negatives is not None:
        hard = _blocked(hard_negatives, a, blocks)
        if axis_name is not None and hard_scope == "global":
            hard = _gather(hard[0], axis_name)[None]
    own = first + jnp.arange(a.shape[0])
    loss = 0.5 * (_cross_entropy(a, all_b, own, hard, temperature) + _cross_entropy(b, all_a, own, hard, temperature))
    return loss if axis_name is None else jax.lax.pmean(loss, axis_name)


def _cross_entropy(x: jax.Array, columns: jax.Array, own: jax.Array, hard: jax.Array | None, temperature: float | jax.Array) -> jax.Array:
    """Mean over the rows of x (B, D) of -log softmax at column `own` (B,); `hard` is (blocks, H / blocks, D)."""
    logits = _cosines(x, columns)
    positive = jnp.take_along_axis(logits, own[:, None], axis=1)[:, 0]
    if hard is not None:
        rows = x.reshape(hard.shape[0], -1, x.shape[1])
        logits = jnp.concatenate([logits, _cosines(rows, hard).reshape(x.shape[0], -1)], axis=1)
    return jnp.mean(jax.nn.logsumexp(logits / temperature, axis=1) - positive / temperature)


def _cosines(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum("...id,...jd->...ij", x, y, precision=jax.lax.Precision.HIGHEST)


def _blocked(hard: jax.Array, a: jax.Array, blocks: int) -> jax.Array:
    if hard.ndim != 2 or hard.shape[1] != a.shape[1]:
        raise ValueError(f"hard negatives {hard.shape} must be (H, {a.shape[1]})")
    if blocks < 1 or a.shape[0] % blocks or hard.shape[0] % blocks:
        raise ValueError(f"hard_blocks={blocks} must divide the batch ({a.shape[0]}) and the hard negatives ({hard.shape[0]})")
    return unit(hard).reshape(blocks, -1, a.shape[1])


def _gather(x: jax.Array, axis_name: AxisName) -> jax.Array:
    return jax.lax.all_gather(x, axis_name, tiled=True)
