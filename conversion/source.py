"""A PyTorch checkpoint folder, opened without reading its weights: configuration, the place of every tensor, side files."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from omni_jax.config import EMBED_STYLE, WAVE_STYLE, BeatsConfig, ConfigError, ModelConfig
from omni_jax.config.hf_fields import NAMES, thinker_config
from omni_jax.conversion.names import canonical, is_known, read_names
from omni_jax.conversion.weight_files import Shard, WeightFiles, open_weights, read_json
from omni_jax.io import safetensors_io
from omni_jax.io.messages import some
from omni_jax.io.safetensors_io import TensorInfo
from omni_jax.io.torch_pickle import read_torch_file
from omni_jax.types import InputError

CONFIG = "config.json"
_RUN_STATE = re.compile(
    r"(optimizer|scheduler|scaler)\.(pt|bin)|rng_state(_\d+)?\.pth|random_states_\d+\.pkl|(global_step|checkpoint-|optimizer_|pytorch_model_fsdp_)\d+"
)
"""What training programs save beside weights to resume a run: large, and of no use to a model."""
_SKIPPED_FOLDERS = (".git", ".cache")  # version control and download bookkeeping, not part of a checkpoint


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder of PyTorch weights.

    Attributes:
      folder: the folder.
      config: `config.json`, parsed.
      tensors: name -> place of every tensor.
      shards: the weight files in the order of their names.
      index: `metadata` of the index file; None for a checkpoint of one file without an index.
      index_text: the index file as it is; None without one.
      side_files: every other file of the folder, relative names.
      sources: name in the rules, which `tensors` and `shards` have -> name in the weight files.
      extras: name in the weight files -> place of tables that the model computes itself, which an export has again.
      unlisted: names in the rules of tensors that the index does not know.
      left_out_bytes: size of the tensors that are not read: of the parts that speak.
      notes: lines about what is left out.
    """

    folder: epath.Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None
    index_text: str | None
    side_files: tuple[str, ...]
    sources: dict[str, str]
    extras: dict[str, TensorInfo] = dataclasses.field(default_factory=dict)
    unlisted: frozenset[str] = frozenset()
    left_out_bytes: int = 0
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())


def open_checkpoint(folder: epath.PathLike) -> Checkpoint:
    """Returns the checkpoint in a folder; headers are read and checked, weights are not.

    Raises:
      InputError: wrong folder, damaged or missing files, a tensor in two shards, an index that contradicts the shards.
    """
    folder = epath.Path(folder)
    _wanted_folder(folder)
    try:
        config = thinker_config(read_json(folder / "config.json"))
    except ConfigError as e:
        raise InputError(_of_folder(folder, e)) from None
    files = open_weights(folder)
    # What the index does not know is read, as transformers 5 reads it, unless a tensor that it knows stands for the same.
    listed = {canonical(name) for name in files.tensors.keys() - set(files.unlisted)}
    doubled = {name for name in files.unlisted if canonical(name) in listed}
    names = read_names([name for name in files.tensors if name not in doubled], str(folder))
    of = {source: name for name, source in names.sources.items()} | {name: name for name in names.buffers}
    unlisted = frozenset(of[name] for name in files.unlisted if name in of)
    if names.sources and not any(is_known(name) for name in names.sources):
        first = f"no tensor has a known name ({some(names.sources)})"
        raise InputError(f"{folder}: {first}; save the state dict of the model itself, without what it is wrapped in")
    sources = _untied(names.sources, files, config)
    of |= {source: name for name, source in sources.items()}
    tensors = {name: files.tensors[source] for name, source in sources.items()}
    if empty := [name for name, info in tensors.items() if not info.size]:
        advice = "as DeepSpeed ZeRO-3 leaves behind; write whole weights with its zero_to_fp32.py"
        raise InputError(f"{folder}: {len(empty)} tensors hold no values ({some(empty)}), {advice}")
    shards = tuple(dataclasses.replace(shard, tensors=tuple(of[n] for n in shard.tensors if n in of)) for shard in files.shards)
    left_out = sum(files.tensors[name].nbytes for name in names.dropped)
    notes = files.notes + run_state_note(folder)
    if names.buffers:
        what = f"{len(names.buffers)} tables that the model computes itself are kept for the way back alone"
        notes += (f"{folder}: {what} ({some(list(names.buffers))})",)
    if doubled:
        notes += (f"{folder}: {len(doubled)} tensors that {files.index_file} does not know are not read ({some(sorted(doubled))})",)
    not_float = [f"{name} is {info.dtype}" for name, info in tensors.items() if info.dtype not in safetensors_io.FLOATS]
    if not_float:
        raise InputError(f"{folder}: {len(not_float)} tensors are not floating point ({some(not_float)}); quantised weights cannot be read")
    side_files = list_files(folder, leave_out=set(files.names))
    extras = {name: files.tensors[name] for name in names.buffers}
    return Checkpoint(
        folder, config, tensors, shards, files.index, files.index_text, side_files, sources, extras, unlisted, left_out, notes
    )


