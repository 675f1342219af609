"""The many names under which other programs save the same tensors, each taken back to that of `conversion.rules`.

Wrappers put something before every name (DataParallel, torch.compile, PEFT, a whole Qwen2.5-Omni), transformers 5 nests its modules
otherwise, and torch has two spellings of a weight norm. A name that none of these explains stays as it is, to be refused by name.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping

from omni_jax.conversion.rules import DROPPED_PREFIXES, PEFT_PREFIX, THINKER_PREFIX
from omni_jax.types import InputError

WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_forward_module.", PEFT_PREFIX, THINKER_PREFIX)
"""What wrappers put before every name."""

_INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "base_layer.")
"""What wrappers of single modules put inside a name."""

_DECODER = ("layers.", "embed_tokens.", "norm.")
_ROOTS = (
    *(f"model.{part}" for part in _DECODER),
    *"lm_head. audio_tower. visual. beats. beats_ln. beats_proj. classify_linear.".split(),
)

OLD_NORM, NEW_NORM = ("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1")
"""Length and direction of a weight norm: `torch.nn.utils.weight_norm`, and `torch.nn.utils.parametrizations.weight_norm`."""

_BUFFERS = re.compile(
    r"(.*\.)?(rotary_emb|rotary_pos_emb)\.(original_)?inv_freq|(.*\.)?position_ids|(.*\.)?audio_tower\.positional_embedding\.positional_embedding"
)

OPTIONAL = ("lm_head.weight", "audio_tower.audio_bos_eos_token.weight")
"""Tensors that a checkpoint may lack: no embedding depends on them."""


@dataclasses.dataclass(frozen=True)
class Names:
    """What the tensors of a checkpoint are.

    Attributes:
      sources: name in the rules -> name in the checkpoint.
      dropped: names of the parts that speak.
      buffers: names of tables that the model computes by itself.
    """

    sources: dict[str, str]
    dropped: tuple[str, ...]
    buffers: tuple[str, ...]


def read_names(names: Iterable[str], where: str) -> Names:
    """Returns what the names of a checkpoint mean.

    Raises:
      InputError: two names of one tensor, or LoRA matrices among them.
    """
    names = list(names)
    lora = [name for name in names if ".lora_A." in name or ".lora_B." in name]
    if lora:
        raise InputError(f"{where}: holds LoRA matrices ({lora[0]}); merge them in PEFT, or save base and adapter apart")
    whole = any(_unwrapped(name, but=THINKER_PREFIX).startswith(THINKER_PREFIX) for name in names)
    dropped = [name for name in names if whole and _unwrapped(name).startswith(DROPPED_PREFIXES)]
    buffers = [name for name in names if _BUFFERS.fullmatch(name) and name not in dropped]
    found, left_out = collections.defaultdict(list), {*dropped, *buffers}
    for name in names:
        if name not in left_out:
            found[canonical(name)].append(name)
    return Names(_one_each(found, where), tuple(dropped), tuple(buffers))


def _one_each(found: Mapping[str, list[str]], where: str) -> dict[str, str]:
    """Returns the one name of each tensor. Raises InputError where one has two."""
    doubled = [f"{key} as {' and '.join(of)}" for key, of in found.items() if len(of) > 1]
    if doubled:
        raise InputError(f"{where}: {len(doubled)} tensors have two names ({doubled[0]}); keep the right ones and remove the others")
    return {key: of[0] for key, of in found.items()}


def canonical(name: str) -> str:
    """Returns the name in the rules of a tensor or module; the name itself where it is not one of theirs."""
    short = _unwrapped(name)
    for part in _INSIDE:
        short = short.replace(f".{part}", ".")
    for old, new in zip(OLD_NORM, NEW_NORM, strict=True):
        short = short.removesuffix(new) + old if short.endswith(f".{new}") else short
    while not short.startswith(_ROOTS):
        if short.startswith("model."):
            short = short.removeprefix("model.")
        elif short.startswith("language_model."):
            short = short.removeprefix("language_model.")
            short = f"model.{short}" if short.startswith(_DECODER) else short
        elif short.startswith(WRAPPERS):
            short = _unwrapped(short)
        else:
            return name
    return short


def is_known(name: str) -> bool:
    """Whether a name begins as one in the rules."""
    return name.startswith(_ROOTS)


@dataclasses.dataclass(frozen=True)
class AdapterNames:
    """What the tensors of an adapter are.

    Attributes:
      sources: name as PEFT saves it -> name in the file.
      copies: names of the base's own modules beside those that were trained whole.
      spelled: name of a module in the rules -> its name in the program that wrote the file.
    """

    sources: dict[str, str]
    copies: tuple[str, ...]
    spelled: Callable[[str], str]


def read_adapter_names(names: Iterable[str], where: str) -> AdapterNames:
    """Returns what the names of an adapter's file mean, `.default.` and the like included.

    Raises:
      InputError: several adapters in one file, or two names of one tensor.
    """
    copies = tuple(name for name in names if ".original_module." in name)
    found, adapters = collections.defaultdict(list), {}
    for name in names:
        if name not in copies:
            key, adapter = _adapter_key(name)
            found[key].append(name)
            if adapter is not None:
                adapters.setdefault(adapter, name)
    if len(adapters) > 1:
        raise InputError(f"{where}: holds {len(adapters)} adapters ({', '.join(adapters)}); save one of them alone (save_pretrained)")
    sources = _one_each(found, where)
    own = {
        key.removeprefix(PEFT_PREFIX).rsplit(".lora_", 1)[0]: name.removeprefix(PEFT_PREFIX).rsplit(".lora_", 1)[0]
        for key, name in sources.items()
        if ".lora_" in key
    }
    usual = max(_SPELLINGS, key=lambda spell: sum(spell(module) == name for module, name in own.items()))
    return AdapterNames(sources, copies, lambda module: own.get(module) or usual(module))


def _adapter_key(name: str) -> tuple[str, str | None]:
    """Returns a tensor's name as PEFT saves it, and the adapter that its own name says."""
    if lora := re.fullmatch(r"(.+)\.lora_([AB])(?:\.([^.]+))?\.weight", name):
        module = canonical(f"{lora[1]}.weight").removesuffix(".weight").removeprefix(PEFT_PREFIX)
        return f"{PEFT_PREFIX}{module}.lora_{lora[2]}.weight", lora[3]
    if saved := re.fullmatch(r"(.+?)\.modules_to_save\.([^.\d][^.]*)\.(.+)", name):
        return PEFT_PREFIX + canonical(f"{saved[1]}.{saved[3]}").removeprefix(PEFT_PREFIX), saved[2]
    return PEFT_PREFIX + canonical(name).removeprefix(PEFT_PREFIX), None


def _nested(module: str) -> str:
    """The name of a module in transformers 5, where what WAVE adds stays outside as the output layer does."""
    if module.startswith("model."):
        return f"model.language_model.{module.removeprefix('model.')}"
    return f"model.{module}" if module.startswith(("visual.", "audio_tower.")) else module


_SPELLINGS: tuple[Callable[[str], str], ...] = (
    str,
    _nested,
    lambda module: THINKER_PREFIX + module,
    lambda module: THINKER_PREFIX + _nested(module),
)


def with_norm(name: str, style: str) -> str:
    """Returns the name of a tensor in the spelling of weight norms "old" or "new"; in "keep" as it is."""
    pairs = {"old": (NEW_NORM, OLD_NORM), "new": (OLD_NORM, NEW_NORM), "keep": ((), ())}[style]
    for there, here in zip(*pairs, strict=True):
        if name.endswith(f".{there}"):
            return name.removesuffix(there) + here
    return name


def _unwrapped(name: str, but: str = "") -> str:
    wrappers = [prefix for prefix in WRAPPERS if prefix != but]
    while prefix := next((prefix for prefix in wrappers if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name
