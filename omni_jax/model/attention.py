"""Attention of packed decoder rows: one interface, several kernels with equal numbers.

Letters: R rows, S tokens, T keys of splash, H heads, K KV heads, G query heads per KV head, h head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from omni_jax.config import ConfigError
from omni_jax.model.layers import attend, attend_blocks, attend_causal
from omni_jax.parallel import partition_spec

if TYPE_CHECKING:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

RowAttention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

KERNELS = ("auto", "plain", "splash", "splash_interpret")
"""auto: by platform. plain: XLA's products under a mask. splash: the TPU kernel. splash_interpret: the same without a TPU, for tests."""

BRANCHES = 2
"""Continuations of one media prefix at most: the anchor and its hard negative; a medium alone and with its caption."""

LANES = 128  # splash lengths are multiples of it
TILES = (512, 256, LANES)


def choose(kernel: str, platform: str) -> str:
    """Returns the kernel that "auto" stands for on a platform ("tpu", "gpu", "cpu"), any other as it is.

    Raises:
      ConfigError: for an unknown kernel.
    """
    if kernel not in KERNELS:
        raise ConfigError(f"attention {kernel!r}: choose one of {', '.join(KERNELS)}")
    if kernel != "auto":
        return kernel
    return "splash" if platform == "tpu" else "plain"


def choose_for(kernel: str, mesh: Mesh | AbstractMesh | None) -> str:
    """Returns `choose` for the devices of a mesh, or for the default device, of an abstract mesh as well."""
    return choose(kernel, mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend())


def row_mask(segment: jax.Array, branch: jax.Array, causal: bool = True, queries: jax.Array | None = None) -> jax.Array:
    """Returns (R, Q, S) bool, True where query i sees key j: same segment, j <= i, and j in the shared prefix or in i's own branch.

    Padding (segment 0) sees earlier padding and itself, so no softmax is empty. Without `causal` a query sees its whole segment, which
    then has no branches.

    Args:
      segment, branch: (R, S) int32, as in `types.RowBatch`.
      queries: (R, Q) int32, the tokens that ask; None: all S.
    """
    places = jnp.arange(segment.shape[1])
    asking = places[None] if queries is None else queries

    def of_queries(x: jax.Array) -> jax.Array:
        return x if queries is None else jnp.take_along_axis(x, queries, axis=1)

    same = of_queries(segment)[:, :, None] == segment[:, None, :]
    if not causal:
        return same
    earlier = asking[:, :, None] >= places
    reachable = (branch[:, None, :] == 0) | (of_queries(branch)[:, :, None] == branch[:, None, :])
    return earlier & same & reachable


def pooled_attention(segment: jax.Array, branch: jax.Array, pool: jax.Array, *, causal: bool = True) -> RowAttention:
    """Returns `row_attention` of the tokens `pool` (R, K) alone: its function takes q (R, K, H, h) with k and v of all tokens.

    One kernel everywhere: its logits are few.
    """
    mask = row_mask(segment, branch, causal, pool)
    return lambda q, k, v: checkpoint_name(attend(q, k, v, mask), "attention")


