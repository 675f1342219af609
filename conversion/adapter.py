"""A PEFT LoRA adapter folder: its settings, which tensors they ask for, reading and writing.

Settings that change what is computed and are not supported are refused by name, never ignored.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from omni_jax.config import LoraConfig, ModelConfig
from omni_jax.conversion import engine, source
from omni_jax.conversion.engine import Entry
from omni_jax.conversion.module_matching import by_pattern, selected
from omni_jax.conversion.names import read_adapter_names
from omni_jax.conversion.rules import base_rules
from omni_jax.conversion.weight_files import read_weight_file
from omni_jax.io import safetensors_io
from omni_jax.types import InputError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"

# Field -> values that mean "not used". Any other value would change what the adapter computes.
_UNUSED: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": ("none",),
    "fan_in_fan_out": (False, None),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "lora_bias": (False, None),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "use_bdlora": (None, False),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "velora_config": (None,),
}

# Fields that are read below, and those that say how an adapter came to be and not what it computes.
_READ = frozenset(
    """
    alpha_pattern exclude_modules init_lora_weights layers_pattern layers_to_transform lora_alpha lora_dropout
    modules_to_save peft_type r rank_pattern target_modules use_rslora
    """.split()
)
_HARMLESS = frozenset(
    """
    auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config inference_mode loftq_config
    lora_ga_config megatron_config megatron_core merge_weights peft_version qalora_group_size revision task_type
    """.split()
)

_HARMLESS_INIT = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` under which PEFT leaves the base as it is. Under others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) it subtracts
from the base what the matrices started from, at every load."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An opened adapter folder.

    Attributes:
      folder: the folder.
      config: `adapter_config.json`, parsed.
      lora: the same as this project's record.
      own: module -> (rank, factor on the scale of `lora`) where they differ from it (`rank_pattern`, `alpha_pattern`).
      entries: PEFT name -> Entry of every tensor, LoRA and whole modules, in the order of the file, with the shapes of the model.
      tensors: PEFT name -> place in the file.
      names: name in the file -> PEFT name, where they differ.
      metadata: safetensors metadata of the weight file.
      side_files: every other file, `adapter_config.json` included.
    """

    folder: epath.Path
    config: dict[str, Any]
    lora: LoraConfig
    own: dict[str, tuple[int, float]]
    entries: dict[str, Entry]
    tensors: Mapping[str, safetensors_io.TensorInfo]
    names: dict[str, str]
    metadata: dict[str, str]
    side_files: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def read(self, key: str) -> np.ndarray:
        """Returns one tensor as it is in the file; InputError where it holds NaN or infinity."""
        return source.read_finite(self.tensors[key])

    def fitted(self, key: str, array: np.ndarray) -> np.ndarray:
        """Returns a tensor in the shape of the model: LoRA of a smaller rank gets zeros, and B the factor on its scale, in float32."""
        rank, factor = self.own.get(_module(key), (self.lora.rank, 1.0)) if ".lora_" in key else (self.lora.rank, 1.0)
        side = key.rsplit(".lora_", 1)[-1][0]
        if side == "B" and factor != 1:
            array = array.astype(np.float32) * np.float32(factor)
        missing = self.lora.rank - rank
        return np.pad(array, [(0, missing), (0, 0)] if side == "A" else [(0, 0), (0, missing)]) if missing else array

    def scale(self, key: str) -> float:
        """Returns the factor on B A x of the module that a base tensor belongs to."""
        return self.lora.scale * self.own.get(key.removesuffix(".weight"), (0, 1.0))[1]


