"""A PEFT LoRA adapter folder: its settings, which tensors they ask for, reading and writing.

Settings that change what is computed and are not supported are refused by name, never ignored.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from conversion import engine, safetensors_io, source
from conversion.engine import Entry
from conversion.rules import base_rules
from conversion.torch_pickle import read_torch_file
from omni_jax.config import LoraConfig, ModelConfig
from omni_jax.types import InputError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"

# Field -> values that mean "not used". Any other value would change what the adapter computes.
_UNUSED: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "alpha_pattern": ({}, None),
    "arrow_config": (None,),
    "bias": ("none",),
    "exclude_modules": (None, []),
    "fan_in_fan_out": (False,),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "layers_pattern": (None, []),
    "layers_to_transform": (None, []),
    "lora_bias": (False,),
    "monteclora_config": (None,),
    "rank_pattern": ({}, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (None, False),
    "use_dora": (False,),
    "use_qalora": (False,),
    "velora_config": (None,),
}

# Fields that are read below, and those that say how an adapter came to be and not what it computes.
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "init_lora_weights"}
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "merge_weights",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
}

_HARMLESS_INIT = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` under which PEFT leaves the base as it is. Under others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) it subtracts
from the base what the matrices started from, at every load."""

MATCH_LIMIT_S = 10.0
"""Seconds that `target_modules` may take over the names of a model."""

LONGEST_PATTERN = 10_000
_MATCH = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
pattern, names = json.load(sys.stdin)
try:
    compiled = re.compile(pattern)
except (re.error, OverflowError, RecursionError, MemoryError) as e:
    sys.exit(str(e) or type(e).__name__)
print(json.dumps([name for name in names if compiled.fullmatch(name)]))
"""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An opened adapter folder.

    Attributes:
      folder: the folder.
      config: `adapter_config.json`, parsed.
      lora: the same as this project's record.
      entries: PEFT name -> Entry of every tensor, LoRA and whole modules, in the order of the file.
      tensors: PEFT name -> place in the file, or the array itself where the file is a pickle.
      metadata: safetensors metadata of the weight file.
      side_files: every other file, `adapter_config.json` included.
    """

    folder: epath.Path
    config: dict[str, Any]
    lora: LoraConfig
    entries: dict[str, Entry]
    tensors: Mapping[str, safetensors_io.TensorInfo | np.ndarray]
    metadata: dict[str, str]
    side_files: tuple[str, ...]

    def read(self, key: str) -> np.ndarray:
        """Returns one tensor; InputError where it holds NaN or infinity."""
        tensor = self.tensors[key]
        if isinstance(tensor, safetensors_io.TensorInfo):
            return source.read_finite(tensor)
        source.refuse_non_finite(tensor, key, self.folder / PICKLED)
        return tensor


def open_adapter(folder: epath.PathLike, base: ModelConfig) -> Adapter:
    """Returns the adapter in a folder, checked against the base model it is for; weights are not read.

    Raises:
      InputError: wrong folder, unsupported settings, or tensors that are not exactly those the settings select.
    """
    folder = epath.Path(folder)
    if not (folder / CONFIG).exists():
        raise InputError(f"{folder}: has no {CONFIG}; name the folder of a PEFT adapter")
    config = source.read_json(folder / CONFIG)
    lora, selected = lora_config(config, base, str(folder / CONFIG))
    tensors, metadata, file = _weights(folder)
    entries = adapter_entries(dataclasses.replace(base, lora=lora), selected)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    mend = "use the adapter_config.json and the base model it was trained with"
    engine.check(entries, shapes, f"{folder / file} against {CONFIG}", mend)
    side_files = source.list_files(folder, leave_out={file})
    return Adapter(folder, config, lora, {name: entries[name] for name in tensors}, tensors, metadata, side_files)


def adapter_entries(config: ModelConfig, selected: frozenset[str] | None = None) -> dict[str, Entry]:
    """Returns PEFT name -> Entry of every tensor of the adapter `config.lora`.

    `selected` limits LoRA to these torch modules (`model.layers.0.self_attn.q_proj`); None takes every layer of every target.
    """
    lora = engine.lora_entries(config)
    if selected is not None:
        lora = {key: entry for key, entry in lora.items() if _module(key) in selected}
    return lora | engine.saved_entries(config, engine.base_entries(config))