def row_attention(
    segment: jax.Array, branch: jax.Array, *, kernel: str = "plain", branches: int = BRANCHES, causal: bool = True, reach: int = 0
) -> RowAttention:
    """Returns the softmax attention of packed rows, under the mask that `row_mask` writes out.

    Args:
      segment, branch: (R, S) int32, as in `types.RowBatch`; a prefix precedes its continuations, which count from 1.
      kernel: one of KERNELS but "auto".
      branches: the largest branch number that may occur (read by splash, which pays for each beyond the first).
      causal: whether a query sees no later key; else it sees all of its segment, and there are no branches.
      reach: as in `types.StepKind`: splash leaves out what is further away. Segments that are longer give wrong values.

    Returns:
      A function of q (R, S, H, h), k and v (R, S, K, h), K dividing H, that gives (R, S, H*h) in the dtype of q.
    """
    if kernel == "plain":
        mask, blocks = row_mask(segment, branch, causal), attend_causal if causal else attend_blocks
        return lambda q, k, v: checkpoint_name(blocks(q, k, v, mask), "attention")
    reach = -(-reach // LANES) * LANES
    ids = splash_ids(*_pad_ids(segment, branch), max(branches, 1) if causal else 1, reach)
    # Named within: a backward pass needs its log-sums too, and else would run the kernel again for them.
    return lambda q, k, v: _splash_rows(q, k, v, *ids, causal, reach, kernel == "splash_interpret")


def splash_ids(segment: jax.Array, branch: jax.Array, branches: int, reach: int = 0) -> tuple[jax.Array, jax.Array]:
    """Returns the segment ids of queries (R, S) and of keys (R, T): equal ids, and `splash_mask`, are `row_mask`.

    Splash knows ids that must be equal, not branches. Branch 1 takes its prefix's id: the prefix precedes it, so that the causal mask
    hides the branch from the prefix. For each further branch the keys are repeated, where only the prefix has an id: the branch's.
    Within a known reach the first `reach` keys hold all prefixes of branches, and no others are repeated: T = S + (branches - 1) * reach.
    """
    size = branches + 1
    query = segment * size + jnp.maximum(branch, 1)
    prefix = branch == 0
    copies = [jnp.where(prefix & (segment > 0), segment * size + number, -1) for number in range(2, branches + 1)]
    return query, jnp.concatenate([query, *(copy[:, : reach or None] for copy in copies)], axis=1)


def splash_mask(tokens: int, keys: int, causal: bool, reach: int = 0) -> np.ndarray:
    """Returns (S, T) bool, the same for all rows: whether the query at a place may see the key at a place, `splash_ids` left aside."""
    queries = np.arange(tokens)[:, None]
    size = min(reach, tokens) or tokens  # of a copy of keys
    places = np.concatenate([np.arange(tokens), np.arange(keys - tokens) % size])
    seen = queries >= places if causal else np.ones((tokens, keys), bool)
    if reach:
        seen &= abs(queries - places) < reach
        seen[reach:, tokens:] = False
    return seen


def _pad_ids(segment: jax.Array, branch: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows lengthened by padding to what splash takes."""
    padding = ((0, 0), (0, -segment.shape[1] % LANES))
    return jnp.pad(segment, padding), jnp.pad(branch, padding)


def _splash_rows(
    q: jax.Array, k: jax.Array, v: jax.Array, query_ids: jax.Array, key_ids: jax.Array, causal: bool, reach: int, interpret: bool
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash  # slow, and for TPUs alone

    rows, tokens, heads, width = q.shape
    kv_heads, padded, keys = k.shape[2], query_ids.shape[1], key_ids.shape[1]
    size = min(reach, padded) or padded  # of a copy of keys
    q, k, v = (jnp.pad(x, ((0, 0), (0, padded - tokens), (0, 0), (0, 0))) for x in (q, k, v))
    # Splash scales nothing; heads lead, query heads grouped by the KV head they share.
    q = rearrange(q * width**-0.5, "b s (k g) h -> b k g s h", k=kv_heads)
    k, v = (rearrange(x, "b s k h -> b k s h") for x in (k, v))
    if keys > padded:
        k, v = (jnp.concatenate([x, *[x[:, :, :size]] * ((keys - padded) // size)], axis=2) for x in (k, v))

    def local(q: jax.Array, k: jax.Array, v: jax.Array, query_ids: jax.Array, key_ids: jax.Array) -> jax.Array:
        # Made here and not kept: its tables of blocks are constants of this trace.
        kernel = _kernel(splash_mask(padded, keys, causal, reach), heads // kv_heads, interpret)

        def row(q: jax.Array, k: jax.Array, v: jax.Array, query_ids: jax.Array, key_ids: jax.Array) -> Any:
            return jax.vmap(lambda q, k, v: kernel(q, k, v, splash.SegmentIds(query_ids, key_ids)))(q, k, v)

        return jax.vmap(row)(q, k, v, query_ids, key_ids)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        # A kernel is opaque to the partitioner: each device gets its rows and heads.
        batch, kv = partition_spec(("batch", "heads"), (rows, kv_heads), mesh)
        split, ids = PartitionSpec(batch, kv), PartitionSpec(batch)
        local = jax.shard_map(local, in_specs=(split, split, split, ids, ids), out_specs=split, check_vma=False)
    out = local(q, k, v, query_ids, key_ids)
    return rearrange(out, "b k g s h -> b s (k g h)")[:, :tokens]


def _kernel(mask: np.ndarray, heads: int, interpret: bool) -> splash.SplashAttentionKernel:
    """The splash kernel of G heads that share keys, under a mask (S, T): (G, S, h), (T, h), (T, h) -> (G, S, h)."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    tile = next(t for t in TILES if math.gcd(*mask.shape, t) == t)
    sizes = splash.BlockSizes(block_q=tile, block_kv=tile, block_q_dkv=tile, block_kv_dkv=tile, block_q_dq=tile, block_kv_dq=tile)
    named = {"residual_checkpoint_name": "attention", "interpret": interpret}
    every = masks.MultiHeadMask([masks.NumpyMask(mask)] * heads)
    return splash.make_splash_mqa(every, block_sizes=sizes, head_shards=1, q_seq_shards=1, **named)
