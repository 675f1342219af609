"""Encoders that several test files of this package test."""

from __future__ import annotations

from pathlib import Path

import pytest

from omni_jax import conversion
from omni_jax.model import Encoder, abstract_encoder, with_params
from tests.golden_set import GoldenSet
from tests.model import builders
from tests.model.reference import Weights


@pytest.fixture(scope="session")
def odd() -> tuple[Encoder, Weights]:
    """An encoder of odd sizes, and its weights in float64."""
    return builders.random_encoder(builders.ODD)


@pytest.fixture(scope="session")
def golden_base(golden: GoldenSet, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """The golden checkpoint, converted and loaded, float32."""
    folder = tmp_path_factory.mktemp("golden") / "base"
    conversion.to_jax(golden.checkpoint, folder)
    return loaded(folder)


@pytest.fixture(scope="session")
def golden_adapted(golden: GoldenSet, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """The golden checkpoint with its adapter, converted and loaded, float32; the adapter is kept apart."""
    folder = tmp_path_factory.mktemp("golden") / "adapted"
    conversion.to_jax(golden.checkpoint, folder, adapter=golden.adapter_dir)
    return loaded(folder)


def loaded(folder: Path) -> Encoder:
    config, params = conversion.load(folder, dtype="float32")
    return with_params(abstract_encoder(config), params)
