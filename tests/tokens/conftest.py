"""The tokenizer and configuration of the golden checkpoint, once for all tests of this package."""

from __future__ import annotations

import pytest

from omni_jax.config import BeatsConfig, ModelConfig
from omni_jax.tokens.tokenizer import Tokenizer
from tests.golden_set import GoldenSet


@pytest.fixture(scope="session")
def tokenizer(golden: GoldenSet) -> Tokenizer:
    return Tokenizer.from_pretrained(golden.checkpoint)


@pytest.fixture(scope="session")
def config(golden: GoldenSet) -> ModelConfig:
    return ModelConfig.from_hf(golden.config, BeatsConfig())