def lora_config(config: Mapping[str, Any], base: ModelConfig, where: str) -> tuple[LoraConfig, frozenset[str]]:
    """Returns an `adapter_config.json` as a LoraConfig, and the torch modules its `target_modules` selects.

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
    strange = sorted(field for field in config.keys() - _UNUSED.keys() - _READ - _HARMLESS if config[field] is not None)
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
        raise InputError(f"{where}: r={rank!r} is not a rank; a whole number above 0 is wanted")
    for field, value in (("lora_alpha", alpha), ("lora_dropout", dropout)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{where}: {field}={value!r} is not a number")
    selected, targets = _select(config.get("target_modules"), base, where)
    saved = config.get("modules_to_save") or ()
    if isinstance(saved, str) or not all(isinstance(name, str) for name in saved):
        raise InputError(f"{where}: modules_to_save={saved!r} is not a list of names")
    lora = LoraConfig(rank, float(alpha or 0), bool(config.get("use_rslora", False)), float(dropout), targets, tuple(saved))  # type: ignore[arg-type]
    whole = engine.saved_entries(dataclasses.replace(base, lora=lora), engine.base_entries(base))
    absent = [name for name in saved if not any(engine.inside(key, name) for key in whole)]
    if absent:
        raise InputError(f"{where}: modules_to_save names {absent}, which this model does not have")
    return lora, selected


def _select(target: Any, base: ModelConfig, where: str) -> tuple[frozenset[str], tuple[str, ...]]:
    """Applies `target_modules` as PEFT does: a string is a regular expression for the whole name, a list names endings."""
    entries = engine.base_entries(dataclasses.replace(base, lora=None))
    rules = {rule.path: rule for rule in base_rules(base)}
    chosen = {key.removesuffix(".weight"): rules[entry.path] for key, entry in entries.items() if key.endswith(".weight")}
    if isinstance(target, str) and target != "all-linear":
        kept = _matching(target, list(chosen), where)
    elif isinstance(target, list) and target and all(isinstance(name, str) for name in target):
        kept = {name for name in chosen if any(name == end or name.endswith(f".{end}") for end in target)}
    else:
        raise InputError(f"{where}: target_modules={target!r} is not supported; a regular expression or a list of module names is wanted")
    chosen = {name: rule for name, rule in chosen.items() if name in kept}
    if not chosen:
        raise InputError(f"{where}: target_modules {target!r} selects no module of this model")
    unfit = [name for name, rule in chosen.items() if not rule.linear]
    if unfit:
        raise InputError(f"{where}: target_modules {target!r} selects {unfit[0]}, which is not a linear layer; LoRA there is not supported")
    return frozenset(chosen), tuple(dict.fromkeys(rule.module for rule in chosen.values()))


def _matching(pattern: str, names: list[str], where: str) -> set[str]:
    """Returns the names that a regular expression matches as a whole, as PEFT does.

    A pattern from a download may take longer than the universe lasts, and `re` cannot be stopped: it runs in a process of its own.
    """
    if len(pattern) > LONGEST_PATTERN:
        raise InputError(f"{where}: target_modules is a regular expression of {len(pattern):,} characters; list the module names instead")
    command = [sys.executable, "-I", "-S", "-c", _MATCH]
    try:
        done = subprocess.run(command, input=json.dumps([pattern, names]).encode(), capture_output=True, timeout=MATCH_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{where}: target_modules {pattern[:80]!r} takes over {MATCH_LIMIT_S:g} s to match; list the module names instead"
        ) from None
    if done.returncode:
        reason = " ".join(done.stderr.decode(errors="replace").split())[-200:] or f"status {done.returncode}"
        raise InputError(f"{where}: target_modules {pattern[:80]!r} is not a regular expression that can be used ({reason})")
    return set(json.loads(done.stdout))


def _weights(folder: epath.Path) -> tuple[Mapping[str, safetensors_io.TensorInfo | np.ndarray], dict[str, str], str]:
    if (folder / WEIGHTS).exists():
        tensors, metadata = safetensors_io.read_header(folder / WEIGHTS)
        odd = [name for name, info in tensors.items() if info.dtype not in safetensors_io.FLOATS]
        if odd:
            raise InputError(f"{folder / WEIGHTS}: {len(odd)} tensors are not floating point ({odd[0]}, ...); get the adapter again")
        return tensors, metadata, WEIGHTS
    if not (folder / PICKLED).exists():
        raise InputError(f"{folder}: has neither {WEIGHTS} nor {PICKLED}; download the adapter again")
    content = read_torch_file(folder / PICKLED)
    tensors = content.items() if isinstance(content, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(value, np.ndarray) and source.is_float(value.dtype) for name, value in tensors):
        raise InputError(f"{folder / PICKLED}: not a dict of floating-point tensors; get the adapter as safetensors")
    return content, {"format": "pt"}, PICKLED


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
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "inference_mode": True,
        "init_lora_weights": True,
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
        "revision": None,
        "target_modules": pattern,
        "task_type": "CAUSAL_LM",
        "use_rslora": lora.rslora,
    }
    return dict(sorted((unused | ours).items()))


def write_config(path: epath.Path, config: Mapping[str, Any]) -> None:
    """Writes `adapter_config.json`."""
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
