"""Converted folder -> parameters on the devices, one layer stack at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from conversion import engine, folder
from conversion.engine import Entry
from conversion.rules import TreePath
from conversion.store import PART_BYTES, Store
from omni_jax.config import ModelConfig
from omni_jax.types import InputError

Params = dict[TreePath, jax.Array]


def load(
    model: epath.PathLike, *, dtype: Any = None, shardings: Mapping[TreePath, jax.sharding.Sharding] | None = None
) -> tuple[ModelConfig, Params]:
    """Returns the configuration and every parameter of a converted folder, layer stacks with their leading axis.

    Modules that the adapter trained whole replace those of the base. Layers that the adapter does not touch get LoRA matrices of zero,
    which add nothing and, their gradients being zero, stay so. Memory peaks at the model and one more stack.

    Args:
      model: folder written by `to_jax`.
      dtype: type of every parameter; None keeps each as stored.
      shardings: where each leaf goes (of the stacked shape); a leaf without one goes to the default device.

    Raises:
      InputError: not a converted folder, or one whose parts do not hold what its configuration asks for.
    """
    source = epath.Path(model)
    manifest = folder.read_manifest(source)
    stores = [Store(source / folder.WEIGHTS)]
    if manifest.adapter is not None:
        stores.insert(0, Store(source / folder.ADAPTER))  # first, so that it overrides the base
    entries = [*engine.base_entries(manifest.model).values(), *engine.lora_entries(manifest.model).values()]
    leaves = dict(_leaves(entries))
    _check(leaves, stores, source)
    params: Params = {}
    for batch in _batches(leaves, stores):
        params |= _read(batch, stores, dtype, shardings or {})
    return manifest.model, params


def _batches(leaves: Mapping[TreePath, list[Entry]], stores: list[Store]) -> Iterator[dict[TreePath, list[Entry]]]:
    """Yields leaves in groups of at most a part's size (or one leaf): small ones are read together, large ones alone."""
    batch: dict[TreePath, list[Entry]] = {}
    size = 0
    for path, group in leaves.items():
        nbytes = sum(store.arrays[entry.stored].nbytes for entry in group if (store := _holder(entry, stores)))
        if batch and size + nbytes > PART_BYTES:
            yield batch
            batch, size = {}, 0
        batch[path] = group
        size += nbytes
    if batch:
        yield batch


def _read(
    batch: Mapping[TreePath, list[Entry]], stores: list[Store], dtype: Any, shardings: Mapping[TreePath, jax.sharding.Sharding]
) -> Params:
    """Returns the leaves of one batch."""
    kinds = {path: _dtype(group, stores, dtype) for path, group in batch.items()}
    placed = {path: _layer_sharding(shardings.get(path), group[0]) for path, group in batch.items()}
    found: dict[str, np.ndarray | jax.Array] = {}
    for kind in dict.fromkeys(kinds.values()):
        entries = [(path, entry) for path, group in batch.items() if kinds[path] == kind for entry in group]
        for store in stores:
            names = {entry.stored: placed[path] for path, entry in entries if _holder(entry, stores) is store}
            found |= store.read(names, {name: place for name, place in names.items() if place is not None}, kind)
    params = {}
    for path, group in batch.items():
        params[path] = _leaf([found.pop(entry.stored, None) for entry in group], group, kinds[path], placed[path], shardings.get(path))
    return params


def _leaf(
    arrays: list[Any], group: list[Entry], kind: jnp.dtype, layer: jax.sharding.Sharding | None, sharding: jax.sharding.Sharding | None
) -> jax.Array:
    """Returns one leaf from its layers; a missing layer (LoRA that touches some layers only) is zero."""
    if group[0].layer is None:
        return arrays[0] if layer is not None else _place(np.asarray(arrays[0]).astype(kind, copy=False), sharding)
    shape = group[0].tree_shape
    if layer is None:
        # One host buffer, filled layer by layer.
        whole = np.zeros((len(group), *shape), kind)
        for index, array in enumerate(arrays):
            if array is not None:
                whole[index] = array
        return _place(whole, sharding)
    # Sharded leaves never stand whole on a host or device.
    arrays = [_zeros(shape, kind, layer) if array is None else array for array in arrays]
    return jax.jit(lambda *layers: jnp.stack(layers), out_shardings=sharding)(*arrays)


def _leaves(entries: list[Entry]) -> Iterator[tuple[TreePath, list[Entry]]]:
    for path, group in engine.stacks(entries).items():
        yield path, group[:1] if group[0].shared else group


def _check(leaves: Mapping[TreePath, list[Entry]], stores: list[Store], source: epath.Path) -> None:
    missing: list[str] = []
    for path, group in leaves.items():
        absent = [entry.stored for entry in group if _holder(entry, stores) is None]
        # LoRA may touch some layers only; of everything else each layer must be there.
        if absent and (not _is_lora(path) or len(absent) == len(group)):
            missing += absent
    known = {entry.stored: entry.tree_shape for group in leaves.values() for entry in group}
    found = {name: at.shape for store in stores for name, at in store.arrays.items()}
    wrong = [f"{name} is {shape}" for name, shape in found.items() if known.get(name) != shape]
    if missing or wrong:
        text = f"{len(missing)} arrays are missing ({', '.join(missing[:3])})" if missing else f"arrays do not fit its model ({wrong[0]})"
        raise InputError(f"{source}: {text}; convert the checkpoint again")


def _holder(entry: Entry, stores: list[Store]) -> Store | None:
    return next((store for store in stores if entry.stored in store.arrays), None)


def _dtype(group: list[Entry], stores: list[Store], dtype: Any) -> jnp.dtype:
    if dtype is not None:
        return jnp.dtype(dtype)
    stored = [store.arrays[entry.stored].dtype for entry in group if (store := _holder(entry, stores))]
    # jax computes in 32 bits, so that a float64 leaf becomes float32.
    return jnp.dtype(jnp.result_type(*(np.float32 if kind == np.float64 else kind for kind in stored)))


def _layer_sharding(sharding: jax.sharding.Sharding | None, entry: Entry) -> jax.sharding.NamedSharding | None:
    """Returns the sharding of what is stored of a leaf (one layer of a stack); None where it is placed from the host."""
    if not isinstance(sharding, jax.sharding.NamedSharding) or sharding.mesh.size == 1:
        return None
    spec = tuple(sharding.spec)
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*(spec if entry.layer is None else spec[1:])))


def _zeros(shape: tuple[int, ...], kind: jnp.dtype, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, kind), out_shardings=sharding)()


def _place(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    return jax.device_put(array, sharding) if sharding is not None else jnp.asarray(array)


def _is_lora(path: TreePath) -> bool:
    return path[-1].startswith("lora_")
