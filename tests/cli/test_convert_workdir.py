"""`omni-jax convert to-torch` on the workdir of a training run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from omni_jax import conversion
from omni_jax.api.saving import save_model
from omni_jax.api.weights import base_digests, load_params, open_model
from omni_jax.cli.main import build_parser, main
from omni_jax.cli.model_arguments import choose_preset
from omni_jax.config import ModelConfig, preset
from omni_jax.configs import tiny
from omni_jax.conversion.folder import read_manifest
from omni_jax.objectives import SCALARS
from omni_jax.train import RunConfig, TrainableConfig
from omni_jax.train.checkpoint import Checkpoints
from omni_jax.train.state import new_state
from omni_jax.train.trainable import select
from omni_jax.train.workdir import WorkdirConfig, claim_workdir
from omni_jax.types import InputError
from tests.conversion import checkpoints
from tests.conversion.test_round_trip import beats_file
from tests.conversion.test_trained import trained
from tests.tolerances import assert_close

pytestmark = pytest.mark.jit

LORA = checkpoints.model_config(lora=checkpoints.LORA)


def workdir(root: Path, config: ModelConfig, recipe: str, *steps: int) -> Path:
    """Makes the workdir of a run that learned its temperature; leaves of step n are n times those of `trained`. Returns it."""
    source = checkpoints.write_base(root / "source", checkpoints.tensors(checkpoints.model_config()))
    beats_file(source / "BEATs.pt")
    conversion.to_jax(source, root / "model")
    digests = {**base_digests(read_manifest(root / "model")), "clips": "c"}
    run = RunConfig.from_config(tiny.get_config()).to_json()
    (root / "run").mkdir()
    claim_workdir(root / "run", WorkdirConfig(run, config, str(root / "model"), digests, 10))
    leaves = trained(config, recipe=recipe)
    assert {"/".join(path) for path in leaves} == select(config, TrainableConfig(recipe=recipe))
    saved = Checkpoints(root / "run" / "checkpoints", 3)
    for step in steps:
        arrays = {"/".join(path): jnp.asarray(leaf * step) for path, leaf in leaves.items()}
        state = new_state({**arrays, SCALARS["temperature"].path: jnp.zeros(())}, optax.sgd(1.0), 0)
        saved.save(dataclasses.replace(state, step=jnp.int32(step)))
    saved.close()
    return root / "run"


def test_a_run_becomes_an_adapter_and_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = workdir(tmp_path, LORA, "adapter", 2, 5)
    leaves = trained(LORA)
    for step, options in ((5, []), (2, ["--step", "2"])):
        out = tmp_path / f"adapter{step}"
        assert main(["convert", "to-torch", "--model", str(run), "--adapter-out", str(out), *options]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert len(printed) == 1 and f"adapter{step} (step {step}): " in printed[0]
        back = ["--base", str(tmp_path / "source"), "--adapter", str(out), "--out", str(tmp_path / f"back{step}")]
        assert main(["convert", "to-jax", *back]) == 0
        capsys.readouterr()
        config, params = conversion.load(tmp_path / f"back{step}")
        assert config == LORA
        for path, leaf in leaves.items():
            assert_close(params[path], leaf * np.float32(step), "round_trip")


def test_what_trained_and_is_not_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that trained everything and LoRA: an adapter cannot hold towers, a base without adapter has no LoRA."""
    run, leaves = workdir(tmp_path, LORA, "all", 1), trained(LORA, recipe="all")
    values = {part: sum(leaf.size for path, leaf in leaves.items() if path[0] == part) for part in ("vision", "head")}
    capsys.readouterr()
    assert main(["convert", "to-torch", "--model", str(run), "--adapter-out", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().err
    assert (
        f"vision ({values['vision']:,} values)" in said and "--base-out writes them" in said and "lora" not in said and "head" not in said
    )
    assert main(["convert", "to-torch", "--model", str(run), "--base-out", str(tmp_path / "b")]) == 0
    said = capsys.readouterr().err
    assert "lora (" in said and f"head ({values['head']:,} values)" in said and "--adapter-out writes them" in said and "vision" not in said
    both = ["--base-out", str(tmp_path / "c"), "--adapter-out", str(tmp_path / "d")]
    assert main(["convert", "to-torch", "--model", str(run), *both]) == 0
    assert "not written" not in capsys.readouterr().err


def test_a_run_that_trained_everything_becomes_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = checkpoints.model_config()
    run, out = workdir(tmp_path, config, "all", 1), tmp_path / "out"
    assert main(["convert", "to-torch", "--model", str(run), "--base-out", str(out)]) == 0
    assert main(["convert", "to-jax", "--base", str(out), "--out", str(tmp_path / "back")]) == 0
    _, params = conversion.load(tmp_path / "back")
    for path, leaf in trained(config, recipe="all").items():
        assert_close(params[path], jnp.asarray(leaf).astype(params[path].dtype), "round_trip")
    capsys.readouterr()
    assert main(["convert", "to-torch", "--model", str(run), "--adapter-out", str(tmp_path / "adapter")]) == 2
    assert "trained no adapter" in capsys.readouterr().err
    assert main(["convert", "to-torch", "--model", str(run), "--base-out", str(out), "--step", "7"]) == 2
    assert "no checkpoint of step 7; choose one of 1" in capsys.readouterr().err
    assert main(["convert", "to-torch", "--model", str(tmp_path / "model"), "--base-out", str(out), "--step", "7"]) == 2
    assert "a step was asked for" in capsys.readouterr().err


def test_a_workdir_is_read_as_it_was_trained(tmp_path: Path) -> None:
    """embed takes the preset of the run; a converted folder's is the backbone's."""
    run = workdir(tmp_path, LORA, "adapter", 1)
    trained_with = RunConfig.from_config(tiny.get_config()).data.resolved_preset()
    parser = build_parser("embed")
    usual = ["embed", "--model", str(run), "--manifest", "m.jsonl", "--out", "o.npz"]
    source = open_model(run)
    assert choose_preset(parser.parse_args(usual), source) == trained_with != preset("training")
    assert choose_preset(parser.parse_args([*usual, "--set", "frames=2"]), source) == trained_with.override(["frames=2"])
    assert choose_preset(parser.parse_args([*usual, "--preset", "training"]), source) == preset("training")
    assert open_model(tmp_path / "model").preset == preset("training")


def test_a_trained_model_is_saved_as_a_folder_of_its_own(tmp_path: Path) -> None:
    run = workdir(tmp_path, LORA, "adapter", 2)
    save_model(open_model(run), tmp_path / "saved")
    saved, source = open_model(tmp_path / "saved"), open_model(run)
    assert (saved.step, saved.config) == (None, source.config)
    before, after = load_params(source, jnp.float32), load_params(saved, jnp.float32)
    assert before.keys() == after.keys()
    for path, value in before.items():
        assert_close(after[path], value, "round_trip")
    assert {p.name for p in tmp_path.iterdir()} == {"source", "model", "run", "saved"}
    save_model(saved, tmp_path / "copy")
    assert read_manifest(tmp_path / "copy") == read_manifest(tmp_path / "saved")
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        save_model(saved, tmp_path / "copy")
