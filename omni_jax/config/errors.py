"""What every record of a configuration refuses with."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field and the remedy."""


def check_divides(name: str, divisor: int, of_name: str, value: int) -> None:
    if divisor <= 0 or value % divisor:
        raise ConfigError(f"{name} ({divisor}) must divide {of_name} ({value})")


def check_fields(record: Any, what: str, names: str, fits: Callable[[Any], bool], rule: str) -> None:
    """Raises ConfigError, "WHATname=value: RULE", for the first of a record's fields (names with spaces between) that does not fit."""
    for name in names.split():
        if not fits(value := getattr(record, name)):
            raise ConfigError(f"{what}{name}={value!r}: {rule}")


def check_choices(record: Any, what: str, **allowed: Collection[str]) -> None:
    """Raises ConfigError for the first field of a record that is none of what is allowed for it."""
    for name, choices in allowed.items():
        check_fields(record, what, name, choices.__contains__, f"choose one of {', '.join(filter(None, choices))}")


def positive(value: float) -> bool:
    return math.isfinite(value) and value > 0
