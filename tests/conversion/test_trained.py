"""What training made of a base, written for PyTorch and converted back, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from omni_jax import conversion
from omni_jax.config import ModelConfig
from omni_jax.conversion.engine import tree_shapes
from omni_jax.model import carried_shapes
from omni_jax.train import TrainableConfig
from omni_jax.train.trainable import is_lora, select
from omni_jax.types import InputError
from tests.conversion import checkpoints
from tests.conversion.test_round_trip import beats_file
from tests.tolerances import assert_close

ADAPTED = checkpoints.model_config(lora=checkpoints.LORA)
Leaves = dict[tuple[str, ...], np.ndarray]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = checkpoints.write_base(tmp_path_factory.mktemp("source") / "base", checkpoints.tensors(checkpoints.model_config()))
    beats_file(folder / "BEATs.pt")
    return folder


@pytest.fixture(scope="module")
def model(source) -> Path:
    """The base, bfloat16, converted without an adapter."""
    conversion.to_jax(source, source.parent / "model")
    return source.parent / "model"


def trained(config: ModelConfig, **choice) -> Leaves:
    """Random float32 leaves of everything that trains."""
    rng = np.random.default_rng(3)
    shapes = tree_shapes(config)
    paths = [tuple(name.split("/")) for name in sorted(select(config, TrainableConfig(**choice)))]
    return {path: rng.standard_normal(shapes[path]).astype(np.float32) for path in paths}


@pytest.mark.jit
def test_an_adapter_comes_back_bit_for_bit_and_its_base_is_untouched(tmp_path, source, model):
    leaves = trained(ADAPTED)
    done: list[tuple[int, int]] = []
    made = conversion.write_trained(
        model,
        ADAPTED,
        leaves,
        base_out=tmp_path / "base",
        adapter_out=tmp_path / "adapter",
        base_model="WAVE-7B",
        progress=lambda *at: done.append(at),
    )
    assert done[-1] == (made.parameters, made.parameters)
    assert checkpoints.files(tmp_path / "base", weights=True) == checkpoints.files(source, weights=True)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "WAVE-7B"
    assert {w.dtype for w in checkpoints.read_folder(tmp_path / "adapter").values()} == {np.dtype(np.float32)}

    conversion.to_jax(tmp_path / "base", tmp_path / "back", adapter=tmp_path / "adapter")
    config, params = conversion.load(tmp_path / "back")
    assert config == ADAPTED
    _, base = conversion.load(model)
    for path, array in params.items():
        assert_close(array, leaves.get(path, base.get(path)), "round_trip")


@pytest.mark.jit
@pytest.mark.parametrize("lora", [None, checkpoints.LORA], ids=["no adapter", "with adapter"])
def test_a_base_that_trained_whole_holds_its_weights_in_its_own_type(tmp_path, source, model, lora):
    config = checkpoints.model_config(lora=lora)
    leaves = trained(config, recipe="all")
    adapter = tmp_path / "adapter" if lora else None
    conversion.write_trained(model, config, leaves, base_out=tmp_path / "base", adapter_out=adapter)
    assert {w.dtype for w in checkpoints.read_folder(tmp_path / "base").values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert checkpoints.files(tmp_path / "base") == checkpoints.files(source)
    conversion.to_jax(tmp_path / "base", tmp_path / "back", adapter=adapter)
    _, params = conversion.load(tmp_path / "back")
    _, before = conversion.load(model)
    assert params.keys() == tree_shapes(config).keys() - carried_shapes(config).keys()
    for path, array in params.items():
        held = is_lora("/".join(path)) or (lora is not None and path[0] in ("head", "bridge"))
        assert_close(array, leaves[path] if held else leaves[path].astype(ml_dtypes.bfloat16), "round_trip")
    moved = [path for path in leaves if path in before and not np.array_equal(params[path], before[path])]
    assert {path[0] for path in moved} == {"vision", "audio", "beats", "bridge", "decoder", "head"}


@pytest.mark.costly
def test_what_the_run_left_frozen_of_an_adapter_is_taken_from_the_base(tmp_path, source):
    given = checkpoints.write_adapter(tmp_path / "given", ADAPTED)
    conversion.to_jax(source, tmp_path / "model", adapter=given)
    leaves = trained(ADAPTED, freeze=("decoder/layers/attn/q",))
    conversion.write_trained(tmp_path / "model", ADAPTED, leaves, adapter_out=tmp_path / "out")
    before, after = checkpoints.read_folder(given), checkpoints.read_folder(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, value in after.items():
        assert np.array_equal(value, before[name]) == ("q_proj" in name)


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, model):
    leaves, out = trained(ADAPTED), tmp_path / "out"
    some = {path: leaf for path, leaf in leaves.items() if path[-1] != "lora_a"}
    misshapen = {**leaves, ("head", "fc2", "bias"): np.zeros(3, np.float32)}
    wider = dataclasses.replace(ADAPTED, decoder=dataclasses.replace(ADAPTED.decoder, rms_norm_eps=1e-5))
    for config, given, expected in (
        (checkpoints.model_config(), {}, "trained no adapter"),
        (ADAPTED, some, r"has no decoder/layers/attn/k/lora_a, and the run did not train it"),
        (ADAPTED, misshapen, r"not the base of this run \(head/fc2/bias does not fit\)"),
        (ADAPTED, {("head", "fc9"): np.zeros(3)}, r"head/fc9 does not fit"),
        (wider, leaves, "the architectures differ"),
    ):
        with pytest.raises(InputError, match=expected):
            conversion.write_trained(model, config, given, adapter_out=out)
        assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="nothing to write"):
        conversion.write_trained(model, ADAPTED, leaves)
    with pytest.raises(InputError, match="one holds the other"):
        conversion.write_trained(model, ADAPTED, leaves, base_out=out, adapter_out=out / "adapter")
