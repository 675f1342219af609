"""The weight files of a checkpoint folder, safetensors or torch's `.bin`: which they are, and the place of every tensor."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
from typing import Any

from etils import epath

from omni_jax.io import safetensors_io
from omni_jax.io.messages import some, stands_for
from omni_jax.io.safetensors_io import TensorInfo
from omni_jax.io.torch_pickle import open_torch_weights
from omni_jax.types import InputError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TORCH_INDEX, TORCH_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"

_KINDS = ((INDEX, SINGLE, "*.safetensors"), (TORCH_INDEX, TORCH_SINGLE, "pytorch_model*.bin"))
_OTHERS = (".pt", ".pth", ".ckpt", ".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".incomplete")
_BESIDE = re.compile("beats|training_args|optimizer|scheduler|rng_state|adapter_model|scaler")  # what programs put beside weights
_NOT_OURS = "adapter_model.safetensors"
_NUMBERED = re.compile(r"(.+)-(\d+)-of-(\d+)\.\w+")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One weight file: its name, its metadata and the names of its tensors in the order of their data."""

    file: str
    metadata: dict[str, str]
    tensors: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class WeightFiles:
    """What `open_weights` found.

    Attributes:
      shards: the files that are read, in the order of their names.
      tensors: name -> place of every tensor.
      index_file: name of the index; None without one.
      index: its `metadata`.
      index_text: it as it is.
      names: every weight and index file of the folder, read or not.
      notes: lines about what is left out.
      unlisted: names of tensors that the index does not know.
    """

    shards: tuple[Shard, ...]
    tensors: dict[str, TensorInfo]
    index_file: str | None
    index: dict[str, Any] | None
    index_text: str | None
    names: frozenset[str]
    notes: tuple[str, ...]
    unlisted: tuple[str, ...] = ()


def open_weights(folder: epath.Path) -> WeightFiles:
    """Returns the weights in a folder; headers are read and checked, weights are not.

    An index says which file holds a tensor. Without one, or without the shards that it names, the whole file (`model.safetensors`) is read,
    and only then files of other names.

    Raises:
      InputError: no weights, damaged or absent files, an index that contradicts them, or files without an index that overlap.
    """
    present = {item.name for item in folder.iterdir() if not item.is_dir()} - {_NOT_OURS}
    weights = {name for name in present for _, _, pattern in _KINDS if fnmatch.fnmatch(name, pattern)}
    known = frozenset(weights | {index for index, _, _ in _KINDS if index in present})
    for index_file, single, _ in _KINDS:
        if index_file in present:
            metadata, files, placed = _read_index(folder, index_file)
            absent = [file for file in files if not (folder / file).exists()]
            if absent and single not in present:
                where = folder / index_file
                raise InputError(f"{where}: {len(absent)} of {len(files)} weight files are absent ({some(absent)}); download them")
            if not absent:
                text = (folder / index_file).read_bytes().decode("utf-8-sig")
                return _opened(folder, files, known, index_file, metadata, text, placed)
        if single in present:
            return _opened(folder, [single], known, None, None, None, None)
    for _, _, pattern in _KINDS:
        if files := sorted(name for name in weights if fnmatch.fnmatch(name, pattern)):
            _refuse_absent(folder, files)
            return _opened(folder, files, known, None, None, None, None)
    others = sorted(name for name in present if name.endswith(_OTHERS) and not _BESIDE.match(name.lower()))
    held = (
        f"{some(others)} is not read under its name: a state dict of torch is read as {TORCH_SINGLE}"
        if others
        else "expected PyTorch weights"
    )
    raise InputError(f"{folder}: has neither {INDEX} nor {SINGLE} nor {TORCH_SINGLE} or its shards; {held}")


