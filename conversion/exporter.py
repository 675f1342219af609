"""Converted folder -> PyTorch checkpoint and PEFT adapter, split, ordered and named as the source was."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from conversion.store import Store
from omni_jax.config import ModelConfig
from omni_jax.types import InputError


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
        raise InputError("to-torch: nothing to write; give --base-out, --adapter-out or both")
    if base_out is not None and adapter_out is not None:
        _refuse_overlap(base_out, adapter_out)
    started = time.monotonic()
    source = epath.Path(model)
    manifest = folder.read_manifest(source)
    if adapter_out is not None and manifest.adapter is None:
        why = "its adapter was merged into the base" if manifest.merged else "it was converted without one"
        raise InputError(f"{source}: has no adapter to write ({why}); leave --adapter-out away or convert with --adapter")
    job = _Job(progress)
    with contextlib.ExitStack() as both:  # neither folder appears if the other fails
        adapter = both.enter_context(folder.new_folder(adapter_out)) if adapter_out is not None else None
        base = both.enter_context(folder.new_folder(base_out)) if base_out is not None else None
        job.expect((*(manifest.shards if base is not None else ()), *((manifest.adapter,) if adapter and manifest.adapter else ())))
        if base is not None:
            job.write(base, manifest.shards, engine.base_entries(manifest.model), Store(source / folder.WEIGHTS))
            folder.copy_files(source, manifest.side_files, base)
            if manifest.index is not None:
                _write_index(base, manifest)
        if adapter is not None and manifest.adapter is not None:
            job.write(adapter, (manifest.adapter,), adapter_entries(manifest.model), Store(source / folder.ADAPTER))
            folder.copy_files(source / folder.ADAPTER_FILES, manifest.adapter_files, adapter)
    return Summary(job.tensors, job.parameters, job.nbytes, time.monotonic() - started)


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
    started = time.monotonic()
    entries = adapter_entries(config)
    described = tuple((key, dtype_name(leaves[entry.path].dtype), entry.torch_shape) for key, entry in sorted(entries.items()))
    with folder.new_folder(out) as temporary:
        with Writer(temporary / WEIGHTS, described, {"format": "pt"}) as writer:
            for key, entry in entries.items():
                leaf = leaves[entry.path]
                writer.write(key, entry.to_torch(np.asarray(leaf if entry.layer is None else leaf[entry.layer])))
        write_config(temporary / CONFIG, default_config(config, base_model))
    values = sum(math.prod(shape) for _, _, shape in described)
    nbytes = sum(math.prod(entry.torch_shape) * leaves[entry.path].dtype.itemsize for entry in entries.values())
    return Summary(len(described), values, nbytes, time.monotonic() - started)


class _Job:
    """One export: counts and progress over all files."""

    def __init__(self, progress: Callable[[int, int], None] | None) -> None:
        self._progress = progress or (lambda done, total: None)
        self._values = 0
        self.tensors = self.parameters = self.nbytes = 0

    def expect(self, files: Iterable[TensorFile]) -> None:
        """Sets the total for the progress."""
        self._values = sum(math.prod(shape) for file in files for _, _, shape in file.tensors)

    def write(self, out: epath.Path, files: Sequence[TensorFile], entries: Mapping[str, Entry], store: Store) -> None:
        """Writes weight files, all open at once, in the order of the store, so that every part is read once."""
        with contextlib.ExitStack() as stack:
            writers = {name: writer for file in files for name, writer in _writers(stack, out, file)}
            types = {name: dtype for file in files for name, dtype, _ in file.tensors}
            wanted = _by_stored(entries, writers)
            for stored, array in store.read(wanted):
                for key in wanted[stored]:
                    if dtype_name(array.dtype) != types[key] or array.shape != entries[key].tree_shape:
                        raise InputError(f"{stored} is not stored as {folder.MANIFEST} says; convert the checkpoint again")
                    writers[key].write(key, entries[key].to_torch(array))
                    self.tensors += 1
                    self.parameters += array.size
                    self.nbytes += array.nbytes
                self._progress(self.parameters, self._values)


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
