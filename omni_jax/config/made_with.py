"""The comparison of two records of what vectors, or a run, were made with."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from omni_jax.config.errors import ConfigError
from omni_jax.config.model import ModelConfig
from omni_jax.config.presets import Preset

ROUNDING = ("dtype", "precision", "code")
"""Fields of `omni_jax.api.made_with.made_with` that move a vector by rounding, or by what a new version corrects."""

HELD = ("model.weights", "model.kept")
"""Fields of it that say how matrices are held: int8 moves a vector further than rounding does, and leaves it near."""

_WEIGHTS = re.compile(r"weights\.(\w+) weights")  # "weights.base weights", as records have it: once is enough
_DIGEST = re.compile(r"(fingerprints:)?[0-9a-f]{32,}")


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every leaf of nested mappings under its dotted name; tuples become lists, as JSON has them."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, list(value) if isinstance(value, tuple) else value


def differences(there: Mapping[str, Any], here: Mapping[str, Any], free: Collection[str] = ()) -> list[str]:
    """Returns a phrase for every leaf that differs: "preset.fps is 1.0 there, 2.0 here", or "weights.base differs" for a digest.

    Args:
      there: of what was made before.
      here: of what is made now.
      free: dotted names, or heads of them, that may differ.
    """
    old, new = dict(flat(there)), dict(flat(here))
    found = []
    for name in sorted({*old, *new}):
        before, now = old.get(name), new.get(name)
        if before == now or any(name == head or name.startswith(f"{head}.") for head in free):
            continue
        digests = any(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (before, now))
        said = _WEIGHTS.sub(r"weights.\1", name)
        found.append(f"{said} differs" if digests else f"{said} is {before!r} there, {now!r} here")
    return found


def made_otherwise(there: Mapping[str, Any], here: Mapping[str, Any], free: Collection[str] = ()) -> list[str]:
    """Returns the `differences` of two records of `omni_jax.api.made_with.made_with`.

    A field that an older version did not know has its default there, which changes nothing.
    """
    return differences(_completed(there), _completed(here), free)


def held_otherwise(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Returns those of the `made_otherwise` differences that say how matrices are held: vectors of such models are near each other."""
    return [one for one in made_otherwise(there, here) if one.startswith(HELD)]


def recorded_preset(made_with: Mapping[str, Any]) -> Preset:
    """Returns the preset that embeddings were made with. Raises ConfigError where this version does not know it."""
    fields = made_with.get("preset")
    known = {field.name for field in dataclasses.fields(Preset)}
    if not isinstance(fields, Mapping) or not fields.keys() <= known:
        named = ", ".join(sorted(set(fields) - known)) if isinstance(fields, Mapping) else "none"
        raise ConfigError(f"embeddings made with preset fields that this version does not know ({named}); update omni_jax or embed again")
    try:
        return Preset(**fields)
    except TypeError as e:
        raise ConfigError(f"embeddings made with a preset that cannot be read ({e}); embed again") from None


def _completed(made_with: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(made_with)
    with contextlib.suppress(ConfigError):
        found["preset"] = dataclasses.asdict(recorded_preset(made_with))
    with contextlib.suppress(ConfigError, ValueError, KeyError, TypeError, AttributeError):
        found["model"] = ModelConfig.from_json(made_with["model"]).to_json()
    return found


def listed(found: Collection[str], most: int = 8) -> str:
    """Returns the first of some differences as one line that counts the others."""
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return "; ".join(list(found)[:most]) + more
