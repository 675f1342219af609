"""Embeddings with int8 weights against the PyTorch reference in float32: how far they may turn away."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from omni_jax import conversion
from omni_jax.model import abstract_encoder, with_params
from omni_jax.model.runner import Runner
from omni_jax.tokens.buckets import Planner
from tests.golden_set import GoldenSet
from tests.model.golden_inputs import COMBINATIONS
from tests.model.test_golden_encoder import outputs
from tests.model.test_golden_nemotron import NAMES, embed, features, plan
from tests.tolerances import assert_close

pytestmark = [pytest.mark.jit, pytest.mark.exact]

KINDS = {"int8": "int8_embedding", "int8-dynamic": "int8_dynamic_embedding"}


@pytest.fixture(scope="module")
def adapted(golden: GoldenSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8") / "model"
    conversion.to_jax(golden.checkpoint, folder, adapter=golden.adapter_dir)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_golden_embeddings_with_int8_weights_keep_their_direction(golden: GoldenSet, adapted: Path, kind: str):
    config, params = conversion.load(adapted, dtype="float32", weights=kind)
    found = outputs(golden, with_params(abstract_encoder(config), params))
    for prompt in COMBINATIONS:
        got = np.stack([one.embed[prompt] for one in found])
        want = np.stack([golden.adapter[f"{clip}/embed/{prompt}"] for clip in range(golden.clips)])
        assert_close(got, want, KINDS[kind])
        with pytest.raises(AssertionError):  # it is no float32
            assert_close(got, want, "embed")


@pytest.mark.parametrize("kind", KINDS)
def test_golden_embeddings_of_the_second_backbone_with_int8_weights(golden_nemotron: GoldenSet, tmp_path: Path, kind: str):
    conversion.to_jax(golden_nemotron.checkpoint, tmp_path / "model")
    config, params = conversion.load(tmp_path / "model", dtype="float32", weights=kind)
    clips = features(golden_nemotron)
    found = embed(Runner(with_params(abstract_encoder(config), params)), plan(golden_nemotron, config, clips, Planner()))
    want = np.stack([golden_nemotron.base[f"{clip}/embed/{NAMES[table]}"] for clip, table in found])
    assert_close(np.stack(list(found.values())), want, KINDS[kind])
