"""Public names of a package that are loaded when first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from omni_jax.config.extras import advice


def loaded_when_used(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns `__getattr__` and `__dir__` of a package, which lists `__all__`, or these names where it has none.

    Args:
      package: its dotted name.
      homes: module of the package -> the names it gives, separated by spaces; a module that gives its own name is public itself.

    The first raises AttributeError for other names, and ModuleNotFoundError that names the extra where a package of one is missing.
    """
    home = {name: module for module, names in homes.items() for name in names.split()}

    def load(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(f"{package}.{home[name]}")
        except ModuleNotFoundError as e:
            if line := advice(e.name):
                raise ModuleNotFoundError(line, name=e.name) from None
            raise
        return module if home[name] == name else getattr(module, name)

    return load, lambda: sorted(getattr(sys.modules[package], "__all__", home))