def open_adapter(folder: epath.PathLike, base: ModelConfig) -> Adapter:
    """Returns the adapter in a folder, checked against the base model it is for; weights are not read.

    Raises:
      InputError: wrong folder, unsupported settings, or tensors that are not exactly those the settings select.
    """
    folder = epath.Path(folder)
    if not (folder / CONFIG).exists():
        depths = ("*", "snapshots/*") if folder.is_dir() else ()  # the latter as the Hub's cache has them
        inside = sorted(str(one.relative_to(folder)) for depth in depths for one in folder.glob(depth) if (one / CONFIG).exists())
        what = f"name one of the adapters in it ({', '.join(inside)})" if inside else "name the folder of a PEFT adapter"
        if not inside and (folder / source.CONFIG).exists():
            what = "it is a whole checkpoint: give it as --base, and no --adapter where one is merged into it"
        raise InputError(f"{folder}: has no {CONFIG}; {what}")
    config = source.read_json(folder / CONFIG)
    raw, metadata, file = _weights(folder)
    names = read_adapter_names(raw, str(folder / file))
    lora, modules, own = read_config(config, base, str(folder / CONFIG), names.spelled)
    tensors = {name: raw[key] for name, key in names.sources.items()}
    entries = adapter_entries(dataclasses.replace(base, lora=lora), modules)
    ours = {
        key: dataclasses.replace(entry, torch_shape=_own_shape(key, entry.torch_shape, own.get(_module(key))))
        for key, entry in entries.items()
    }
    remedy = "use the adapter_config.json and the base model it was trained with"
    engine.check(ours, {name: info.shape for name, info in tensors.items()}, f"{folder / file} against {CONFIG}", remedy)
    stale = {PICKLED} if file == WEIGHTS and (folder / PICKLED).exists() else set()
    side_files = source.list_files(folder, leave_out={file, *stale})
    renamed = {key: name for name, key in names.sources.items() if key != name}
    notes = (f"{folder}: {len(names.copies)} copies of the base's modules are left out ({names.copies[0]})",) if names.copies else ()
    notes += source.run_state_note(folder) + tuple(f"{folder}: {other} beside {file} is not read and not copied" for other in stale)
    return Adapter(folder, config, lora, own, {name: entries[name] for name in tensors}, tensors, renamed, metadata, side_files, notes)


def _own_shape(key: str, shape: tuple[int, ...], own: tuple[int, float] | None) -> tuple[int, ...]:
    if own is None or ".lora_" not in key:
        return shape
    return (own[0], shape[1]) if ".lora_A." in key else (shape[0], own[0])


def adapter_entries(config: ModelConfig, selected: frozenset[str] | None = None) -> dict[str, Entry]:
    """Returns PEFT name -> Entry of every tensor of the adapter `config.lora`.

    `selected` limits LoRA to these torch modules (`model.layers.0.self_attn.q_proj`); None takes every layer of every target.
    """
    lora = engine.lora_entries(config)
    if selected is not None:
        lora = {key: entry for key, entry in lora.items() if _module(key) in selected}
    return lora | engine.saved_entries(config, engine.base_entries(config))


