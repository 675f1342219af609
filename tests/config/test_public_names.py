"""Names of a package that are loaded when first used."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

import omni_jax
from omni_jax import conversion, train
from omni_jax.config.public_names import loaded_when_used


@pytest.mark.parametrize("package", [omni_jax, train, conversion])
def test_a_package_lists_its_public_names_and_gives_each(package) -> None:
    assert dir(package) == sorted(getattr(package, "__all__", dir(package)))
    assert dir(package) and all(getattr(package, name) is not None for name in dir(package))
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nonsense'"):
        _ = package.nonsense


def test_what_documented_examples_import_is_public_to_type_checkers() -> None:
    """The wheel is typed: a name that a package imports is private unless `__all__` has it."""
    root = Path(__file__).resolve().parents[2]
    found = 0
    for file in [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("docs/**/*.ipynb")]:
        for name, given in re.findall(r"from (omni_jax[.\w]*) import (\w+(?:, \w+)*)", file.read_text()):
            if (root / name.replace(".", "/") / "__init__.py").is_file():
                assert set(given.split(", ")) <= set(importlib.import_module(name).__all__), file
                found += 1
    assert found


def test_a_name_that_needs_a_missing_package_of_training_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    load, _ = loaded_when_used("omni_jax.train", {"optimizer": "OptimizerConfig"})
    monkeypatch.delitem(sys.modules, "omni_jax.train.optimizer", raising=False)
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(ModuleNotFoundError, match=r"^optax is not installed; .*run pip install 'omni-jax\[train\]'$"):
        load("OptimizerConfig")
