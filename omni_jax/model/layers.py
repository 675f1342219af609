"""Building blocks shared by the decoder and the towers: parameters with named axes, linear maps, norms, attention, layer stacks.

Letters: B batch, S query tokens, T key tokens, H heads, K KV heads, G query heads per KV head, h head width, L layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from omni_jax.config import LoraConfig
from omni_jax.model import int8
from omni_jax.parallel import gather

Initializer = jax.nn.initializers.Initializer

Policy = Callable[..., Any] | None
"""A `jax.checkpoint` policy; None keeps all residuals. (`jax.checkpoint_policies.nothing_saveable` computes the layer again.)"""

Remat = Policy | tuple[Policy, ...]
"""The policy of every layer of a stack, or one for each."""


class ParamFactory:
    """Makes the parameters of one module: holds the random stream, the stored dtype, the module's path and the leading layer axis.

    A stack of L equal layers is one module whose parameters have a leading axis of length L; `scan_layers` slices it.
    """

    def __init__(
        self,
        rngs: nnx.Rngs | None,
        dtype: jnp.dtype,
        lora: LoraConfig | None = None,
        path: str = "",
        layers: int | None = None,
        weights: tuple[str, tuple[str, ...]] = ("float", ()),
    ):
        """Without `rngs` parameters are shapes. `weights`: those of a `ModelConfig`, and its `kept`."""
        self.rngs = rngs
        self.dtype = dtype
        self.path = path
        self.layers = layers
        self._lora = lora
        self._weights = weights

    def __truediv__(self, name: str) -> ParamFactory:
        """Returns the maker of the submodule with this name."""
        return ParamFactory(self.rngs, self.dtype, self._lora, f"{self.path}/{name}".lstrip("/"), self.layers, self._weights)

    def stack(self, layers: int) -> ParamFactory:
        """Returns a maker that adds a leading layer axis."""
        return ParamFactory(self.rngs, self.dtype, self._lora, self.path, layers, self._weights)

    @property
    def weights(self) -> str:
        """How the linear map being made holds its matrix, of `config.model.WEIGHTS`."""
        return int8.kind_of(self.path, *self._weights)

    @property
    def lora(self) -> LoraConfig | None:
        """The adapter, where it targets the module being made."""
        return self._lora if self._lora and self.path in self._lora.targets else None

    def param(self, shape: tuple[int, ...], axes: tuple[str | None, ...], init: Initializer, dtype: Any = None) -> nnx.Param:
        """Returns a parameter; `axes` names each dimension for sharding (without the layer axis, which is added here).

        `dtype` is that of a parameter that has its own whatever the others have.
        """
        if len(shape) != len(axes):
            raise ValueError(f"axes {axes} do not fit shape {shape}")
        dtype = dtype or self.dtype
        if self.layers is not None:
            axes = ("layers", *axes)
        if self.rngs is None:
            return nnx.Param(jax.ShapeDtypeStruct(shape if self.layers is None else (self.layers, *shape), dtype), axes=axes)
        key = self.rngs.params()
        if self.layers is None:
            return nnx.Param(init(key, shape, dtype), axes=axes)
        return nnx.Param(jax.vmap(lambda k: init(k, shape, dtype))(jax.random.split(key, self.layers)), axes=axes)


WEIGHT_INIT = jax.nn.initializers.normal(0.02)
ZEROS = jax.nn.initializers.zeros
ONES = jax.nn.initializers.ones

MASKS = 3
"""Dropout masks from one random word; q, k and v of a layer are three."""

# Blocks of queries that causal attention goes in: eight, each a multiple of the unit (enough work for one product).
CAUSAL_BLOCKS, CAUSAL_UNIT = 8, 128
# No block is longer than this, so that minutes of audio do not need logits of tokens x tokens at once.
LONGEST_BLOCK = 1024


class Linear(nnx.Module):
    """y = x W + b, with an optional LoRA slot: y += scale * (dropout(x) A) B. Weights are cast to the dtype of x.

    W may be held in int8 (see `int8`); the bias, A and B never are.
    """

    def __init__(self, make: ParamFactory, inputs: int, outputs: int, axes: tuple[str | None, str | None], *, bias: bool = True):
        lora = make.lora
        self.axes = axes
        self.weights = make.weights
        whole = self.weights == "float"
        self.kernel = make.param((inputs, outputs), axes, WEIGHT_INIT if whole else ZEROS, None if whole else jnp.int8)
        self.kernel_scale = None if whole else make.param((outputs,), (axes[1],), ONES, jnp.float32)
        self.bias = make.param((outputs,), (axes[1],), ZEROS) if bias else None
        self.lora_scale = lora.scale if lora else 0.0
        self.lora_dropout = lora.dropout if lora else 0.0
        self.lora_stream = lora.targets.index(make.path) if lora else 0
        if lora:
            self.lora_a = make.param((inputs, lora.rank), (axes[0], "rank"), jax.nn.initializers.he_uniform())
            self.lora_b = make.param((lora.rank, outputs), ("rank", axes[1]), ZEROS)
        else:
            self.lora_a = self.lora_b = None

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        inputs, outputs = self.axes
        base = x if self.lora_a is None else materialize_gradient(x)  # apart from the adapter's, which dropout makes elementwise work
        if self.kernel_scale is None:
            y = base @ gather(self.kernel[...].astype(x.dtype), inputs, outputs)
        else:
            kernel, scale = gather(self.kernel[...], inputs, outputs), gather(self.kernel_scale[...], outputs)
            y = int8.product(base, kernel, scale, dynamic=self.weights == "int8-dynamic")
        if self.bias is not None:
            y = y + gather(self.bias[...].astype(x.dtype), outputs)
        if self.lora_a is not None and self.lora_b is not None:
            if dropout_key is not None and self.lora_dropout > 0:
                keep = keep_mask(dropout_key, self.lora_stream, self.lora_dropout, x.shape)
                x = jnp.where(keep, x / (1 - self.lora_dropout), 0).astype(x.dtype)
            down, up = gather(self.lora_a[...].astype(x.dtype), inputs, "rank"), gather(self.lora_b[...].astype(x.dtype), "rank", outputs)
            y = y + (checkpoint_name(x @ down, "linear") @ up) * self.lora_scale
        return checkpoint_name(y, "linear")


def keep_mask(key: jax.Array, stream: int, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Returns a mask that is False with probability `rate`, to 2**-32, each value on its own and every stream's independent of the others'.

    Masks of MASKS streams come from one random word a value, which falls into one of 2**MASKS intervals, as long as that combination is
    likely. Streams that ask with one key and shape share the draw, which is what a mask costs.
    """
    group, place = divmod(stream, MASKS)
    word = jax.random.bits(jax.random.fold_in(key, group), shape, jnp.uint32)
    cuts = [(0.0, 1.0, 0)]  # start, length, and a bit for each mask that drops the value
    for bit in range(MASKS):
        cuts = [part for a, n, code in cuts for part in ((a, n * rate, code | 1 << bit), (a + n * rate, n * (1 - rate), code))]
    codes = jnp.full(shape, cuts[0][2], jnp.int32)
    for start, _, code in cuts[1:]:
        codes = jnp.where(word >= np.uint32(min(round(start * 2**32), 2**32 - 1)), code, codes)
    # Kept small and made once: the compiler would draw it again in every product that reads a mask.
    codes = jax.lax.optimization_barrier(codes.astype(jnp.int8))
    return codes.astype(jnp.int32) & (1 << place) == 0


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, computed in float32."""

    def __init__(self, make: ParamFactory, width: int, eps: float):
        self.scale = make.param((width,), ("norm",), ONES)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.scale[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with bias over the last axis, computed in float32."""

    def __init__(self, make: ParamFactory, width: int, eps: float):
        self.scale = make.param((width,), ("norm",), ONES)
        self.bias = make.param((width,), ("norm",), ZEROS)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