_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def _untied(sources: dict[str, str], files: WeightFiles, config: Mapping[str, Any]) -> dict[str, str]:
    """Returns name in the rules -> name in the files; the embedding under the output's name where the two were saved once.

    `safetensors.torch.save_model` keeps the first of two names, and says in the metadata which it left out.
    """
    kept = sources.get(_OUTPUT)
    if kept is None or _EMBEDDING in sources:
        return sources
    text = config.get("text_config")
    tied = config.get("tie_word_embeddings") is True or (isinstance(text, Mapping) and text.get("tie_word_embeddings") is True)
    said = {other for shard in files.shards for name, other in shard.metadata.items() if canonical(name) == _EMBEDDING}
    if not tied and kept not in said:
        return sources
    return {_EMBEDDING if name == _OUTPUT else name: source for name, source in sources.items()}


def read_finite(info: TensorInfo) -> np.ndarray:
    """Returns a tensor; InputError where it holds NaN or infinity."""
    array = info.read()
    refuse_non_finite(array, info.name, info.path)
    return array


def refuse_non_finite(array: np.ndarray, name: str, where: Any) -> None:
    """Raises InputError naming the tensor where a value is NaN or infinite."""
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")
    exponent = _EXPONENT[safetensors_io.dtype_name(array.dtype)]
    mantissa_and_exponent = bits.dtype.type((1 << (8 * array.dtype.itemsize - 1)) - 1)
    step = 1 << 22  # values per pass, so that no temporary is as large as the tensor
    bad = [at for at in range(0, bits.size, step) if (bits[at : at + step] & mantissa_and_exponent).max() >= exponent]
    if bad:
        count = sum(int(np.count_nonzero((bits[at : at + step] & mantissa_and_exponent) >= exponent)) for at in bad)
        raise InputError(f"{where}: tensor {name} holds {count} NaN or infinite values of {bits.size}; get the weights again")


