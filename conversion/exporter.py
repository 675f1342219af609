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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
from etils import epath

from omni_jax.config import ModelConfig
from omni_jax.conversion import engine, folder
from omni_jax.conversion.adapter import CONFIG, WEIGHTS, adapter_entries, default_config, write_config
from omni_jax.conversion.engine import Entry
from omni_jax.conversion.export_readme import README, readme
from omni_jax.conversion.folder import Manifest, TensorFile
from omni_jax.conversion.importer import Summary
from omni_jax.conversion.names import with_norm
from omni_jax.conversion.rules import TreePath
from omni_jax.conversion.store import Store, open_extra, open_stores
from omni_jax.conversion.torch_writer import TorchWriter
from omni_jax.conversion.weight_files import INDEX, TORCH_INDEX, in_format
from omni_jax.io.safetensors_io import Writer, dtype_name
from omni_jax.types import InputError

FORMATS = ("keep", "safetensors", "bin")
NORMS = ("keep", "old", "new")

_ORIGINALS = "write the base from a folder converted without --weights, or take the checkpoint itself"


def to_torch(
    model: epath.PathLike,
    *,
    base_out: epath.PathLike | None = None,
    adapter_out: epath.PathLike | None = None,
    file_format: str = "keep",
    weight_norm: str = "keep",
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Writes the base checkpoint, the adapter, or both; each folder appears under its name only when complete.

    Weights are written in the type they are stored in: bit-equal to the source after a conversion with dtype "keep".

    Args:
      file_format: of the weight files, of FORMATS: "keep" writes `.bin` back to `.bin`.
      weight_norm: names of the weight norm of BEATs' `pos_conv`, of NORMS; "keep" writes those of the source.

    Raises:
      InputError: not a converted folder, no adapter to export, an output that exists, or a damaged part.
    """
    source, manifest = _opened(model, base_out, adapter_out)
    if adapter_out is not None and manifest.adapter is None:
        why = "its adapter was merged into the base" if manifest.merged else "it was converted without one"
        raise InputError(f"{source}: has no adapter to write ({why}); omit --adapter-out or convert with --adapter")
    job, stores = _Job(progress), open_stores(source, manifest)
    with _folders(base_out, adapter_out) as (base, adapter):
        plan = _Plan.of(manifest, file_format, weight_norm)
        job.expect((*(plan.files if base is not None else ()), *((manifest.adapter,) if adapter and manifest.adapter else ())))
        if base is not None:
            job.write(base, plan.files, plan.entries, [stores[-1], *open_extra(source, manifest)])
            plan.write_rest(source, base)
        if adapter is not None and manifest.adapter is not None:
            job.write(adapter, (manifest.adapter,), _stored_adapter(manifest.adapter, manifest, stores[0]), stores[:1])
            folder.copy_files(source / folder.ADAPTER_FILES, manifest.adapter_files, adapter)
    return job.summary()


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
    with folder.new_folder(out) as temporary:
        job.write_adapter(temporary, config, leaves, base_model)
    return job.summary()


def write_trained(
    base: epath.PathLike,
    config: ModelConfig,
    trained: Mapping[TreePath, Any],
    *,
    base_out: epath.PathLike | None = None,
    adapter_out: epath.PathLike | None = None,
    base_model: str | None = None,
    file_format: str = "keep",
    weight_norm: str = "keep",
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
      file_format, weight_norm: as in `to_torch`.

    Raises:
      InputError: nothing to write, no adapter in the run, leaves that are not those of the base, or an output that exists.
    """
    source, manifest = _opened(base, base_out, adapter_out)
    if adapter_out is not None and config.lora is None:
        raise InputError("the run trained no adapter (lora.rank is 0); omit --adapter-out and take --base-out")
    shapes = engine.tree_shapes(config)
    wrong = [path for path, leaf in trained.items() if shapes.get(path) != tuple(leaf.shape)]
    alone = [dataclasses.replace(one.with_weights("float"), lora=None) for one in (config, manifest.model)]
    if wrong or alone[0] != alone[1]:
        what = f"{'/'.join(wrong[0])} does not fit" if wrong else "the architectures differ"
        raise InputError(f"{source}: is not the base of this run ({what}); name the folder it was trained from")
    held = {entry.path for entry in adapter_entries(config).values()} if config.lora else set()
    job, plan = _Job(progress), _Plan.of(manifest, file_format, weight_norm)
    with _folders(base_out, adapter_out) as (out, adapter):
        job.expect(plan.files if out is not None else (), sum(math.prod(shapes[path]) for path in held) if adapter is not None else 0)
        if adapter is not None:
            leaves = {**_stored_leaves(source, manifest, held - trained.keys()), **trained}
            job.write_adapter(adapter, config, leaves, base_model)
        if out is not None:
            changed = {path: leaf for path, leaf in trained.items() if path not in held}
            stores = [open_stores(source, manifest)[-1], *open_extra(source, manifest)]
            job.write(out, plan.files, plan.entries, stores, changed)
            plan.write_rest(source, out)
    left = [path for path in sorted(trained) if (adapter_out if path in held else base_out) is None]
    return dataclasses.replace(job.summary(), left_out={"/".join(path): math.prod(shapes[path]) for path in left})


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The base checkpoint that an export writes: its files, what each tensor in them is, and whether names differ from the source's."""

    manifest: Manifest
    files: tuple[TensorFile, ...]
    entries: Mapping[str, Entry]
    index_file: str

    @classmethod
    def of(cls, manifest: Manifest, file_format: str, weight_norm: str) -> _Plan:
        for option, value, allowed in (("--format", file_format, FORMATS), ("--weight-norm", weight_norm, NORMS)):
            if value not in allowed:
                raise InputError(f"{option} {value}: choose one of {', '.join(allowed)}")
        base, entries, files = engine.base_entries(manifest.model), {}, []
        for shard in manifest.shards:
            tensors = tuple((with_norm(name, weight_norm), *rest) for name, *rest in shard.tensors)
            for (source, _, shape), (name, *_) in zip(shard.tensors, tensors, strict=True):
                if (key := manifest.names.get(source, source)) in base:
                    entries[name] = base[key]
                elif manifest.extra_digest is not None:
                    entries[name] = engine.original(source, shape)
            file = in_format(shard.file, file_format)
            metadata = shard.metadata if file == shard.file else {"format": "pt"}
            files.append(TensorFile(file, metadata, tensors))  # type: ignore[arg-type]
        index = TORCH_INDEX if files and files[0].file.endswith(".bin") else INDEX
        return cls(manifest, tuple(files), entries, index)

    def write_rest(self, source: epath.Path, out: epath.Path) -> None:
        """Writes side files, index and, where the weights need it, the page that says how to load them."""
        side_files = tuple(name for name in self.manifest.side_files if name != README)
        folder.copy_files(source, side_files, out)
        if self.manifest.index is not None:
            placed = {name: file.file for file in self.files for name, _, _ in file.tensors}
            text = self.manifest.index_text
            if text is None or json.loads(text)["weight_map"] != placed:
                text = json.dumps({"metadata": self.manifest.index, "weight_map": placed}, indent=2, sort_keys=True) + "\n"
            (out / self.index_file).write_bytes(text.encode())  # bytes, so that line ends stay as they are
        if page := readme([(file.file, name) for file in self.files for name, _, _ in file.tensors]):
            (out / README).write_text(page)


class _Job:
    """One export: counts and progress over all files."""

    def __init__(self, progress: Callable[[int, int], None] | None) -> None:
        self._progress = progress or (lambda done, total: None)
        self._values, self._started = 0, time.monotonic()
        self.tensors = self.parameters = self.nbytes = 0

    def expect(self, files: Iterable[TensorFile], others: int = 0) -> None:
        """Sets the total for the progress: the values of the files, and so many others."""
        self._values = sum(math.prod(shape) for file in files for _, _, shape in file.tensors) + others

    def summary(self) -> Summary:
        """Returns the counts, and the seconds since the beginning."""
        return Summary(self.tensors, self.parameters, self.nbytes, time.monotonic() - self._started)

    def write(
        self,
        out: epath.Path,
        files: Sequence[TensorFile],
        entries: Mapping[str, Entry],
        stores: Sequence[Store],
        changed: Mapping[TreePath, Any] = types.MappingProxyType({}),
    ) -> None:
        """Writes weight files, all open at once, in the order of the stores, so that every part is read once.

        Leaves in `changed`, stacked, take the place of those in the store, in the type that is stored there.
        """
        with contextlib.ExitStack() as stack:
            writers = {name: writer for file in files for name, writer in _writers(stack, out, file, entries)}
            dtypes = {name: dtype for file in files for name, dtype, _ in file.tensors}
            wanted = _by_stored(entries, writers)
            given = {stored: entries[keys[0]] for stored, keys in wanted.items() if entries[keys[0]].path in changed}
            arrays = ((stored, _layer(changed, entry).astype(stores[0].arrays[stored].dtype)) for stored, entry in given.items())
            extra = [name for store in stores[1:] for name in wanted if name in store.arrays]
            first = stores[0].read([name for name in wanted if name not in given and name not in extra])
            for stored, array in itertools.chain(first, *(store.read(extra) for store in stores[1:]), arrays):
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

    def _tensor(self, writer: Writer | TorchWriter, key: str, entry: Entry, array: np.ndarray) -> None:
        writer.write(key, entry.to_torch(array))
        self.tensors += 1
        self.parameters += array.size
        self.nbytes += array.nbytes
        self._progress(self.parameters, self._values)


def _stored_adapter(file: TensorFile, manifest: Manifest, store: Store) -> dict[str, Entry]:
    """Returns name in the adapter's file -> Entry: as it was where the model takes it in another shape or scale."""
    entries = adapter_entries(manifest.model)
    keys = {name: (manifest.names.get(name, name), shape) for name, _, shape in file.tensors}
    kept = {name: engine.original(key, shape) for name, (key, shape) in keys.items()}
    fitted = {name: entries[key] for name, (key, _) in keys.items() if key in entries}
    return fitted | {name: entry for name, entry in kept.items() if entry.stored in store.arrays}


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
        if any(store.arrays[name].dtype == np.int8 for name in names if name in store.arrays):
            raise InputError(f"{source}: holds {'/'.join(path)} in int8 alone, and the run did not train it; {_ORIGINALS}")
        arrays = [array.astype(np.float32) for _, array in store.read(names)]
        leaves[path] = arrays[0] if group[0].layer is None else np.stack(arrays)
    if missing := paths - leaves.keys():
        raise InputError(f"{source}: has no {'/'.join(min(missing))}, and the run did not train it: the adapter would lack it")
    return leaves


def _writers(
    stack: contextlib.ExitStack, out: epath.Path, file: TensorFile, entries: Mapping[str, Entry]
) -> Iterable[tuple[str, Writer | TorchWriter]]:
    if file.file.endswith(".bin"):
        first: dict[str, str] = {}
        same = {name: first.setdefault(entries[name].stored, name) for name, _, _ in file.tensors if name in entries}
        writer: Writer | TorchWriter = stack.enter_context(TorchWriter(out / file.file, file.tensors, same))
    else:
        writer = stack.enter_context(Writer(out / file.file, file.tensors, file.metadata))
    return [(name, writer) for name, _, _ in file.tensors]


def _by_stored(entries: Mapping[str, Entry], wanted: Mapping[str, Any]) -> dict[str, list[str]]:
    """Groups the torch names to write by the stored array they come from, in the order of the tree."""
    unknown = [name for name in wanted if name not in entries]
    if unknown:
        raise InputError(f"omni_jax.json lists {len(unknown)} tensors that its model lacks ({unknown[0]}); convert the checkpoint again")
    groups: dict[str, list[str]] = {}
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].path, item[1].layer or 0)):
        if key in wanted:
            groups.setdefault(entry.stored, []).append(key)
    return groups


