"""Training over an int8 base: gradients, what may resume, and what comes out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.api import OmniRetriever
from omni_jax.api.weights import load_params, open_model
from omni_jax.cli.main import main
from omni_jax.config import ConfigError, ModelConfig
from omni_jax.conversion.store import Store
from omni_jax.model import abstract_params, rounded_maps
from omni_jax.model.int8 import SCALE, restored, rounded
from omni_jax.parallel import make_mesh
from omni_jax.train import TrainableConfig, TrainStep, place_batch
from omni_jax.train.run_config import ModelSection
from omni_jax.train.trainable import is_lora, over_int8, select
from omni_jax.types import InputError
from tests.model.builders import random_value
from tests.tolerances import assert_close
from tests.train.random_batches import MODEL, QUICK, batch, recipe
from tests.train.tiny_run import command, environment, finish, make_files

HELD = over_int8(MODEL, TrainableConfig())
Params = dict[tuple[str, ...], Any]


def weights() -> tuple[Params, Params]:
    """Returns random weights with the frozen matrices in int8, and those that they stand for in float32."""
    plain: Params = {path: random_value("/".join(path), leaf.shape) for path, leaf in abstract_params(MODEL).items()}
    held = dict(plain)
    for path in rounded_maps(HELD):
        held[(*path, "kernel")], held[(*path, SCALE)] = q, scale = rounded(plain[(*path, "kernel")])
        plain[(*path, "kernel")] = restored(q, scale)
    return held, plain


def gradients(model: ModelConfig, params: Params, mesh: jax.sharding.Mesh | None = None) -> tuple[float, dict[str, np.ndarray]]:
    """Returns the loss and the first moments, a tenth of the gradient, of one update."""
    step = TrainStep(model, recipe(hn_audio_only=True, pairs="all"), dtype=jnp.float32, mesh=mesh, compiler_options=QUICK)
    state, frozen = step.init(params)
    assert {x.dtype for name, x in frozen.items() if name.endswith("/kernel")} >= ({jnp.dtype("int8")} if model is HELD else set())
    made = batch(step.config.losses, clips=8, blocks=4)
    state, metrics = step(state, frozen, made if mesh is None else place_batch(made, mesh))
    return float(metrics["loss"]), jax.device_get(next(s for s in state.optimizer if hasattr(s, "mu")).mu)


def test_the_frozen_matrices_are_int8_and_those_that_train_are_not():
    names = select(MODEL, TrainableConfig())
    assert select(HELD, TrainableConfig()) == names
    maps = {"/".join(path) for path in rounded_maps(HELD)}
    assert not {f"{path}/kernel" for path in maps} & names
    assert HELD.kept == ("bridge/fc1", "bridge/fc2", "head/fc1", "head/fc2") and "decoder/layers/attn/q" in maps


def test_parts_that_everything_trains_but_can_be_int8():
    config = over_int8(MODEL, TrainableConfig(recipe="all", freeze=("vision", "decoder/layers/mlp")))
    assert {path[0] for path in rounded_maps(config)} == {"vision", "decoder"}
    with pytest.raises(InputError, match=r"trainable\.recipe='all' every matrix trains; freeze some"):
        over_int8(MODEL, TrainableConfig(recipe="all"))


def test_what_rounds_on_the_fly_cannot_be_trained_over():
    with pytest.raises(ConfigError, match=r"config field model\.weights='int8-dynamic': choose one of keep, int8"):
        ModelSection(base="x", weights="int8-dynamic")


@pytest.mark.jit
def test_gradients_over_int8_are_those_over_what_it_stands_for_on_one_device_and_on_eight():
    held, plain = weights()
    loss, want = gradients(MODEL, plain)
    for mesh in (None, make_mesh(2, 2, 2)):
        found, got = gradients(HELD, held, mesh)
        assert_close(found, loss, "update_loss")
        assert got.keys() == want.keys()
        for name in filter(is_lora, want):
            assert np.abs(want[name]).max() > 0
            assert_close(got[name], want[name], "gradient_cache")


CHANGES = {"model__weights": "int8", "trainable__freeze": "('vision','audio','beats','decoder/layers')", "steps": 2}


@pytest.mark.slow
def test_a_run_over_int8_resumes_embeds_and_gives_its_base_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config, around = make_files(tmp_path), environment(tmp_path / "cache")
    run = tmp_path / "run"
    finish(command(config, run, **CHANGES), around)
    said = finish(command(config, run, **CHANGES), around)
    assert "resuming from step 2" in said
    refused = finish(command(config, run, **CHANGES | {"model__weights": "keep"}), around, status=2)
    assert "model.weights is 'int8' there, 'keep' here" in refused

    # A run of a version that did not know the field goes on as what it was.
    before = tmp_path / "before"
    finish(command(config, before, **CHANGES | {"model__weights": "keep"}), around)
    record = json.loads((before / "config.json").read_text())
    del record["run"]["model"]["weights"], record["model"]["weights"], record["model"]["kept"]
    (before / "config.json").write_text(json.dumps(record))
    assert "resuming from step 2" in finish(command(config, before, **CHANGES | {"model__weights": "keep"}), around)

    source = open_model(run)
    assert source.config.weights == "int8" and "head/fc1" in source.config.kept
    params = load_params(source)
    assert params["decoder", "layers", "attn", "q", "kernel"].dtype == jnp.int8
    assert params["head", "fc1", "kernel"].dtype == jnp.float32
    whole = load_params(open_model(run, weights="int8"))
    assert whole["head", "fc1", "kernel"].dtype == jnp.int8
    q, scale = rounded(source.read_trained()["head/fc1/kernel"])
    np.testing.assert_array_equal(whole["head", "fc1", "kernel"], q)
    np.testing.assert_array_equal(whole["head", "fc1", SCALE], scale)
    sound = (np.sin(np.arange(16000, dtype=np.float32) / 20), 16000)  # which goes through the head, as a caption does not
    one, other = (OmniRetriever.from_pretrained(run, weights=kind).encode(audios=[sound]) for kind in ("keep", "int8"))
    assert 0.99 < float((one * other).sum()) < 1

    # The base that stayed is the original, not its int8 form.
    assert main(["convert", "to-torch", "--model", str(run), "--base-out", str(tmp_path / "base")]) == 0
    assert main(["convert", "to-jax", "--base", str(tmp_path / "base"), "--out", str(tmp_path / "back")]) == 0
    capsys.readouterr()
    names = [n for n in Store(_weights(run / "base")).arrays if re.match(r"(vision|decoder\.layers)\.", n)]
    kept, back = (dict(Store(_weights(folder)).read(names)) for folder in (run / "base", tmp_path / "back"))
    for name in names:
        np.testing.assert_array_equal(kept[name], back[name])


def _weights(folder: Path) -> Any:
    from etils import epath

    return epath.Path(folder) / "weights"
