"""One table from the logical axes of weights and activations to mesh axes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from omni_jax.parallel.mesh import BATCH, SLICE, device_kind

MeshAxes = str | tuple[str, ...] | None

RULES: dict[str, MeshAxes] = {
    # Weights: the input width over fsdp, the output width over tensor (and the reverse for projections back to the residual stream).
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "fused": "fsdp",  # the concatenated states of all layers, input of the fusion head
    "rank": None,
    "patch": None,
    "kernel": None,
    "norm": None,
    "table": None,
    # Activations.
    "batch": BATCH,
    "batch_data": (SLICE, "data"),
    "tokens": None,
    "features": None,
}


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Returns the PartitionSpec of an array whose dimensions carry these logical names.

    A dimension that its mesh axes do not divide stays whole, since jax places even shards only.

    Raises:
      ValueError: for an unknown name, a rank mismatch, or two dimensions that claim the same mesh axis.
    """
    if len(axes) != len(shape):
        raise ValueError(f"logical axes {tuple(axes)} do not fit shape {tuple(shape)}")
    sizes = dict(mesh.shape)
    spec: list[MeshAxes] = []
    used: dict[str, str] = {}
    for name, length in zip(axes, shape, strict=True):
        if name is not None and name not in RULES:
            raise ValueError(f"unknown logical axis {name!r}; add it to parallel.rules.RULES")
        target = RULES[name] if name is not None else None
        if isinstance(target, tuple):
            target = tuple(axis for axis in target if axis in sizes) or None
        for axis in (target,) if isinstance(target, str) else target or ():
            if axis in used:
                raise ValueError(f"logical axes {used[axis]!r} and {name!r} of {tuple(axes)} both map to mesh axis {axis!r}")
            used[axis] = str(name)
        ways = 1
        for axis in (target,) if isinstance(target, str) else target or ():
            ways *= sizes.get(axis, 1)
        spec.append(target if ways > 1 and length % ways == 0 else None)
    return PartitionSpec(*spec)


def sharding(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the NamedSharding for logical axes on a mesh; raises as `partition_spec`."""
    return NamedSharding(mesh, partition_spec(axes, shape, mesh))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Returns x pinned to its logical axes inside jit; x itself where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))


_LEFT_TO_THE_PARTITIONER = ("TPU v5", "TPU v5p")
"""Kinds of device on which libtpu 0.0.42 does not finish compiling a step with gathers of its own: its memory grows without end."""


def writes_gathers(mesh: Mesh | AbstractMesh) -> bool:
    """Whether programs for a mesh say themselves where weights and embeddings are gathered: not on one device, nor on v5p."""
    return not mesh.empty and mesh.size > 1 and device_kind(mesh) not in _LEFT_TO_THE_PARTITIONER


def gather(x: jax.Array, *axes: str | None) -> jax.Array:
    """Returns a weight whole along "embed", with its split over tensor kept: what a product reads, brought together once.

    Left to itself, the partitioner makes of each product with such a weight a ring of small ones. The gradient goes back to the weight's
    own shards. x itself where no mesh is set, nothing of it is split along "embed", or the devices are v5p.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not writes_gathers(mesh):
        return x
    split = partition_spec(axes, x.shape, mesh)
    whole = PartitionSpec(*(None if name == "embed" else target for name, target in zip(axes, split, strict=True)))
    if whole == split:
        return x
    # Integers have no gradient that could go back.
    return _moved(x, whole, split) if jnp.issubdtype(x.dtype, jnp.inexact) else jax.lax.with_sharding_constraint(x, whole)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _moved(x: jax.Array, there: PartitionSpec, back: PartitionSpec) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, there)


def _forward(x: jax.Array, there: PartitionSpec, back: PartitionSpec) -> tuple[jax.Array, None]:
    return jax.lax.with_sharding_constraint(x, there), None


def _backward(there: PartitionSpec, back: PartitionSpec, _: None, gradient: Any) -> tuple[Any]:
    return (jax.lax.with_sharding_constraint(gradient, back),)


_moved.defvjp(_forward, _backward)
