"""pyproject.toml, lock files and imports agree: what is declared is used, what is used is declared, and bounds are tested."""

from __future__ import annotations

import re
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from omni_jax.config import extras
from tests.repository import PRODUCT, ROOT, imports, sources

MODULES = {
    "absl-py": "absl",
    "etils": "etils",
    "jinja2": "jinja2",
    "ml-collections": "ml_collections",
    "orbax-checkpoint": "orbax",
    "pillow": "PIL",
    "tensorflow-datasets": "tensorflow_datasets",
}
"""Packages whose modules have other names than they."""

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TRAIN = [Requirement(line) for line in PROJECT["optional-dependencies"]["train"]]
SERVE = [Requirement(line) for line in PROJECT["optional-dependencies"]["serve"]]
DECLARED = {r.name.lower(): r for r in [*map(Requirement, PROJECT["dependencies"]), *TRAIN, *SERVE]}
OPTIONAL = {Requirement(line).name for lines in PROJECT["optional-dependencies"].values() for line in lines}


def pins(lock: str) -> dict[str, str]:
    """Returns package -> version of a lock file."""
    found = re.findall(r"^([A-Za-z0-9_.-]+)==([A-Za-z0-9_.]+)", (ROOT / lock).read_text(), re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in found}


def test_the_product_imports_what_it_declares_and_nothing_else() -> None:
    used = (
        {found.name.split(".")[0] for file in sources(*PRODUCT) for found in imports(file)}
        - set(sys.stdlib_module_names)
        - {*PRODUCT, "tests"}
    )
    declared = {MODULES.get(name, name.replace("-", "_")) for name in DECLARED}
    optional = {"faiss", "libtpu", "torch", "peft"} | {name.replace("-", "_") for name in OPTIONAL}
    assert declared - used == set(), "declared, and no product file imports it"
    assert used - declared - optional - {"numpy"} == set(), "imported, and not declared"


def test_a_missing_package_of_training_is_one_line_that_names_the_extra() -> None:
    assert sorted(extras.TRAIN) == sorted(MODULES.get(r.name, r.name.replace("-", "_")) for r in TRAIN)
    assert all(str(extras.advice(f"{name}.part")).endswith("run pip install 'omni-jax[train]'") for name in extras.TRAIN)
    assert extras.advice("omni_jax.nowhere") is extras.advice(None) is extras.lacking() is None


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-newest.lock", "requirements-lowest.lock"])
def test_pins_lie_within_the_declared_ranges(lock: str) -> None:
    pinned = pins(lock)
    out = [f"{name} {pinned[name]}" for name, r in DECLARED.items() if name in pinned and not r.specifier.contains(pinned[name])]
    assert out == []
    if lock != "requirements-lowest.lock":  # which lies on top of requirements.lock
        assert DECLARED.keys() - pinned.keys() == set()


def test_extras_that_are_tested_in_the_reference_environment_are_pinned_there_within_their_ranges() -> None:
    pinned = pins("requirements.lock") | pins("requirements-reference.lock")
    extras_there = ("gcs", "s3", "mteb", "sentence-transformers", "reference")
    wanted = [Requirement(line) for name in extras_there for line in PROJECT["optional-dependencies"][name]]
    assert [f"{r} {pinned.get(r.name)}" for r in wanted if not r.specifier.contains(pinned.get(r.name, "0"))] == []


def test_lower_bounds_are_what_is_tested_as_lowest() -> None:
    pinned = pins("requirements.lock") | pins("requirements-lowest.lock")
    for name, requirement in DECLARED.items():
        (lowest,) = [s.version for s in requirement.specifier if s.operator == ">="]
        parts = [*map(int, lowest.split("."))], [*map(int, pinned[name].split("."))]
        assert parts[1][: len(parts[0])] == parts[0] and not any(parts[1][len(parts[0]) :]), (
            f"{name}: {lowest} allowed, {pinned[name]} tested"
        )
