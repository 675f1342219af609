"""The golden checkpoint, converted through the command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from omni_jax.cli.main import main
from omni_jax.config import Preset
from tests.golden_set import GoldenSet


@pytest.fixture(scope="session")
def converted(golden: GoldenSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint with its adapter as a folder for omni_jax."""
    out = tmp_path_factory.mktemp("converted") / "model"
    assert main(["convert", "to-jax", "--base", str(golden.checkpoint), "--adapter", str(golden.adapter_dir), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def settings(golden: GoldenSet) -> list[str]:
    """`--set` arguments that make the training preset the one of the golden set."""
    names = [field.name for field in dataclasses.fields(Preset) if field.name in golden.spec]
    return [part for name in names for part in ("--set", f"{name}={getattr(golden.preset, name)}")]
