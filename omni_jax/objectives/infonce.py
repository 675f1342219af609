"""InfoNCE over batch embeddings, on the global batch or on the shards of one.

Letters: B rows of the batch (of this shard, under `axis_name`), D width, H hard negatives.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

EPSILON = 1e-12  # smallest norm divided by, as torch.nn.functional.normalize has it

AxisName = str | tuple[str, ...]


def l2_normalize(x: jax.Array) -> jax.Array:
    """Returns the rows of `x` (..., D) divided by their norms, float32. A zero row stays zero and has a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), EPSILON**2))


def cosines(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the products (..., I, J) of unit rows x (..., I, D) and y (..., J, D), float32 on every backend."""
    return jnp.einsum("...id,...jd->...ij", x, y, precision=jax.lax.Precision.HIGHEST)


def all_rows(x: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """Returns the rows of all shards, in their order; x itself where it is the global batch."""
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)


def own_columns(x: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """Returns (B,) int32: the number in the global batch of each row of this shard."""
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * x.shape[0]
    return first + jnp.arange(x.shape[0])


def mean_of(terms: list[jax.Array], what: str) -> jax.Array:
    """Returns the mean of scalars. Raises ValueError, naming what they are of, where there are none."""
    if not terms:
        raise ValueError(f"no {what}: the mean over none is undefined")
    return jnp.mean(jnp.stack(terms))


def check_pairs(a: jax.Array, b: jax.Array) -> None:
    """Raises ValueError unless both are (B, D)."""
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"a {a.shape} and b {b.shape} must both be (B, D)")


def info_nce(
    a: jax.Array,
    b: jax.Array,
    hard_negatives: jax.Array | None = None,
    *,
    temperature: float | jax.Array,
    axis_name: AxisName | None = None,
    hard_scope: str = "local",
    hard_blocks: int | None = None,
    hard_weight: float = 1.0,
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
      hard_scope: "local": a row sees the hard negatives of its own block, as the release trains; "global": all of them.
      hard_blocks: blocks of consecutive rows that the global batch is cut into for "local", hard negatives likewise. None: one for each
        shard. They are gathered only where a block does not lie within a shard.
      hard_weight: positive factor of the exponential of each hard negative; 2 counts each twice.

    Raises:
      ValueError: for shapes that do not fit together, an unknown scope, or blocks that do not divide the batch.
    """
    check_pairs(a, b)
    if hard_scope not in ("local", "global"):
        raise ValueError(f"hard_scope {hard_scope!r}: choose 'local' or 'global'")
    shards = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    blocks = 1 if hard_scope == "global" else shards if hard_blocks is None else hard_blocks
    a, b = l2_normalize(a), l2_normalize(b)
    own = own_columns(a, axis_name)
    hard = seen = None
    if hard_negatives is not None:
        _check_hard(hard_negatives, a, blocks, shards)
        hard = l2_normalize(hard_negatives)
        if blocks % shards == 0:
            hard = hard.reshape(blocks // shards, -1, a.shape[1])
        else:
            hard = all_rows(hard, axis_name)[None]
            rows, columns = a.shape[0] * shards // blocks, hard.shape[1] // blocks
            seen = None if blocks == 1 else own[:, None] // rows == jnp.arange(hard.shape[1]) // columns

    def one_way(x: jax.Array, y: jax.Array) -> jax.Array:
        return _cross_entropy(x, all_rows(y, axis_name), own, hard, seen, temperature, hard_weight)

    loss = 0.5 * (one_way(a, b) + one_way(b, a))
    return loss if axis_name is None else jax.lax.pmean(loss, axis_name)


def _cross_entropy(
    x: jax.Array,
    columns: jax.Array,
    own: jax.Array,
    hard: jax.Array | None,
    seen: jax.Array | None,
    temperature: float | jax.Array,
    hard_weight: float,
) -> jax.Array:
    """Mean over the rows of x (B, D) of -log softmax at column `own` (B,); `hard` is (blocks, H / blocks, D), and where it is one block,
    `seen` (B, H) may say which of them a row sees."""
    logits = cosines(x, columns)
    positive = jnp.take_along_axis(logits, own[:, None], axis=1)[:, 0]
    if hard is not None:
        rows = x.reshape(hard.shape[0], -1, x.shape[1])
        logits = jnp.concatenate([logits, cosines(rows, hard).reshape(x.shape[0], -1)], axis=1)
    logits = logits / temperature
    if hard_weight != 1:
        logits = logits.at[:, columns.shape[0] :].add(math.log(hard_weight))
    if seen is not None:  # after the division, whose slope would be infinite there
        logits = jnp.where(jnp.pad(seen, ((0, 0), (columns.shape[0], 0)), constant_values=True), logits, -jnp.inf)
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - positive / temperature)


def _check_hard(hard: jax.Array, a: jax.Array, blocks: int, shards: int) -> None:
    if hard.ndim != 2 or hard.shape[1] != a.shape[1]:
        raise ValueError(f"hard negatives {hard.shape} must be (H, {a.shape[1]})")
    rows, columns = a.shape[0] * shards, hard.shape[0] * shards
    if blocks < 1 or rows % blocks or columns % blocks:
        raise ValueError(f"hard_blocks={blocks} must divide the batch ({rows}) and the hard negatives ({columns})")