def read_json(path: epath.Path) -> dict[str, Any]:
    """Returns a JSON object, with a byte-order mark before it or not; InputError where there is none."""
    data = b""
    try:
        data = path.read_bytes()
        value = json.loads(data.decode("utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, RecursionError, OSError) as e:
        raise InputError(f"{path}: {stands_for(data) or f'not readable as JSON ({e}); download it again'}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_weight_file(path: epath.Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Returns (tensors in the order of the file, metadata) of a safetensors or torch file; raises InputError for any other."""
    return (open_torch_weights(path), {}) if path.name.endswith(".bin") else safetensors_io.read_header(path)


def in_format(file: str, form: str) -> str:
    """Returns the name of a weight or index file in the format "safetensors" or "bin"; in "keep" as it is."""
    old, new = {"safetensors": ("pytorch_model", "model"), "bin": ("model", "pytorch_model"), "keep": ("", "")}[form]
    if form == "keep" or file.endswith((f".{form}", f".{form}.index.json")):
        return file
    file = new + file.removeprefix(old) if file.startswith(old) else file
    return file.replace(".safetensors", ".bin") if form == "bin" else file.replace(".bin", ".safetensors")


def _opened(
    folder: epath.Path,
    files: list[str],
    known: frozenset[str],
    index_file: str | None,
    metadata: dict[str, Any] | None,
    text: str | None,
    placed: dict[str, str] | None,
) -> WeightFiles:
    headers = {file: read_weight_file(folder / file) for file in files}
    where: dict[str, list[str]] = {}
    for file, (infos, _) in headers.items():
        for name in infos:
            where.setdefault(name, []).append(file)
    notes = []
    doubled = [f"{name} in {' and '.join(there)}" for name, there in where.items() if len(there) > 1]
    if placed is None and doubled:
        raise InputError(
            f"{folder}: {len(doubled)} doubled tensors ({some(doubled)}), and no index says which are right; remove the stray file"
        )
    if placed is not None:
        wrong = [f"{name} not in {file}" for name, file in placed.items() if file not in where.get(name, ())]
        if wrong:
            raise InputError(
                f"{folder / str(index_file)}: contradicts its shards at {len(wrong)} tensors ({some(wrong)}); download it again"
            )
        if doubled:
            notes.append(f"{folder}: {len(doubled)} tensors are in two files ({some(doubled)}); those of {index_file} are read")
    home = {name: there[0] for name, there in where.items()} | (placed or {})
    shards = [Shard(file, meta, tuple(name for name in infos if home[name] == file)) for file, (infos, meta) in headers.items()]
    stale = sorted(known - {*files, index_file})
    if stale:
        what = index_file or files[0]
        notes.append(f"{folder}: {len(stale)} other weight files beside {what} are not read and not copied ({some(stale)})")
    tensors = {name: headers[shard.file][0][name] for shard in shards for name in shard.tensors}
    unlisted = tuple(name for name in where if placed is not None and name not in placed)
    return WeightFiles(tuple(shards), tensors, index_file, metadata, text, known, tuple(notes), unlisted)


def _read_index(folder: epath.Path, name: str) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """Returns (index metadata, weight files, tensor -> file)."""
    index = read_json(folder / name)
    placed = index.get("weight_map")
    if not (isinstance(placed, dict) and placed and all(isinstance(file, str) for file in placed.values())):
        raise InputError(f"{folder / name}: has no weight_map; download it again")
    metadata = index.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise InputError(f"{folder / name}: its metadata is {repr(metadata)[:80]}, expected an object; download it again")
    files = sorted(set(placed.values()))
    outside = [file for file in files if "/" in file or "\\" in file or file in ("", ".", "..")]
    if outside:
        raise InputError(f"{folder / name}: names files outside its folder ({some(outside)}); do not use this checkpoint")
    return metadata, files, placed


def _refuse_absent(folder: epath.Path, files: list[str]) -> None:
    """Raises InputError where the numbers in the names of files without an index say that some are missing, or of two checkpoints."""
    found = [match for file in files if (match := _NUMBERED.fullmatch(file))]
    sets = {(match[1], int(match[3])) for match in found}
    if len(sets) > 1 or (found and len(found) < len(files)):
        raise InputError(f"{folder}: weight files of several checkpoints and no index ({some(files)}); remove those that do not belong")
    if sets and len(found) != (total := next(iter(sets))[1]):
        raise InputError(f"{folder}: {total - len(found)} of {total} weight files are absent (found {some(files)}); download them")