def read_config(
    config: Mapping[str, Any], base: ModelConfig, where: str, spelled: Callable[[str], str] = str
) -> tuple[LoraConfig, frozenset[str], dict[str, tuple[int, float]]]:
    """Returns an `adapter_config.json` as (LoRA of the model, torch modules that get it, module -> own rank and factor on the scale).

    The last holds the modules that differ from the rest. The rank of the model is the largest one; a smaller one is the same with zeros,
    another alpha a factor.

    Args:
      spelled: name of a module -> its name in the program that wrote the adapter, which patterns are compared with.

    Raises:
      InputError: naming the field that is missing or not supported.
    """
    if config.get("peft_type") != "LORA":
        raise InputError(f"{where}: peft_type {config.get('peft_type')!r} is not supported, only 'LORA'")
    for field, unused in _UNUSED.items():
        if field in config and config[field] not in unused:
            raise InputError(
                f"{where}: {field}={config[field]!r} is not supported, only {unused[0]!r}; merge such an adapter in torch first"
            )
    strange = sorted(field for field in config.keys() - _UNUSED.keys() - _READ - _HARMLESS if config[field] not in (None, [], {}, ""))
    if strange:
        raise InputError(
            f"{where}: field {strange[0]}={config[strange[0]]!r} is not known, and may change what the adapter computes; "
            "remove it if it does not, else merge the adapter in torch first"
        )
    start = config.get("init_lora_weights")
    if not any(start is value or (isinstance(value, str) and start == value) for value in _HARMLESS_INIT):
        raise InputError(
            f"{where}: init_lora_weights={start!r} is not supported: it changes the base, too; "
            "convert such an adapter to plain LoRA in PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    if type(rank) is not int or rank < 1:
        raise InputError(f"{where}: r={rank!r} is not a rank; expected a whole number above 0")
    for field, value in (("lora_alpha", alpha), ("lora_dropout", dropout)):
        if not _is_number(value):
            raise InputError(f"{where}: {field}={value!r} is not a finite number")
    if not 0 <= dropout < 1:
        raise InputError(f"{where}: lora_dropout={dropout!r} is not at least 0 and below 1")
    saved = config.get("modules_to_save") or ()
    if not isinstance(saved, list | tuple) or not all(isinstance(name, str) for name in saved):
        raise InputError(f"{where}: modules_to_save={saved!r} is not a list of names")
    modules, targets = _select(config, base, where, spelled)
    rslora = bool(config.get("use_rslora", False))
    ranks = dict.fromkeys(modules, rank) | by_pattern(config, "rank_pattern", modules, spelled, where)
    alphas: dict[str, Any] = dict.fromkeys(modules, alpha) | by_pattern(config, "alpha_pattern", modules, spelled, where)
    odd = [f"rank_pattern gives {name} the rank {r!r}" for name, r in ranks.items() if type(r) is not int or r < 1]
    odd += [f"alpha_pattern gives {name} {a!r}" for name, a in alphas.items() if not _is_number(a)]
    if odd:
        raise InputError(f"{where}: {odd[0]}; use the file as PEFT wrote it")
    first = next((name for name in sorted(modules) if (ranks[name], alphas[name]) == (rank, alpha)), min(modules, key=lambda m: -ranks[m]))
    scales = {name: alphas[name] / (math.sqrt(ranks[name]) if rslora else ranks[name]) for name in modules}
    largest = max(ranks.values())
    whole = float(alphas[first]) if largest == ranks[first] else scales[first] * (math.sqrt(largest) if rslora else largest)
    lora = LoraConfig(largest, whole, rslora, float(dropout), targets, tuple(dict.fromkeys(saved)))  # type: ignore[arg-type]
    own = {
        name: (ranks[name], scales[name] / scales[first] if scales[name] != scales[first] else 1.0)
        for name in modules
        if ranks[name] != largest or scales[name] != scales[first]
    }
    if own and not scales[first]:
        raise InputError(f"{where}: alpha 0 beside others in alpha_pattern is not supported; merge such an adapter in torch first")
    kept = engine.saved_entries(dataclasses.replace(base, lora=lora), engine.base_entries(base))
    absent = [name for name in saved if not any(engine.inside(key, name) for key in kept)]
    if absent:
        raise InputError(f"{where}: modules_to_save names {absent}, which this model does not have")
    return lora, modules, own


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _select(
    config: Mapping[str, Any], base: ModelConfig, where: str, spelled: Callable[[str], str]
) -> tuple[frozenset[str], tuple[str, ...]]:
    """Returns the modules that get LoRA, and their paths in the parameter tree."""
    target, entries = config.get("target_modules"), engine.base_entries(dataclasses.replace(base, lora=None))
    rules = {rule.path: rule for rule in base_rules(base)}
    known = {key.removesuffix(".weight"): rules[entry.path] for key, entry in entries.items() if key.endswith(".weight")}
    chosen = selected(config, {name: rule.linear for name, rule in known.items()}, spelled, where)
    if not chosen:
        raise InputError(f"{where}: target_modules {target!r} selects no module of this model")
    unfit = [name for name in known if name in chosen and not known[name].linear]
    if unfit:
        raise InputError(f"{where}: target_modules {target!r} selects {unfit[0]}, which is not a linear layer; LoRA there is not supported")
    return frozenset(chosen), tuple(dict.fromkeys(rule.module for name, rule in known.items() if name in chosen))


def _weights(folder: epath.Path) -> tuple[Mapping[str, safetensors_io.TensorInfo], dict[str, str], str]:
    file = next((file for file in (WEIGHTS, PICKLED) if (folder / file).exists()), None)
    if file is None:
        raise InputError(f"{folder}: has neither {WEIGHTS} nor {PICKLED}; download the adapter again")
    tensors, metadata = read_weight_file(folder / file)
    odd = [name for name, info in tensors.items() if info.dtype not in safetensors_io.FLOATS]
    if odd:
        raise InputError(f"{folder / file}: {len(odd)} tensors are not floating point ({odd[0]}, ...); get the adapter again")
    return tensors, metadata or {"format": "pt"}, file


def _module(key: str) -> str:
    return key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]


# ------------------------------------------------------------------------------------------------------------------- writing


def default_config(config: ModelConfig, base_model: str | None = None) -> dict[str, Any]:
    """Returns an `adapter_config.json` for `config.lora`, every field that PEFT writes, for an adapter that never had one."""
    lora = config.lora
    if lora is None:
        raise ValueError("config.lora is None: there is no adapter to describe")
    keys = engine.base_entries(dataclasses.replace(config, lora=None))
    saved = [name for name in lora.modules_to_save if any(engine.inside(key, name) for key in keys)]
    modules = [re.escape(rule.torch.removesuffix(".weight")) for rule in base_rules(config) if rule.linear and rule.module in lora.targets]
    pattern = "|".join(module.replace(re.escape("{layer}"), r"\d+") for module in modules)
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    unused = {field: values[0] for field, values in _UNUSED.items()}
    ours = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": saved or None,
        "peft_type": "LORA",
        "qalora_group_size": 16,
        "r": lora.rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": pattern,
        "task_type": "CAUSAL_LM",
        "use_rslora": lora.rslora,
    }
    return dict(sorted((unused | ours).items()))


def write_config(path: epath.Path, config: Mapping[str, Any]) -> None:
    """Writes `adapter_config.json`."""
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
