"""Encoders that several files of this room test."""

from __future__ import annotations

import pytest

from omni_jax.model import Encoder
from tests.model import builders
from tests.model.reference import Weights


@pytest.fixture(scope="session")
def odd() -> tuple[Encoder, Weights]:
    """An encoder of odd sizes, and its weights in float64."""
    return builders.random_encoder(builders.ODD)
