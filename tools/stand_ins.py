"""Language models whose speed on TPU is published, compiled as stand-ins: the predicted share of the peak beside the published one.

    .venv-tpu/bin/python -m tools.stand_ins [WORDS]

Shapes, batches and figures are those of MaxText: its table for v5e-256 and its list of optimised models. The program is this project's own:
a scan of layers with every weight in training, gathered over fsdp, layers computed again in the backward pass, splash attention, Adam in
float32. Nothing is executed and nothing is fitted: clock, kernels and bandwidths are those that every prediction takes.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Any

from omni_jax.planning.devices import prepare_environment

prepare_environment()  # before jax is loaded

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402

from omni_jax.model.attention import row_attention  # noqa: E402
from omni_jax.parallel import constrain, gather, partition_spec, use_mesh  # noqa: E402
from omni_jax.planning.chips import read_topology  # noqa: E402
from omni_jax.planning.devices import planning_mesh  # noqa: E402
from omni_jax.planning.timing import read_timing  # noqa: E402


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A published run.

    Attributes:
      batch: sequences of a device.
      published: model FLOP/s over the peak, as published: 6 operations for each weight and token, and attention without its mask.
    """

    name: str
    topology: str
    width: int
    heads: int
    kv_heads: int
    inner: int
    layers: int
    vocabulary: int
    tokens: int
    batch: int
    published: float
    head: int = 128


# MaxText scales a base of width 2,048, 16 heads, MLP 7,168 and 16 layers (its `global_parameter_scale`).
CASES = (
    StandIn("MaxText 16B", "v5e:16x16", 4096, 64, 64, 28672, 32, 32000, 2048, 6, 0.611),
    StandIn("MaxText 32B", "v5e:16x16", 8192, 64, 64, 28672, 32, 32000, 2048, 4, 0.669),
)

LAYER = {
    "q": ("embed", "heads"),
    "k": ("embed", "heads"),
    "v": ("embed", "heads"),
    "o": ("heads", "embed"),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
}
TABLE = ("vocab", "embed")


def shapes(case: StandIn) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of every matrix, a layer's with the leading axis of all layers."""
    wide, narrow = case.heads * case.head, case.kv_heads * case.head
    sides = {"q": wide, "k": narrow, "v": narrow, "gate": case.inner, "up": case.inner}
    made = {name: (case.layers, case.width, side) for name, side in sides.items()}
    made |= {"o": (case.layers, wide, case.width), "down": (case.layers, case.inner, case.width)}
    return made | {"embedding": (case.vocabulary, case.width), "logits": (case.vocabulary, case.width)}


def norm(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def loss(params: dict[str, jax.Array], ids: jax.Array, case: StandIn) -> jax.Array:
    """Returns the mean cross-entropy of the next token."""
    ones = jnp.ones(ids.shape, jnp.int32)
    attend = row_attention(ones, 0 * ones, kernel="splash", branches=0)
    rows = *ids.shape, -1, case.head

    def layer(x: jax.Array, weights: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        w = {name: gather(value.astype(x.dtype), *LAYER[name]) for name, value in weights.items()}
        h = norm(x)
        q, k, v = ((h @ w[name]).reshape(rows) for name in "qkv")
        x = x + attend(q, k, v) @ w["o"]
        h = norm(x)
        return constrain(x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"], "batch", "tokens", "features"), None

    table = gather(params["embedding"].astype(jnp.bfloat16), *TABLE)
    x = constrain(table[ids], "batch", "tokens", "features")
    body = jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
    x, _ = jax.lax.scan(body, x, {name: params[name] for name in LAYER})
    logits = jnp.einsum("btd,vd->btv", norm(x), gather(params["logits"].astype(jnp.bfloat16), *TABLE))
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), ids[:, 1:]).mean()


def model_operations(case: StandIn) -> float:
    """Returns the operations of a step of one device, as MaxText counts them: nothing computed again, no mask."""
    tokens = case.batch * case.tokens
    weights = sum(a * b for a, b in (shape[-2:] for shape in shapes(case).values() if len(shape) == 3)) * case.layers
    weights += case.vocabulary * case.width
    return 6.0 * weights * tokens + 12.0 * case.layers * case.heads * case.head * case.tokens * tokens


def compiled(case: StandIn) -> tuple[float, float, str]:
    """Returns predicted seconds of a step, peak GiB of a device, and the lines of what takes the most."""
    topology = read_topology(case.topology)
    mesh = planning_mesh(topology, {"data": 1, "fsdp": topology.devices, "tensor": 1}, compiled=True)
    adam = optax.adam(1e-4)

    def place(name: str, shape: tuple[int, ...]) -> Any:
        axes = ("layers", *LAYER[name]) if name in LAYER else TABLE
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, partition_spec(axes, shape, mesh)))

    def step(params: Any, state: Any, ids: jax.Array) -> Any:
        value, gradient = jax.value_and_grad(loss)(params, ids, case)
        updates, state = adam.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    params = {name: place(name, shape) for name, shape in shapes(case).items()}
    moments = jax.eval_shape(adam.init, params)
    by_shape = {leaf.shape: leaf.sharding for leaf in params.values()}
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_shape.get(x.shape)), moments)
    rows = (case.batch * topology.devices, case.tokens)
    ids = jax.ShapeDtypeStruct(rows, jnp.int32, sharding=NamedSharding(mesh, partition_spec(("batch", "tokens"), rows, mesh)))
    with use_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=(0, 1)).trace(params, state, ids).lower(lowering_platforms=("tpu",))
    made = lowered.compile(compiler_options=dict(topology.chip.compiler))
    timing = read_timing(made.as_text() or "", topology.chip)
    assert timing is not None, "this libtpu writes no estimates"
    most = "\n".join(f"    {one.seconds:.3f} s {one.share:.1%} {one.bound} {one.reached:.0%} {one.source}" for one in timing.operations[:8])
    memory: Any = made.memory_analysis()
    return timing.predicted, memory.peak_memory_in_bytes / 2**30, most


def main() -> int:
    """Prints a row for each case whose name or topology contains one of the words; all without words."""
    print("| model | topology | published share of peak | predicted | error | seconds | peak GiB |\n|---|---|---|---|---|---|---|")
    for case in CASES:
        if len(sys.argv) > 1 and not any(word in f"{case.name} {case.topology}" for word in sys.argv[1:]):
            continue
        start = time.monotonic()
        seconds, peak, most = compiled(case)
        chip = read_topology(case.topology).chip
        share = model_operations(case) / (chip.teraflops * 1e12 / chip.devices) / seconds
        cells = [case.name, case.topology, f"{case.published:.1%}", f"{share:.1%}", f"{share / case.published - 1:+.0%}", f"{seconds:.2f}"]
        print(f"| {' | '.join([*cells, f'{peak:.2f}'])} |\n{most}\n    compiled in {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
