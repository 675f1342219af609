"""PyTorch checkpoint and PEFT adapter -> converted folder, one tensor in memory at a time."""

from __future__ import annotations

import dataclasses
import json
import math
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from omni_jax.conversion import control_tokens, engine, folder, processor_settings, source
from omni_jax.conversion.adapter import Adapter, open_adapter
from omni_jax.conversion.engine import Entry
from omni_jax.conversion.folder import Manifest, TensorFile
from omni_jax.conversion.matrices import round_matrix, scale_name
from omni_jax.conversion.names import OPTIONAL
from omni_jax.conversion.rules import PEFT_PREFIX
from omni_jax.conversion.source import BeatsFile, Checkpoint
from omni_jax.conversion.store import PART_BYTES, StoreWriter
from omni_jax.io.messages import some
from omni_jax.io.safetensors_io import DTYPES as DTYPE_OF
from omni_jax.io.safetensors_io import dtype_name
from omni_jax.model import carried_shapes, rounded_maps
from omni_jax.types import InputError

WEIGHTS = ("keep", "int8")
DTYPES: dict[str, Any] = {"keep": None, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


HEADS = ("classify_linear", "beats_ln", "beats_proj")
"""What WAVE adds to a thinker around the towers, and every recipe trains; BEATs itself comes from its own file."""

INIT_STD = 0.02  # as `model.layers.WEIGHT_INIT`

_BLOCK = 16 * 2**20  # bytes of a large tensor read at a time


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a conversion did: tensors written, their values and bytes, the time it took, and modules given random weights.

    Attributes:
      notes: lines about what of the source was left out, or is absent and not needed.
      left_out: of a run's export, path -> values, of what trained and is in neither folder, since one was not asked for.
    """

    tensors: int
    parameters: int
    nbytes: int
    seconds: float
    fresh: tuple[str, ...] = ()
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def to_jax(
    base: epath.PathLike,
    out: epath.PathLike,
    *,
    adapter: epath.PathLike | None = None,
    beats: epath.PathLike | None = None,
    dtype: str = "keep",
    weights: str = "keep",
    merge_adapter: bool = False,
    backbone: str = "auto",
    part_bytes: int = PART_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Writes the converted folder `out`; it appears under its name only when complete.

    Args:
      base: folder with config.json and weights, safetensors or torch's `.bin`.
      out: new folder.
      adapter: PEFT adapter folder; kept apart from the base unless `merge_adapter`.
      beats: BEATs `.pt` whose weights and settings replace those of the base.
      dtype: "keep", "bfloat16" or "float32"; "keep" makes the way back bit-equal.
      weights: "keep", or "int8": the base's large matrices rounded (`omni_jax.model.int8`), with an adapter that is merged; one that is not
        stays as it is. Half the size; the base's own values are not in such a folder, so that no base checkpoint comes out of it again.
      merge_adapter: fold LoRA and whole modules into the base; the result can only be exported as a merged base.
      backbone: "auto" reads the checkpoint as what it is, a plain Qwen2.5-Omni thinker as the start of a WAVE-like model; "wave" and
        "nemotron" read a thinker as such a backbone. Heads that the checkpoint lacks get random weights, and the summary names them.
      part_bytes: largest group of arrays saved together.
      progress: called with (bytes done, bytes in all).

    Raises:
      InputError: one line naming the file and how to fix it; nothing is left under `out`.
    """
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    if weights not in WEIGHTS:
        raise InputError(f"--weights {weights}: choose one of {', '.join(WEIGHTS)}")
    if backbone not in source.BACKBONES:
        raise InputError(f"--backbone {backbone}: choose one of {', '.join(source.BACKBONES)}")
    if merge_adapter and adapter is None:
        raise InputError("--merge-adapter: needs --adapter, the folder to merge")
    started = time.monotonic()
    with folder.new_folder(out) as temporary:
        job = _Job(source.open_checkpoint(base), beats, adapter, DTYPES[dtype], weights == "int8", merge_adapter, backbone, progress)
        control_tokens.check(job.checkpoint, job.config)
        processor_settings.check(job.checkpoint, job.config)
        with StoreWriter(temporary / folder.WEIGHTS, part_bytes) as writer:
            job.write_base(writer)
            base_digest = writer.digest
        extra_digest = None
        if job.checkpoint.extras and weights == "keep":
            with StoreWriter(temporary / folder.EXTRA, part_bytes) as writer:
                job.write_extras(writer)
                extra_digest = writer.digest
        kept, adapter_digest = job.adapter if not merge_adapter else None, None
        if kept is not None:
            with StoreWriter(temporary / folder.ADAPTER, part_bytes) as writer:
                job.write_adapter(kept, writer)
                adapter_digest = writer.digest
            folder.copy_files(kept.folder, kept.side_files, temporary / folder.ADAPTER_FILES)
        folder.copy_files(job.checkpoint.folder, job.checkpoint.side_files, temporary)
        if (temporary / folder.MANIFEST).exists():
            raise InputError(f"{job.checkpoint.folder / folder.MANIFEST}: its name is taken in the converted folder; rename the file")
        Manifest(
            model=dataclasses.replace(job.config, lora=kept.lora if kept else None),
            dtype=dtype,
            base_digest=base_digest,
            adapter_digest=adapter_digest,
            extra_digest=extra_digest,
            shards=job.shards() if weights == "keep" else (),
            index=job.index() if weights == "keep" else None,
            side_files=job.checkpoint.side_files,
            adapter=job.adapter_file(kept) if kept else None,
            adapter_config=kept.config if kept else None,
            adapter_files=kept.side_files if kept else (),
            merged=merge_adapter,
            index_text=job.index_text() if weights == "keep" else None,
            names=job.names(),
            beats_file=source.beats_file(job.checkpoint, beats) if job.config.beats else None,
            fresh=job.fresh,
        ).write(temporary)
    return Summary(job.tensors, job.parameters, job.nbytes, time.monotonic() - started, job.fresh, notes=job.notes())


class _Job:
    """One conversion: the opened sources and the counts so far."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        beats: epath.PathLike | None,
        adapter: epath.PathLike | None,
        dtype: Any,
        rounds: bool,
        merge: bool,
        backbone: str,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.checkpoint = checkpoint
        self.beats: BeatsFile | None = source.read_beats_file(beats) if beats is not None else None
        self._beats_path = beats
        self.config = source.model_config(checkpoint, self.beats, backbone)
        self.entries = engine.base_entries(self.config)
        self.checkpoint = checkpoint = _without_unknown(checkpoint, self.entries)
        self.fresh = () if source.is_wave(checkpoint) else tuple(name for name in HEADS if any(map(self._of(name), self.entries)))
        self._made = {key for name in self.fresh for key in filter(self._of(name), self.entries)}
        self._check()
        self.adapter = open_adapter(adapter, self.config) if adapter is not None else None
        self._merge = self.adapter if merge else None
        self._dtype = None if dtype is None else np.dtype(dtype)
        if rounds:
            self.config = self.config.with_weights("int8")
        self._rounded = rounded_maps(self.config)
        self._progress = progress or (lambda done, total: None)
        self._total = checkpoint.nbytes
        self._read = 0
        self._written: dict[str, tuple[str, tuple[int, ...]]] = {}  # torch name -> dtype and shape as stored
        self.tensors = self.parameters = self.nbytes = 0

    @staticmethod
    def _of(module: str) -> Callable[[str], bool]:
        return lambda key: key.startswith(f"{module}.")

    def _check(self) -> None:
        shapes = {name: info.shape for name, info in self.checkpoint.tensors.items() if not self._replaced(name)}
        # The width of these two follows from BEATs' settings, which are no more than assumed where no file gives them.
        guessed = ("beats_ln.", "beats_proj.") if self.beats is None and not source.has_beats_settings(self.checkpoint) else ()
        group = ("beats.", *guessed)
        ours = {name: entry for name, entry in self.entries.items() if name.startswith(group)}
        where, remedy = str(self.checkpoint.folder), source.beats_remedy(self.checkpoint)
        theirs = {name: shape for name, shape in shapes.items() if name.startswith(group)}
        if self.beats is not None:
            where, remedy = str(self._beats_path), "use the .pt file as published, with the cfg that belongs to its weights"
            theirs = {name: value.shape for name, value in self.beats.tensors.items()}
            engine.check(ours, theirs, where, remedy)
        elif self.config.beats is not None and not any(name.startswith("beats.") for name in theirs):
            raise InputError(f"{where}: the BEATs weights (beats.*) are missing; this is not a WAVE checkpoint, name the WAVE-7B folder")
        rest = {name: entry for name, entry in self.entries.items() if name not in ours and name not in self._made}
        others = {name: shape for name, shape in shapes.items() if not name.startswith(group)}
        engine.check(rest, others, str(self.checkpoint.folder), "use the config.json that belongs to these weights", OPTIONAL)
        self.absent = tuple(name for name in OPTIONAL if name in rest and name not in others)
        engine.check(ours, theirs, where, remedy)

    def _replaced(self, name: str) -> bool:
        return self.beats is not None and name.startswith("beats.")

    def _load(self, entry: Entry) -> np.ndarray:
        """Returns one torch tensor of the base, random where the checkpoint has none."""
        if entry.key in self._made:
            return self._random(entry)
        if self.beats is not None and self._replaced(entry.key):
            array = np.ascontiguousarray(self.beats.tensors[entry.key])
            source.refuse_non_finite(array, entry.key.removeprefix("beats."), self._beats_path)
            return array
        info = self.checkpoint.tensors[entry.key]
        self._read += info.nbytes
        self._progress(self._read, self._total)
        return source.read_finite(info)

    def _random(self, entry: Entry) -> np.ndarray:
        """Returns what a module starts with, the same in every conversion: weights as the model's own, biases 0, norms 1."""
        dtype = DTYPE_OF[next(iter(self.checkpoint.tensors.values())).dtype]
        if entry.path[-1] != "kernel":
            return np.full(entry.torch_shape, entry.path[-1] == "scale", dtype)
        noise = np.random.default_rng(zlib.crc32(entry.key.encode())).standard_normal(entry.torch_shape, np.float32)
        noise *= INIT_STD
        return noise.astype(dtype)

    def _leaf(self, entry: Entry) -> np.ndarray:
        """Returns one leaf (one layer of it). A large tensor is read and laid out some rows at a time, so that it never exists twice."""
        info = self.checkpoint.tensors.get(entry.key)
        axis = entry.transform.row_axis
        if info is None or self._replaced(entry.key) or self._merge is not None or axis is None or info.nbytes <= _BLOCK or info.stride:
            return entry.to_tree(self._merged(entry, self._load(entry)))
        whole = np.empty(entry.tree_shape, self._dtype or DTYPE_OF[info.dtype])
        step = max(1, info.shape[0] * _BLOCK // info.nbytes)
        for start in range(0, info.shape[0], step):
            rows = info.rows(start, min(start + step, info.shape[0]))
            source.refuse_non_finite(rows, entry.key, info.path)
            block = entry.to_tree(rows)
            whole[(slice(start, start + len(rows)), ...) if axis == 0 else (..., slice(start, start + len(rows)))] = block
            self._read += rows.nbytes
            self._progress(self._read, self._total)
        return whole

    def _present(self, entry: Entry) -> bool:
        tensors = self.beats.tensors if self.beats is not None and self._replaced(entry.key) else self.checkpoint.tensors
        return entry.key in tensors or entry.key in self._made

    def write_base(self, writer: StoreWriter) -> None:
        """Writes every leaf; in the order of the tree, so that the layers of a stack lie together."""
        for group in engine.stacks(entry for entry in self.entries.values() if self._present(entry)).values():
            if group[0].shared:
                self._add(writer, group[0], self._shared(group))
                for entry in group[1:]:
                    self._written[entry.key] = self._written[group[0].key]
                continue
            for entry in group:
                if entry.key in self.checkpoint.tensors:
                    writer.reserve(self.checkpoint.tensors[entry.key].nbytes)
                if entry.path[:-1] in self._rounded and entry.path[-1] == "kernel":
                    self._add_rounded(writer, entry)
                elif self.config.weights == "float" or entry.path not in carried_shapes(self.config):
                    self._add(writer, entry, self._leaf(entry))
                elif entry.key in self.checkpoint.tensors:
                    self._read += self.checkpoint.tensors[entry.key].nbytes

    def _shared(self, group: list[Entry]) -> np.ndarray:
        """Returns the one leaf of tensors that all layers share, the adapter's where it is merged and has it."""
        loaded = [(self._load(entry), entry) for entry in group]
        if self._merge is not None and (trained := [e for e in group if PEFT_PREFIX + e.key in self._merge.entries]):
            loaded = [(self._merge.read(PEFT_PREFIX + entry.key), entry) for entry in trained]
            return _one_table(loaded, self._merge.folder)
        return _one_table(loaded, self._beats_path if self._replaced(group[0].key) else self.checkpoint.folder)

    def _merged(self, entry: Entry, array: np.ndarray) -> np.ndarray:
        """Returns a torch tensor of the base with the adapter folded in (float32 arithmetic, the base's type)."""
        adapter = self._merge
        if adapter is None:
            return array
        whole = PEFT_PREFIX + entry.key
        if whole in adapter.entries:
            return adapter.read(whole)
        sides = [f"{PEFT_PREFIX}{entry.key.removesuffix('.weight')}.lora_{side}.weight" for side in "AB"]
        if not all(side in adapter.entries for side in sides):
            return array
        a, b = (adapter.read(side).astype(np.float32) for side in sides)  # (r, in) and (out, r)
        merged = (b @ a) * np.float32(adapter.scale(entry.key))
        merged += array.astype(np.float32)
        return merged.astype(array.dtype)

    def write_extras(self, writer: StoreWriter) -> None:
        """Writes tensors that only an export has again, as they are."""
        for name, info in self.checkpoint.extras.items():
            writer.add(engine.original(name, info.shape).stored, info.read())
            self._written[name] = (info.dtype, info.shape)
            self.tensors, self.parameters, self.nbytes = self.tensors + 1, self.parameters + info.size, self.nbytes + info.nbytes

    def write_adapter(self, adapter: Adapter, writer: StoreWriter) -> None:
        """Writes LoRA and whole modules; in the order of the tree."""
        for group in engine.stacks(adapter.entries.values()).values():
            if group[0].shared:
                self._add(writer, group[0], _one_table([(adapter.read(entry.key), entry) for entry in group], adapter.folder))
                self._written |= {entry.key: self._written[group[0].key] for entry in group}
                continue
            for entry in group:
                array = adapter.read(entry.key)
                fitted = adapter.fitted(entry.key, array)
                kept = fitted is not array  # as it was: the way back needs it, and it is what was converted
                self._add(writer, entry, entry.to_tree(fitted), counted=not kept)
                if kept:
                    self._add(writer, engine.original(entry.key, array.shape), array)

    def _add(self, writer: StoreWriter, entry: Entry, array: np.ndarray, counted: bool = True) -> None:
        if self._dtype is not None:
            array = array.astype(self._dtype, copy=False)
        writer.add(entry.stored, array)
        self._written[entry.key] = (dtype_name(array.dtype), entry.torch_shape)
        if counted:
            self.tensors += 1
            self.parameters += array.size
            self.nbytes += array.nbytes

    def _add_rounded(self, writer: StoreWriter, entry: Entry) -> None:
        array = self._leaf(entry)
        if self._dtype is not None:
            array = array.astype(self._dtype, copy=False)
        q, scale = round_matrix(entry, array, self.checkpoint.folder)
        writer.add(entry.stored, q)
        writer.add(scale_name(entry), scale)
        self._written[entry.key] = (dtype_name(array.dtype), entry.torch_shape)
        self.tensors += 1
        self.parameters += q.size
        self.nbytes += q.nbytes + scale.nbytes

    def shards(self) -> tuple[TensorFile, ...]:
        """Returns the source's files with the tensors an export has to put there.

        Tensors that only the BEATs file has go where the first of the base's BEATs tensors is.
        """
        files = [(shard, [name for name in shard.tensors if name in self._written]) for shard in self.checkpoint.shards]
        placed = {name for _, names in files for name in names}
        new = [name for name in self._written if name in self.entries and name not in placed and name not in self._made]
        home = next((names for shard, names in files if any(name.startswith("beats.") for name in shard.tensors)), files[0][1])
        home += new
        # A file that held nothing but what was left out is not written again.
        return tuple(TensorFile(shard.file, shard.metadata, self._described(names)) for shard, names in files if names)

    def index(self) -> dict[str, Any] | None:
        """Returns the metadata of the source's index, its `total_size` brought up to date where the weights changed."""
        checkpoint, index = self.checkpoint, self.checkpoint.index
        base = [at for name, at in self._written.items() if (name in self.entries and name not in self._made) or name in checkpoint.extras]
        written = sum(DTYPE_OF[dtype].itemsize * math.prod(shape) for dtype, shape in base)
        there = checkpoint.nbytes + checkpoint.left_out_bytes + sum(info.nbytes for info in checkpoint.extras.values())
        if index is not None and "total_size" in index and written != there:
            return index | {"total_size": written}
        return index

    def index_text(self) -> str | None:
        """Returns the source's index file as it is where an export gives just the same tensors in the same files, else None."""
        text = self.checkpoint.index_text
        if text is None or self.index() != self.checkpoint.index:
            return None
        placed = {name: shard.file for shard in self.shards() for name, _, _ in shard.tensors}
        return text if json.loads(text)["weight_map"] == placed else None

    def adapter_file(self, adapter: Adapter) -> TensorFile:
        renamed = {name: source for source, name in adapter.names.items()}
        tensors = tuple((renamed.get(name, name), *self._written[name]) for name in adapter.entries)
        return TensorFile("adapter_model.safetensors", adapter.metadata, tensors)

    def _described(self, names: Iterable[str]) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        return tuple((self._source_of(name), *self._written[name]) for name in names)

    def _source_of(self, name: str) -> str:
        """Returns the name under which the source has a tensor, or would have one that only the BEATs file holds."""
        sources = self.checkpoint.sources
        if name in sources or name in self.checkpoint.extras:
            return sources.get(name, name)
        prefixes = {source.removesuffix(key) for key, source in sources.items() if source.endswith(key)}
        return f"{prefixes.pop() if len(prefixes) == 1 else ''}{name}"

    def names(self) -> dict[str, str]:
        """Returns name in the source -> name in the rules where they differ, of the tensors that an export writes."""
        base = {self._source_of(name): name for name in self._written if name in self.entries and name not in self._made}
        adapter = self.adapter.names if self.adapter is not None and self._merge is None else {}
        return {source: name for source, name in base.items() if source != name} | adapter

    def notes(self) -> tuple[str, ...]:
        absent = f"{self.checkpoint.folder}: has no {', '.join(self.absent)}, which no embedding needs; an export will not have it either"
        adapter = self.adapter.notes if self.adapter is not None else ()
        return self.checkpoint.notes + ((absent,) if self.absent else ()) + adapter


def _one_table(tensors: Iterable[tuple[np.ndarray, Entry]], where: Any) -> np.ndarray:
    """Returns the leaf that tensors of several layers hold. Raises InputError where they differ."""
    (first, home), *others = tensors
    for other, entry in others:
        if other.dtype != first.dtype or other.tobytes() != first.tobytes():
            raise InputError(f"{where}: {entry.key} differs from {home.key}, but all layers must share one table; get the weights again")
    return home.to_tree(first)


def _without_unknown(checkpoint: Checkpoint, entries: Mapping[str, Entry]) -> Checkpoint:
    """Returns a checkpoint without what neither its index nor the model knows; its notes name what the index does not know."""
    unknown, known = (sorted(name for name in checkpoint.unlisted if (name in entries) == ours) for ours in (False, True))
    notes = checkpoint.notes
    for names, what in ((known, "read all the same"), (unknown, "not read")):
        if names:
            notes += (f"{checkpoint.folder}: {len(names)} tensors that the index does not know are {what} ({some(names)})",)
    tensors = {name: info for name, info in checkpoint.tensors.items() if name not in unknown}
    return dataclasses.replace(checkpoint, tensors=tensors, notes=notes)