@jax.custom_vjp
def materialize_gradient(x: jax.Array) -> jax.Array:
    """Returns x. Its gradient is computed once and stored.

    Left alone, the TPU compiler computes an elementwise gradient inside each product that reads or makes it, again for each, which makes
    these products slower by a third. It also adds the gradients of what several maps read, and multiplies by the norm's, inside one of
    their products.
    """
    return x


materialize_gradient.defvjp(lambda x: (x, None), lambda _, gradient: (jax.lax.optimization_barrier(gradient),))


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, make: ParamFactory, width: int, inner: int, *, bias: bool):
        self.gate = Linear(make / "gate", width, inner, ("embed", "mlp"), bias=bias)
        self.up = Linear(make / "up", width, inner, ("embed", "mlp"), bias=bias)
        self.down = Linear(make / "down", inner, width, ("mlp", "embed"), bias=bias)

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        gate, up = (materialize_gradient(part(materialize_gradient(x), dropout_key)) for part in (self.gate, self.up))
        return self.down(materialize_gradient(jax.nn.silu(gate) * up), dropout_key)


def gelu(x: jax.Array) -> jax.Array:
    """Exact (erf) GELU."""
    return jax.nn.gelu(x, approximate=False)


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """(B, S, H*h) -> (B, S, H, h)."""
    return rearrange(x, "... (heads width) -> ... heads width", heads=heads)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, bias: jax.Array | None = None) -> jax.Array:
    """Softmax attention; logits and softmax in float32, grouped KV heads.

    Args:
      q: (B, S, H, h). k, v: (B, T, K, h), K dividing H.
      mask: (B, S, T) bool, True where a query sees a key; each query must see one key at least. None: all see all.
      bias: (B, H, S, T) float32 added to the logits after scaling by 1/sqrt(h).

    Returns:
      (B, S, H*h) in the dtype of q.
    """
    s, kv_heads, width = q.shape[1], k.shape[2], q.shape[3]
    # Heads lead in every operand, so that both products are plain batched ones and no S x T array is ever transposed.
    q = rearrange(q * width**-0.5, "b s (k g) h -> b k (g s) h", k=kv_heads)
    k, v = (rearrange(x, "b t k h -> b k t h") for x in (k, v))
    logits = jnp.einsum("bkqh,bkth->bkqt", q, k, preferred_element_type=jnp.float32)
    logits = rearrange(logits, "b k (g s) t -> b k g s t", s=s)
    if bias is not None:
        logits = logits + rearrange(bias, "b (k g) s t -> b k g s t", k=kv_heads)
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1)[..., None]
    weights = rearrange(weights.astype(v.dtype), "b k g s t -> b k (g s) t")
    # Dividing the h values of a query instead of its T weights saves a pass over the largest array.
    out = jnp.einsum("bkqt,bkth->bkqh", weights, v, preferred_element_type=jnp.float32)
    out = rearrange(out, "b k (g s) h -> b k g s h", s=s) / total
    return rearrange(out, "b k g s h -> b s (k g h)").astype(q.dtype)


