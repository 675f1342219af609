"""Plain values to a frozen record, each field checked against its annotation: from a config file to the run."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from omni_jax.config import ConfigError

T = TypeVar("T")

WORDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def record_of(kind: type[T], values: Any, where: str = "", **given: Any) -> T:
    """Returns `kind(**values)`, nested records included; `given` are fields that the values must not set.

    A whole number stands for a float, a list for a tuple; nothing else is converted.

    Raises:
      ConfigError: naming the field that is unknown, missing or of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"config {where or 'file'}: must hold fields, not {values!r}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.name not in given}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise ConfigError(f"config field {_dotted(where, name)}: unknown; choose among {', '.join(fields)}")
    for name, field in fields.items():
        bare = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if bare and name not in values:
            raise ConfigError(f"config field {_dotted(where, name)}: missing")
    try:
        return kind(**{name: _value(hints[name], value, _dotted(where, name)) for name, value in values.items()}, **given)
    except ConfigError as e:
        raise e if str(e).startswith("config ") else ConfigError(f"config {where}: {e}" if where else str(e)) from None


def _value(kind: Any, value: Any, where: str) -> Any:
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in options:
            return None
        return _value(next(option for option in options if option is not type(None)), value, where)
    if dataclasses.is_dataclass(kind):
        return record_of(kind, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or (options[-1] is not Ellipsis and len(value) != len(options)):
            raise _wrong(where, value, "a list")
        inner = [options[0]] * len(value) if options[-1] is Ellipsis else options
        return tuple(_value(one, item, where) for one, item in zip(inner, value, strict=True))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong(where, value, "fields")
        return dict(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _wrong(where, value, WORDS.get(kind, kind.__name__))
    return value


def _wrong(where: str, value: Any, wanted: str) -> ConfigError:
    return ConfigError(f"config field {where}={value!r}: must be {wanted}")


def _dotted(where: str, name: str) -> str:
    return f"{where}.{name}" if where else str(name)