def _opened(model: epath.PathLike, base_out: epath.PathLike | None, adapter_out: epath.PathLike | None) -> tuple[epath.Path, Manifest]:
    """Returns a converted folder and what it says of itself. Raises InputError where such outputs cannot be made of it."""
    if base_out is None and adapter_out is None:
        raise InputError("to-torch: nothing to write; give --base-out, --adapter-out or both")
    if base_out is not None and adapter_out is not None:
        base, adapter = (os.fspath(out) if "://" in os.fspath(out) else os.path.realpath(out) for out in (base_out, adapter_out))
        if f"{base}/".startswith(f"{adapter}/") or f"{adapter}/".startswith(f"{base}/"):
            raise InputError(f"--base-out {base_out} and --adapter-out {adapter_out}: one holds the other; name two separate folders")
    source = epath.Path(model)
    manifest = folder.read_manifest(source)
    if base_out is not None and manifest.model.weights != "float":
        raise InputError(f"{source}: its base weights are rounded to {manifest.model.weights} and are not the checkpoint's; {_ORIGINALS}")
    return source, manifest


@contextlib.contextmanager
def _folders(base_out: epath.PathLike | None, adapter_out: epath.PathLike | None) -> Iterator[tuple[epath.Path | None, epath.Path | None]]:
    """Yields the new folders of base and adapter, those that are asked for; neither appears if the other fails."""
    with contextlib.ExitStack() as both:
        adapter = both.enter_context(folder.new_folder(adapter_out)) if adapter_out is not None else None
        yield both.enter_context(folder.new_folder(base_out)) if base_out is not None else None, adapter
