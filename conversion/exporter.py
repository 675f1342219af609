"""Converted folder -> PyTorch checkpoint and PEFT adapter, split, ordered and named as the source was."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import time
import types
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from etils import epath

from conversion import engine, folder
from conversion.adapter import CONFIG, WEIGHTS, adapter_entries, default_config, write_config
from conversion.engine import Entry
from conversion.folder import Manifest, TensorFile
from conversion.importer import Summary
from conversion.rules import TreePath
from conversion.safetensors_io import Writer, dtype_name
from conversion.source import INDEX
from conversion.store import Store, open_stores
from omni_jax.config import ModelConfig
from omni_jax.types import InputError

_NOTHING = "to-torch: nothing to write; give --base-out, --adapter-out or both"


def to_torch(
    model: epath.PathLike,
    *,
    base_out: epath.PathLike | None = None,
    adapter_out: epath.PathLike | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Writes the base checkpoint, the adapter, or both; each folder appears under its name only when complete.

    Weights are written in the type they are stored in: bit-equal to the source after a conversion with dtype "keep".

    Raises:
      InputError: not a converted folder, no adapter to export, an output that exists, or a damaged part.
    """
    if base_out is None and adapter_out is None:
        raise InputError(_NOTHING)
    if base_out is not None and adapter_out is not None:
        _refuse_overlap(base_out, adapter_out)
    started = time.monotonic()
    source = epath.Path(model)
    manifest = folder.read_manifest(source)
    if adapter_out is not None and manifest.adapter is None:
        why = "its adapter was merged into the base" if manifest.merged else "it was converted without one"
        raise InputError(f"{source}: has no adapter to write ({why}); leave --adapter-out away or convert with --adapter")
    job, stores = _Job(progress), open_stores(source, manifest)
    with contextlib.ExitStack() as both:  # neither folder appears if the other fails
        adapter = both.enter_context(folder.new_folder(adapter_out)) if adapter_out is not None else None
        base = both.enter_context(folder.new_folder(base_out)) if base_out is not None else None
        job.expect((*(manifest.shards if base is not None else ()), *((manifest.adapter,) if adapter and manifest.adapter else ())))
        if base is not None:
            entries = {manifest.prefix + key: entry for key, entry in engine.base_entries(manifest.model).items()}
            job.write(base, manifest.shards, entries, stores[-1])
            folder.copy_files(source, manifest.side_files, base)
            if manifest.index is not None:
                _write_index(base, manifest)
        if adapter is not None and manifest.adapter is not None:
            job.write(adapter, (manifest.adapter,), adapter_entries(manifest.model), stores[0])
            folder.copy_files(source / folder.ADAPTER_FILES, manifest.adapter_files, adapter)
    return job.summary(started)


def write_adapter(out: epath.PathLike, config: ModelConfig, leaves: Mapping[TreePath, Any], base_model: str | None = None) -> Summary:
    """Writes a PEFT adapter folder from leaves in memory, for an adapter that was trained here.

    Args:
      out: new folder.
      config: `config.lora` describes the adapter.
      leaves: LoRA leaves, stacked, and those of the modules saved whole; other leaves are ignored.
      base_model: `base_model_name_or_path` of `adapter_config.json`.

    Raises:
      KeyError: a leaf of the adapter is missing.
      InputError: `out` exists.
    """
    job = _Job(None)
    started = time.monotonic()
    with folder.new_folder(out) as temporary:
        job.write_adapter(temporary, config, leaves, base_model)
    return job.summary(started)


