"""What every record of a configuration refuses with."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field and the remedy."""


def check_divides(name: str, divisor: int, of_name: str, value: int) -> None:
    if divisor <= 0 or value % divisor:
        raise ConfigError(f"{name} ({divisor}) must divide {of_name} ({value})")
