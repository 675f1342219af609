"""Converted folder -> parameters on the devices, one layer stack at a time; of several processes each reads what its devices hold."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from omni_jax.config import ModelConfig
from omni_jax.conversion import engine, folder
from omni_jax.conversion.engine import Entry
from omni_jax.conversion.folder import Manifest
from omni_jax.conversion.matrices import Matrices, scale_name
from omni_jax.conversion.rules import TreePath
from omni_jax.conversion.store import Store, open_stores
from omni_jax.model import carried_shapes
from omni_jax.model.int8 import SCALE
from omni_jax.types import InputError

Params = dict[TreePath, jax.Array]
Shardings = Mapping[TreePath, jax.sharding.Sharding]

EMBEDDING: TreePath = ("decoder", "embed", "embedding")


def load(
    model: epath.PathLike,
    *,
    manifest: Manifest | None = None,
    dtype: Any = None,
    weights: str | None = None,
    kept: tuple[str, ...] = (),
    shardings: Shardings | Callable[[ModelConfig], Shardings] | None = None,
    report_bytes: Callable[[int, int], None] | None = None,
) -> tuple[ModelConfig, Params]:
    """Returns the configuration and every parameter of the model in a converted folder, layer stacks with their leading axis.

    Modules that the adapter trained whole replace those of the base. Layers that the adapter does not touch get LoRA matrices of zero,
    which add nothing and, their gradients being zero, stay so. Memory peaks at the model and one more stack. Where a leaf's sharding
    spreads it over several processes, each reads the parts that its own devices hold, once, and nothing else; but a matrix that is to be
    rounded to int8 on the way is read whole by each, since the scale of a column depends on all of it.

    Args:
      model: folder written by `to_jax`.
      manifest: of that folder, where it was read already.
      dtype: type of every parameter but int8 matrices and their scales; None keeps each as stored.
      weights, kept: as in `ModelConfig`, of the model to load; matrices are rounded, or restored, as they are read. None: as stored.
      shardings: where each leaf goes (of the stacked shape), or a function of the configuration that says so; a leaf without one goes to
        the default device.
      report_bytes: called at the end with the bytes that this process read and those that it would read alone.

    Raises:
      InputError: not a converted folder, or one whose parts do not hold what its configuration asks for.
    """
    source = epath.Path(model)
    manifest = folder.read_manifest(source) if manifest is None else manifest
    stores = open_stores(source, manifest)
    entries = [*engine.base_entries(manifest.model).values(), *engine.lora_entries(manifest.model).values()]
    stored = dict(_leaves(entries))
    leaves = {path: group for path, group in stored.items() if path not in carried_shapes(manifest.model)}
    _check(stored, leaves, stores, source)
    config = manifest.model if weights is None else manifest.model.with_weights(weights, kept)
    places = (shardings(config) if callable(shardings) else shardings) or {}
    matrices = Matrices(source, config, stores)
    params = dict(_read(leaves, stores, dtype, places, matrices))
    if report_bytes is not None:
        held = [(store, entry) for group in leaves.values() for entry in group if (store := _holder(entry, stores)) is not None]
        whole = sum(store.arrays[entry.stored].nbytes for store, entry in held) + matrices.scale_bytes
        report_bytes(sum(store.bytes_read for store in stores), whole)
    return config, params


def _read(
    leaves: Mapping[TreePath, list[Entry]], stores: list[Store], dtype: Any, places: Shardings, matrices: Matrices
) -> Iterator[tuple[TreePath, jax.Array]]:
    """Yields (path, leaf) as each becomes complete; its host buffer is freed before the next large one is made."""
    spread = {path: parts for path, group in leaves.items() if (parts := _parts(group, places.get(path)))}
    for path, parts in spread.items():
        yield from _assembled(leaves[path], parts, places, stores, _dtype(leaves[path], stores, dtype), matrices)
    where = {entry.stored: (path, entry) for path, group in leaves.items() if path not in spread for entry in group}
    held = {name: _holder(entry, stores) for name, (_, entry) in where.items()}
    left = collections.Counter(where[name][0] for name, store in held.items() if store)
    stacks: dict[TreePath, np.ndarray] = {}
    for store in stores:
        for name, array in store.read([name for name, holder in held.items() if holder is store]):
            path, entry = where[name]
            made = matrices.as_loaded(entry, array, _dtype(leaves[path], stores, dtype))
            if entry.layer is None:
                yield from ((at, place(one, places.get(at))) for at, one in made.items())
                continue
            for at, one in made.items():
                if at not in stacks:
                    stacks[at] = np.zeros((len(leaves[path]), *one.shape), one.dtype)
                stacks[at][entry.layer] = one
            left[path] -= 1
            if not left[path]:
                yield from ((at, place(stacks.pop(at), places.get(at))) for at in made)


Key = tuple[tuple[int, int], ...]


def _parts(group: list[Entry], sharding: jax.sharding.Sharding | None) -> list[Key]:
    """Returns the different parts of a leaf that this process's devices hold, [start, stop) by axis; none where they hold all of it."""
    if sharding is None:
        return []
    shape = _shape(group)
    parts = list(dict.fromkeys(_key(index, shape) for index in sharding.addressable_devices_indices_map(shape).values()))
    held = sum(math.prod(stop - start for start, stop in part) for part in parts)
    return parts if held < math.prod(shape) else []