# Bit pattern of infinity; a larger one is NaN.
_EXPONENT = {"F64": 0x7FF0000000000000, "F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}


@dataclasses.dataclass(frozen=True)
class BeatsFile:
    """A published BEATs `.pt`: its settings, and its weights under the names they have in a WAVE checkpoint."""

    config: BeatsConfig
    tensors: dict[str, np.ndarray]


def read_beats_file(path: epath.PathLike) -> BeatsFile:
    """Returns settings and weights of a BEATs file {cfg, model}; never executes what the file says.

    Raises:
      InputError: not such a file, or a variant that is not supported.
    """
    path = epath.Path(path)
    content = read_torch_file(path)
    if not (isinstance(content, dict) and isinstance(content.get("cfg"), dict) and isinstance(content.get("model"), dict)):
        raise InputError(f"{path}: not a BEATs file: expected a dict with 'cfg' and 'model'")
    weights = content["model"]
    wrong = [str(name) for name, value in weights.items() if not (isinstance(name, str) and isinstance(value, np.ndarray))]
    wrong += [f"{n} ({v.dtype})" for n, v in weights.items() if isinstance(v, np.ndarray) and not is_float(v.dtype)]
    if wrong:
        raise InputError(f"{path}: {len(wrong)} entries of 'model' are not floating-point tensors ({some(wrong)}); not a BEATs file")
    try:
        config = BeatsConfig.from_pt_config(content["cfg"])
    except KeyError as e:
        raise InputError(f"{path}: its cfg lacks {e.args[0]!r}; not a BEATs file") from None
    except (ConfigError, TypeError, ValueError) as e:
        raise InputError(f"{path}: {e}") from None
    tensors = {f"beats.{name}": value for name, value in weights.items()}
    return BeatsFile(_as_stored(config, {name: value.shape for name, value in tensors.items()}), tensors)


BACKBONES = ("auto", "wave", "nemotron")
"""How a checkpoint is read: as its files say, with the fusion head and causal attention of WAVE, or as Omni-Embed-Nemotron."""


def is_wave(checkpoint: Checkpoint) -> bool:
    """Returns whether a checkpoint has the parts that WAVE adds to a Qwen2.5-Omni thinker, or names their file."""
    parts = ("beats.", "beats_ln.", "beats_proj.", "classify_linear.")
    return _beats_path(checkpoint) is not None or any(name.startswith(parts) for name in checkpoint.tensors)


def model_config(checkpoint: Checkpoint, beats: BeatsFile | None = None, backbone: str = "auto") -> ModelConfig:
    """Returns the configuration of a checkpoint, without LoRA.

    A plain thinker is read as WAVE reads it, its fusion head yet to be made, unless `backbone` (of BACKBONES) says otherwise; it has BEATs
    where `beats` gives them. BEATs' settings come from `beats`, else from `audio_config.beats_cfg`, else from the file that
    `audio_config.beats_path` names if the folder holds it, else from the published values (SPEC section 1). Whether a predictor is there,
    the weights say.

    Raises:
      InputError: a config.json that is not of this model.
    """
    _check_types(checkpoint.config, checkpoint.folder / "config.json")
    if checkpoint.config.get("train_classify") is False and any(name.startswith("classify_linear.") for name in checkpoint.tensors):
        raise InputError(
            f"{checkpoint.folder / 'config.json'}: train_classify is false, but there are weights of classify_linear; "
            "use the config.json that belongs to these weights"
        )
    if beats is not None:
        settings = beats.config
    elif not is_wave(checkpoint):
        settings = None
    else:
        settings = _as_stored(_beats_settings(checkpoint), {name: info.shape for name, info in checkpoint.tensors.items()})
    try:
        config = ModelConfig.from_hf(checkpoint.config, settings)
    except ConfigError as e:
        raise InputError(_of_folder(checkpoint.folder, e)) from None
    except (TypeError, AttributeError, ValueError) as e:
        raise InputError(f"{checkpoint.folder / 'config.json'}: cannot be read as a WAVE configuration ({e})") from None
    if backbone != "auto":
        config = dataclasses.replace(config, **(EMBED_STYLE if backbone == "nemotron" else WAVE_STYLE))
    if config.beats is not None and not config.has_head:
        given = "--beats" if beats is not None else str(checkpoint.folder)
        raise InputError(f"{given}: a backbone that pools the mean of its tokens has no BEATs; omit --beats or --backbone nemotron")
    return config


def _of_folder(folder: epath.Path, error: ConfigError) -> str:
    return f"{folder / 'config.json'}: {str(error).removeprefix('config.json: ')}"


_NO_COUNTS = ("rms_norm_eps", "fullatt_block_indexes")
_COUNTS = {section: [name for name in names.values() if name not in _NO_COUNTS] for section, names in NAMES.items()}
_COUNTS[""] = ["position_id_per_seconds", "seconds_per_chunk"]


def _check_types(config: Mapping[str, Any], path: epath.Path) -> None:
    """Refuses a field of another type than the model's; one that is missing is left to `ModelConfig.from_hf`."""

    def wrong(field: str, value: Any, wanted: str) -> InputError:
        return InputError(f"{path}: {field} is {value!r}, expected {wanted}; use the config.json of this checkpoint")

    for section, names in _COUNTS.items():
        fields = config.get(section, {}) if section else config
        if not isinstance(fields, dict):
            raise wrong(section, fields, "an object")
        for name in names:
            if name in fields and (type(fields[name]) is not int or fields[name] < 1):
                raise wrong(f"{section}.{name}".lstrip("."), fields[name], "a whole number above 0")
    text = config.get("text_config", {})
    ropes = {name: text[name] for name in ("rope_scaling", "rope_parameters") if text.get(name) is not None}
    for name, rope in ropes.items():
        if not isinstance(rope, dict):
            raise wrong(f"text_config.{name}", rope, "an object")
    lists = {f"text_config.{name}.mrope_section": rope["mrope_section"] for name, rope in ropes.items() if "mrope_section" in rope}
    vision = config.get("vision_config", {})
    if "fullatt_block_indexes" in vision:
        lists["vision_config.fullatt_block_indexes"] = vision["fullatt_block_indexes"]
    for field, value in lists.items():
        if not (isinstance(value, list) and all(type(item) is int for item in value)):
            raise wrong(field, value, "a list of whole numbers")
    numbers = {f"text_config.{name}": text[name] for name in ("rms_norm_eps", "rope_theta") if text.get(name) is not None}
    for field, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise wrong(field, value, "a number above 0")


def run_state_note(folder: epath.Path) -> tuple[str, ...]:
    """Returns a line about the state of a run that a folder holds, which is not copied; nothing where there is none."""
    names = sorted(item.name for item in folder.iterdir() if _RUN_STATE.fullmatch(item.name))
    return (f"{folder}: {len(names)} files and folders of a run's state are not copied ({some(names)})",) if names else ()


def list_files(folder: epath.Path, leave_out: set[str], below: str = "") -> tuple[str, ...]:
    """Returns the relative names of all files of a folder and its subfolders but `leave_out` and the state of a run, sorted."""
    names: list[str] = []
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        name = f"{below}{item.name}"
        if not below and _RUN_STATE.fullmatch(item.name):
            continue
        if item.is_dir():
            if item.name not in _SKIPPED_FOLDERS:
                names += list_files(item, leave_out, f"{name}/")
        elif not item.exists():
            raise InputError(f"{item}: a link to a file that does not exist; download the folder again")
        elif name not in leave_out:
            names.append(name)
    return tuple(names)


def _wanted_folder(folder: epath.Path) -> None:
    if not folder.exists():
        raise InputError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise InputError(f"{folder}: is a file; name the folder that holds config.json and the weights")
    if (folder / "omni_jax.json").exists():
        raise InputError(f"{folder}: is already a converted folder; name the PyTorch checkpoint")
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise InputError(f"{folder}: is an adapter; give it as --adapter, and the WAVE-7B folder as --base")
        inside = sorted(
            str(one.relative_to(folder)) for depth in ("*", "snapshots/*") for one in folder.glob(depth) if (one / CONFIG).exists()
        )
        what = f"name one of the checkpoints in it ({some(inside)})" if inside else "name the folder that holds config.json and the weights"
        raise InputError(f"{folder}: has no config.json; {what}")


def beats_file(checkpoint: Checkpoint, given: epath.PathLike | None) -> dict[str, str] | None:
    """Returns which BEATs file a conversion uses, by name and SHA-256: the `given` one, or the one in the folder that config.json names."""
    path = epath.Path(given) if given is not None else _beats_path(checkpoint)
    if path is None or not path.exists():
        return None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    return {"name": path.name, "sha256": digest, "gave": "weights and settings" if given is not None else "settings"}


def has_beats_settings(checkpoint: Checkpoint) -> bool:
    """Returns whether config.json holds BEATs' settings, or the folder the file that `audio_config.beats_path` names."""
    path = _beats_path(checkpoint)
    return _inlined_beats(checkpoint) is not None or (path is not None and path.exists())


def beats_remedy(checkpoint: Checkpoint) -> str:
    """Returns what to do where BEATs' weights and settings differ, by where `model_config` took the settings from."""
    path = _beats_path(checkpoint)
    if _inlined_beats(checkpoint) is not None:
        return "use the config.json whose audio_config.beats_cfg belongs to these weights, or give --beats FILE.pt"
    if path is not None and has_beats_settings(checkpoint):
        return f"use the {path.name} that belongs to these weights, or give --beats FILE.pt"
    why = "config.json names no file;"
    if path is not None:
        why = f"the file named by audio_config.beats_path ({path.name}) is absent; put it into the folder or"
    return f"BEATs settings: published defaults were used, because {why} give --beats FILE.pt"


def _audio_field(checkpoint: Checkpoint, name: str) -> Any:
    section = checkpoint.config.get("audio_config")
    return section.get(name) if isinstance(section, dict) else None


def _beats_path(checkpoint: Checkpoint) -> epath.Path | None:
    name = _audio_field(checkpoint, "beats_path")
    # Published configs hold a path of the training machine. "No" is WAVE's word for none.
    return checkpoint.folder / str(name).replace("\\", "/").rsplit("/", 1)[-1] if name and name != "No" else None


def _inlined_beats(checkpoint: Checkpoint) -> dict[str, Any] | None:
    cfg = _audio_field(checkpoint, "beats_cfg")
    return cfg if isinstance(cfg, dict) and cfg else None


def _beats_settings(checkpoint: Checkpoint) -> BeatsConfig:
    """Returns the settings in config.json, else those of the file that it names if the folder holds it, else the published ones."""
    path, cfg = _beats_path(checkpoint), _inlined_beats(checkpoint)
    named = read_beats_file(path).config if path is not None and path.exists() else None
    if cfg is None:
        return named or BeatsConfig()
    where = f"{checkpoint.folder / 'config.json'}: audio_config.beats_cfg"
    try:
        inlined = BeatsConfig.from_pt_config(cfg)
    except KeyError as e:
        raise InputError(f"{where} lacks {e.args[0]!r}; use the config.json of this checkpoint") from None
    except (ConfigError, TypeError, ValueError) as e:
        raise InputError(f"{where}: {e}") from None
    # Which predictor there is, the weights say.
    if path is not None and named is not None:
        ours, theirs = (dataclasses.asdict(dataclasses.replace(one, predictor_classes=0)) for one in (inlined, named))
        if odd := [name for name in ours if ours[name] != theirs[name]]:
            raise InputError(
                f"{where} and {path.name} differ ({odd[0]} {ours[odd[0]]} and {theirs[odd[0]]}); remove the one that is not these weights'"
            )
    return inlined


def _as_stored(config: BeatsConfig, shapes: Mapping[str, tuple[int, ...]]) -> BeatsConfig:
    predictor = shapes.get("beats.predictor.weight", (0,))
    return dataclasses.replace(config, predictor_classes=predictor[0] if predictor else 0)


def is_float(dtype: np.dtype) -> bool:
    """Returns whether weights may have this type: one of the floating-point types of safetensors."""
    try:
        return safetensors_io.dtype_name(dtype) in safetensors_io.FLOATS
    except KeyError:
        return False