def write_trained(
    base: epath.PathLike,
    config: ModelConfig,
    trained: Mapping[TreePath, Any],
    *,
    base_out: epath.PathLike | None = None,
    adapter_out: epath.PathLike | None = None,
    base_model: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Writes what a training run made of a base, as PyTorch folders; each appears under its name only when complete.

    The adapter holds LoRA and the modules of `config.lora.modules_to_save`, float32, as they were trained. The base checkpoint holds
    everything else, trained or not, in the types that the base is stored in; the modules that the adapter holds stay in it as they were. So
    the two together are always the trained model, and a base of which nothing else trained comes out as it went in, bit for bit.

    Args:
      base: converted folder that the run started from.
      config: architecture of the run, `lora` as it trained.
      trained: leaves that trained, stacked; an adapter's leaf that did not is taken from the base.
      base_model: `base_model_name_or_path` of `adapter_config.json`.

    Raises:
      InputError: nothing to write, no adapter in the run, leaves that are not those of the base, or an output that exists.
    """
    if base_out is None and adapter_out is None:
        raise InputError(_NOTHING)
    if base_out is not None and adapter_out is not None:
        _refuse_overlap(base_out, adapter_out)
    started, source = time.monotonic(), epath.Path(base)
    manifest = folder.read_manifest(source)
    if adapter_out is not None and config.lora is None:
        raise InputError("the run trained no adapter (lora.rank is 0); leave --adapter-out away and take --base-out")
    shapes = engine.tree_shapes(config)
    wrong = [path for path, leaf in trained.items() if shapes.get(path) != tuple(leaf.shape)]
    if wrong or dataclasses.replace(config, lora=None) != dataclasses.replace(manifest.model, lora=None):
        what = f"{'/'.join(wrong[0])} does not fit" if wrong else "the architectures differ"
        raise InputError(f"{source}: is not the base of this run ({what}); name the folder it was trained from")
    held = {entry.path for entry in adapter_entries(config).values()} if config.lora else set()
    job = _Job(progress)
    with contextlib.ExitStack() as both:
        adapter = both.enter_context(folder.new_folder(adapter_out)) if adapter_out is not None else None
        out = both.enter_context(folder.new_folder(base_out)) if base_out is not None else None
        job.expect(manifest.shards if out is not None else (), sum(math.prod(shapes[path]) for path in held) if adapter is not None else 0)
        if adapter is not None:
            leaves = {**_stored_leaves(source, manifest, held - trained.keys()), **trained}
            job.write_adapter(adapter, config, leaves, base_model)
        if out is not None:
            changed = {path: leaf for path, leaf in trained.items() if path not in held}
            job.write(out, manifest.shards, engine.base_entries(manifest.model), open_stores(source, manifest)[-1], changed)
            folder.copy_files(source, manifest.side_files, out)
            if manifest.index is not None:
                _write_index(out, manifest)
    left = [path for path in sorted(trained) if (adapter_out if path in held else base_out) is None]
    return dataclasses.replace(job.summary(started), left_out={"/".join(path): math.prod(shapes[path]) for path in left})


class _Job:
    """One export: counts and progress over all files."""

    def __init__(self, progress: Callable[[int, int], None] | None) -> None:
        self._progress = progress or (lambda done, total: None)
        self._values = 0
        self.tensors = self.parameters = self.nbytes = 0

    def expect(self, files: Iterable[TensorFile], others: int = 0) -> None:
        """Sets the total for the progress: the values of the files, and so many others."""
        self._values = sum(math.prod(shape) for file in files for _, _, shape in file.tensors) + others

    def summary(self, started: float) -> Summary:
        """Returns the counts, and the seconds since `started`."""
        return Summary(self.tensors, self.parameters, self.nbytes, time.monotonic() - started)

    def write(
        self,
        out: epath.Path,
        files: Sequence[TensorFile],
        entries: Mapping[str, Entry],
        store: Store,
        changed: Mapping[TreePath, Any] = types.MappingProxyType({}),
    ) -> None:
        """Writes weight files, all open at once, in the order of the store, so that every part is read once.

        Leaves in `changed`, stacked, take the place of those in the store, in the type that is stored there.
        """
        with contextlib.ExitStack() as stack:
            writers = {name: writer for file in files for name, writer in _writers(stack, out, file)}
            dtypes = {name: dtype for file in files for name, dtype, _ in file.tensors}
            wanted = _by_stored(entries, writers)
            given = {stored: entries[keys[0]] for stored, keys in wanted.items() if entries[keys[0]].path in changed}
            arrays = ((stored, _layer(changed, entry).astype(store.arrays[stored].dtype)) for stored, entry in given.items())
            for stored, array in itertools.chain(store.read([name for name in wanted if name not in given]), arrays):
                for key in wanted[stored]:
                    if dtype_name(array.dtype) != dtypes[key] or array.shape != entries[key].tree_shape:
                        raise InputError(f"{stored} is not stored as {folder.MANIFEST} says; convert the checkpoint again")
                    self._tensor(writers[key], key, entries[key], array)

    def write_adapter(self, out: epath.Path, config: ModelConfig, leaves: Mapping[TreePath, Any], base_model: str | None) -> None:
        """Writes weights and settings of an adapter."""
        entries = adapter_entries(config)
        described = tuple((key, dtype_name(leaves[entry.path].dtype), entry.torch_shape) for key, entry in sorted(entries.items()))
        with Writer(out / WEIGHTS, described, {"format": "pt"}) as writer:
            for key, entry in entries.items():
                self._tensor(writer, key, entry, _layer(leaves, entry))
        write_config(out / CONFIG, default_config(config, base_model))

    def _tensor(self, writer: Writer, key: str, entry: Entry, array: np.ndarray) -> None:
        writer.write(key, entry.to_torch(array))
        self.tensors += 1
        self.parameters += array.size
        self.nbytes += array.nbytes
        self._progress(self.parameters, self._values)


def _layer(leaves: Mapping[TreePath, Any], entry: Entry) -> np.ndarray:
    """The leaf of an entry, or its layer of it."""
    leaf = leaves[entry.path]
    return np.asarray(leaf if entry.layer is None else leaf[entry.layer])


def _stored_leaves(source: epath.Path, manifest: Manifest, paths: Set[TreePath]) -> dict[TreePath, np.ndarray]:
    """Leaves of a converted folder, stacked, float32: those of its adapter where it has them.

    Raises:
      InputError: it does not hold one of them.
    """
    stores = open_stores(source, manifest)
    entries = [*engine.base_entries(manifest.model).values(), *engine.lora_entries(manifest.model).values()]
    leaves: dict[TreePath, np.ndarray] = {}
    for path, group in engine.stacks(e for e in entries if e.path in paths).items():
        names = [entry.stored for entry in group]
        store = next((s for s in stores if all(name in s.arrays for name in names)), stores[-1])
        arrays = [array.astype(np.float32) for _, array in store.read(names)]
        leaves[path] = arrays[0] if group[0].layer is None else np.stack(arrays)
    if missing := paths - leaves.keys():
        raise InputError(f"{source}: has no {'/'.join(min(missing))}, and the run did not train it: the adapter would lack it")
    return leaves


def _writers(stack: contextlib.ExitStack, out: epath.Path, file: TensorFile) -> Iterable[tuple[str, Writer]]:
    writer = stack.enter_context(Writer(out / file.file, file.tensors, file.metadata))
    return [(name, writer) for name, _, _ in file.tensors]


def _by_stored(entries: Mapping[str, Entry], wanted: Mapping[str, Writer]) -> dict[str, list[str]]:
    """Groups the torch names to write by the stored array they come from, in the order of the tree."""
    unknown = [name for name in wanted if name not in entries]
    if unknown:
        raise InputError(f"omni_jax.json lists {len(unknown)} tensors that its model lacks ({unknown[0]}); convert the checkpoint again")
    groups: dict[str, list[str]] = {}
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].path, item[1].layer or 0)):
        if key in wanted:
            groups.setdefault(entry.stored, []).append(key)
    return groups


def _write_index(out: epath.Path, manifest: Manifest) -> None:
    placed = {name: shard.file for shard in manifest.shards for name, _, _ in shard.tensors}
    made = json.dumps({"metadata": manifest.index, "weight_map": placed}, indent=2, sort_keys=True) + "\n"
    text = made if manifest.index_text is None else manifest.index_text
    (out / INDEX).write_bytes(text.encode())  # bytes, so that line ends stay as they are


def _refuse_overlap(base_out: epath.PathLike, adapter_out: epath.PathLike) -> None:
    base, adapter = (os.fspath(out) if "://" in os.fspath(out) else os.path.realpath(out) for out in (base_out, adapter_out))
    if f"{base}/".startswith(f"{adapter}/") or f"{adapter}/".startswith(f"{base}/"):
        raise InputError(f"--base-out {base_out} and --adapter-out {adapter_out}: one holds the other; name two separate folders")