def _assembled(
    group: list[Entry], parts: list[Key], places: Shardings, stores: list[Store], kind: jnp.dtype, matrices: Matrices
) -> Iterator[tuple[TreePath, jax.Array]]:
    """Yields a leaf of which this process has read `parts`, and the scales of one in int8."""
    path, buffers = group[0].path, dict[Key, np.ndarray]()
    scales = np.zeros((*_shape(group)[:-2], _shape(group)[-1]), np.float32) if matrices.is_rounded(path) else None
    for part in parts:
        buffers[part] = np.zeros([stop - start for start, stop in part], kind if scales is None else np.int8)
        layers, inner = (part[0], part[1:]) if group[0].layer is not None else ((0, 1), part)
        index = tuple(slice(*bounds) for bounds in inner)
        for entry in group[slice(*layers)]:
            store = _holder(entry, stores)
            if store is None:
                continue
            at = buffers[part] if entry.layer is None else buffers[part][entry.layer - layers[0]]
            if scales is None:
                at[...] = matrices.restored_part(entry, store.read_part(entry.stored, index), index)
                continue
            at[...], scales[entry.layer if entry.layer is not None else ...] = matrices.rounded_part(entry, store, index)
    shape = _shape(group)
    yield path, jax.make_array_from_callback(shape, places[path], lambda index: buffers[_key(index, shape)])
    if scales is not None:
        yield (*path[:-1], SCALE), place(scales, places.get((*path[:-1], SCALE)))


def _shape(group: list[Entry]) -> tuple[int, ...]:
    return group[0].tree_shape if group[0].layer is None else (len(group), *group[0].tree_shape)


def _key(index: Any, shape: tuple[int, ...]) -> Key:
    return tuple(at.indices(length)[:2] for at, length in zip(index or (), shape, strict=True))


def _leaves(entries: list[Entry]) -> Iterator[tuple[TreePath, list[Entry]]]:
    for path, group in engine.stacks(entries).items():
        yield path, group[:1] if group[0].shared else group


def _check(stored: Mapping[TreePath, list[Entry]], leaves: Mapping[TreePath, list[Entry]], stores: list[Store], source: epath.Path) -> None:
    """Raises InputError where one of the leaves is missing, or the folder holds what is not among all that may be stored."""
    missing: list[str] = []
    for path, group in leaves.items():
        absent = [entry.stored for entry in group if _holder(entry, stores) is None]
        # LoRA may touch some layers only; of everything else each layer must be there.
        if absent and (not path[-1].startswith("lora_") or len(absent) == len(group)):
            missing += absent
    known = {entry.stored: entry.tree_shape for group in stored.values() for entry in group}
    known |= {scale_name(entry): entry.tree_shape[-1:] for path, group in leaves.items() if path[-1] == "kernel" for entry in group}
    found = {name: at.shape for store in stores for name, at in store.arrays.items() if not name.startswith(f"{engine.ORIGINAL}.")}
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
    if np.int8 in stored:  # restored in the type that everything beside it has
        stored = [stores[-1].arrays[engine.stored_name(EMBEDDING, None)].dtype]
    # jax computes in 32 bits, so that a float64 leaf becomes float32.
    return jnp.dtype(jnp.result_type(*(np.float32 if kind == np.float64 else kind for kind in stored)))


def place(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Returns an array on the devices, each process giving its own shards; without a sharding on the default device."""
    if sharding is None:
        return jnp.asarray(array)
    # device_put would compare the whole array across processes.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