def query_blocks(tokens: int, block: int) -> list[tuple[int, int]]:
    """Returns the (start, stop) of blocks of at most `block` queries."""
    return [(start, min(start + block, tokens)) for start in range(0, tokens, block)]


def causal_blocks(tokens: int) -> list[tuple[int, int]]:
    """Returns the (start, stop) of the query blocks of `attend_causal`."""
    block = min(CAUSAL_UNIT * -(-tokens // (CAUSAL_UNIT * CAUSAL_BLOCKS)), LONGEST_BLOCK)
    return query_blocks(tokens, block)


def attend_causal(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """`attend` for a mask that lets no query see a later key: queries go in blocks, and no block meets the keys behind it.

    Saves up to 7/16 of the products and of the largest array. Shapes as in `attend`, T = S.
    """
    blocks = [attend(q[:, i:j], k[:, :j], v[:, :j], mask[:, i:j, :j]) for i, j in causal_blocks(q.shape[1])]
    return jnp.concatenate(blocks, axis=1)


def attend_blocks(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """`attend` with queries in blocks that all see every key, so that the logits of a long row never exist at once."""
    blocks = [attend(q[:, i:j], k, v, mask[:, i:j]) for i, j in query_blocks(q.shape[1], LONGEST_BLOCK)]
    return jnp.concatenate(blocks, axis=1)


def scan_layers(
    stack: nnx.Module,
    body: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any = None,
    remat: Remat = None,
    *,
    count: int | None = None,
    in_place: nnx.filterlib.Filter = False,
) -> tuple[Any, Any]:
    """Runs `carry, y = body(layer, carry, x)` over a stack of layers, one compiled body for all.

    Args:
      stack: a module whose parameters have a leading layer axis.
      xs: per-layer inputs with the same leading axis, or None.
      remat: what each layer keeps; neighbours that keep the same share a loop.
      count: how many layers run, from the first; None runs all.
      in_place: which parameters the loop reads out of the whole stack, computing no gradient of them worth having: it would be as large as
        the stack in every turn. The others are cut to `count` layers before the loop, which copies them.

    Returns:
      The last carry and the stacked ys.
    """
    graph, whole, params = nnx.split(stack, in_place, ...)
    layers = jnp.arange(jax.tree.leaves(nnx.state(stack))[0].shape[0])
    keep_no_weights = jax.sharding.get_abstract_mesh().size > 1 or bool(jax.tree.leaves(whole))

    def step(carry: Any, inputs: tuple[Any, Any, Any]) -> tuple[Any, Any]:
        index, layer_params, x = inputs
        read = jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, index, keepdims=False), whole)
        return body(nnx.merge(graph, read, layer_params), carry, x)

    # Else a loop around this one would read all layers before it, and keep them: they depend on nothing that it changes.
    layers, carry = jax.lax.optimization_barrier((layers, carry))
    made = []
    for start, stop, policy in _segments(remat, len(layers) if count is None else count):
        turn = jax.checkpoint(step, policy=policy or _all_but_what_is_read, prevent_cse=False) if policy or keep_no_weights else step
        carry, ys = jax.lax.scan(turn, carry, jax.tree.map(lambda x, a=start, b=stop: x[a:b], (layers, params, xs)))
        made.append(ys)
    return carry, made[0] if len(made) == 1 else jax.tree.map(lambda *ys: jnp.concatenate(ys), *made)


def _segments(remat: Remat, layers: int) -> list[tuple[int, int, Policy]]:
    """(start, stop, policy) of the first `layers`, neighbours of one policy together; one empty segment of no layers."""
    if not isinstance(remat, tuple) or not layers:
        return [(0, layers, remat[0] if isinstance(remat, tuple) else remat)]
    runs = [list(run) for _, run in itertools.groupby(range(layers), key=remat.__getitem__)]
    return [(run[0], run[-1] + 1, remat[run[0]]) for run in runs]


def _all_but_what_is_read(primitive: Any, *_: Any, **__: Any) -> bool:
    # Else each turn would keep its layer's weights, as they are read, gathered and multiplied: a copy of the stack.
    return primitive.name not in ("dynamic_slice", "squeeze", "reshape", "convert_element_type", "sharding_constraint")


def run_layer(stack: nnx.Module, index: int, body: Callable[[Any, Any, Any], Any], carry: Any, x: Any = None, remat: Remat = None) -> Any:
    """Returns `body(layer, carry, x)` for one layer of a stack; `remat` as in `scan_layers`."""
    graph, params = nnx.split(stack)

    def step(params: Any, carry: Any, x: Any) -> Any:
        return body(nnx.merge(graph, jax.tree.map(lambda p: p[index], params)), carry, x)

    policy = remat[index] if isinstance(remat, tuple) else remat
    if policy is not None:
        step = jax.checkpoint(step, policy=policy)
    return step(params, carry, x)
