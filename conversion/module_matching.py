"""Which modules of a model an `adapter_config.json` means, as PEFT reads it (0.21: check_target_module_exists, get_pattern_key)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from omni_jax.types import InputError

MATCH_LIMIT_S = 10.0
"""Seconds that the patterns of a field may take over the names of a model."""

LONGEST_PATTERN = 10_000
_MATCH = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
patterns, names = json.load(sys.stdin)
try:
    compiled = [re.compile(pattern) for pattern in patterns]
except (re.error, OverflowError, RecursionError, MemoryError) as e:
    sys.exit(str(e) or type(e).__name__)
first = {name: next((i for i, pattern in enumerate(compiled) if pattern.fullmatch(name)), None) for name in names}
print(json.dumps({name: i for name, i in first.items() if i is not None}))
"""

ALL_LINEAR = "all-linear"


def selected(config: Mapping[str, Any], modules: Mapping[str, bool], spelled: Callable[[str], str], where: str) -> set[str]:
    """Returns the modules that get LoRA.

    Args:
      modules: name -> whether it is a linear layer other than the output embedding.
      spelled: name of a module -> its name in the program that wrote the adapter.

    Raises:
      InputError: naming the field that is not understood.
    """
    target, of = config.get("target_modules"), {spelled(name): name for name in modules}
    if isinstance(target, str) and target.lower() == ALL_LINEAR:  # in any case, as in PEFT
        kept = {name for name in of if modules[of[name]]}
    elif isinstance(target, str):
        kept = set(_matching([target], list(of), where, "target_modules"))
    elif _is_names(target):
        kept = _ending(of, target)
    else:
        raise InputError(f"{where}: target_modules={target!r} is not supported; expected a regular expression or a list of module names")
    if config.get("layers_to_transform") not in (None, []):
        # A module that is listed by its whole name is meant in whichever layer it is.
        kept = _of_layers(kept, config, where) | (kept & set(target))
    elif config.get("layers_pattern"):
        raise InputError(f"{where}: layers_pattern={config['layers_pattern']!r} without layers_to_transform is not supported, as in PEFT")
    excluded, saved = config.get("exclude_modules"), config.get("modules_to_save") or ()
    if isinstance(excluded, str):
        kept -= set(_matching([excluded], list(of), where, "exclude_modules"))
    elif _is_names(excluded):
        kept -= _ending(of, excluded)
    elif excluded not in (None, []):
        raise InputError(f"{where}: exclude_modules={excluded!r} is not supported; expected a regular expression or a list of module names")
    # Modules saved whole get none; where nothing else is meant PEFT refuses to train, and no such adapter exists.
    apart = {name for name in kept if not any(f".{module}." in f".{name}." for module in saved)}
    return {of[name] for name in apart or kept}


def by_pattern(config: Mapping[str, Any], field: str, modules: Iterable[str], spelled: Callable[[str], str], where: str) -> dict[str, Any]:
    """Returns module -> value for the modules that a field {pattern: value} names; of several patterns the first that matches counts."""
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{where}: {field}={patterns!r} is not a table of module names; use the file as PEFT wrote it")
    if not patterns:
        return {}
    of = {spelled(name): name for name in modules}
    found = _matching([rf"(.*\.)?({pattern})" for pattern in patterns], list(of), where, field)
    values = list(patterns.values())
    return {of[name]: values[number] for name, number in found.items()}


def _of_layers(names: set[str], config: Mapping[str, Any], where: str) -> set[str]:
    wanted, pattern = config["layers_to_transform"], config.get("layers_pattern") or []
    wanted = wanted if isinstance(wanted, list) else [wanted]
    pattern = [pattern] if isinstance(pattern, str) else pattern
    if not all(type(number) is int for number in wanted):
        raise InputError(f"{where}: layers_to_transform={config['layers_to_transform']!r} is not a list of layer numbers")
    if not isinstance(pattern, list) or not all(isinstance(name, str) and re.fullmatch(r"[\w.]+", name) for name in pattern):
        raise InputError(f"{where}: layers_pattern={pattern!r} is not supported; expected the names of lists of layers")
    if isinstance(config["target_modules"], str):
        raise InputError(f"{where}: layers_to_transform with a regular expression as target_modules is not supported, as in PEFT")
    # The first number counts: that of the layer.
    found = [re.compile(rf"(?:^|.*?\.){re.escape(name)}\.(\d+)\.") for name in pattern] or [re.compile(r".*?\.[^.]*\.(\d+)\.")]
    numbers = {name: next((match[1] for one in found if (match := one.match(name))), None) for name in names}
    return {name for name, number in numbers.items() if number is not None and int(number) in wanted}


def _is_names(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _ending(names: Iterable[str], ends: Sequence[str]) -> set[str]:
    return {name for name in names if any(name == end or name.endswith(f".{end}") for end in ends)}


def _matching(patterns: list[str], names: list[str], where: str, field: str) -> dict[str, int]:
    """Returns name -> number of the first pattern that matches it as a whole.

    A pattern from a download may take longer than the universe lasts, and `re` cannot be stopped: it runs in a process of its own.
    """
    long = max(patterns, key=len)
    if len(long) > LONGEST_PATTERN:
        raise InputError(f"{where}: {field} is a regular expression of {len(long):,} characters; list the module names instead")
    command = [sys.executable, "-I", "-S", "-c", _MATCH]
    try:
        done = subprocess.run(command, input=json.dumps([patterns, names]).encode(), capture_output=True, timeout=MATCH_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise InputError(f"{where}: {field} {long[:80]!r} takes over {MATCH_LIMIT_S:g} s to match; list the module names instead") from None
    if done.returncode:
        reason = " ".join(done.stderr.decode(errors="replace").split())[-200:] or f"status {done.returncode}"
        raise InputError(f"{where}: {field} {long[:80]!r} is not a regular expression that can be used ({reason})")
    return json.loads(done.stdout)
