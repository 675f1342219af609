"""`omni-jax push`: the adapter as it was read, with a card that says what it is, to a Hub on loopback or a folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from omni_jax.api.publishing import model_card
from omni_jax.api.weights import open_model
from omni_jax.cli.main import main
from omni_jax.cli.status import BAD_INPUT, DONE
from omni_jax.conversion import to_jax
from omni_jax.retrieval import evaluate
from omni_jax.train import RunConfig
from omni_jax.train.workdir import WorkdirConfig
from tests.conversion.hub_server import Repository, asking, hub_on_loopback
from tests.golden_set import GoldenSet

NAMES = ["--repo", "me/my-adapter", "--base", "tsinghua-ee/WAVE-7B", "--data", "60 clips of one archive"]


@pytest.mark.costly
def test_golden_adapter_and_card_are_written_and_nothing_is_uploaded(
    golden: GoldenSet, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "adapter"
    assert main(["push", "--model", str(converted), *NAMES, "--license", "apache-2.0", "--out", str(out)]) == DONE
    assert f"hf upload me/my-adapter {out}" in capsys.readouterr().out
    weights = "adapter_model.safetensors"
    assert (out / weights).read_bytes() == (golden.adapter_dir / weights).read_bytes()
    card = (out / "README.md").read_text()
    assert card.startswith("---\nbase_model: tsinghua-ee/WAVE-7B\nlibrary_name: peft\n")
    for part in (
        *("license: apache-2.0", "# my-adapter", "60 clips of one archive", 'adapter="me/my-adapter"', "weight-normed"),
        *(f"rank {golden.spec['lora_r']}, alpha {golden.spec['lora_alpha']}", "The recipe is not recorded.", "No evaluation is recorded."),
    ):
        assert part in card


@pytest.mark.jit
def test_golden_a_card_states_recipe_and_the_newest_results(converted: Path, tmp_path: Path):
    source = open_model(converted)
    run = RunConfig.from_config(
        {"model": {"base": "b"}, "data": {"train": "d"}, "batch": {"micro_batch": 8, "micro_batches": 3}, "steps": 9}
    )
    config = WorkdirConfig(run.to_json(), source.config, "b", {}, 9)
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    rows = np.random.default_rng(0).normal(size=(3, 20, 8)).astype(np.float32)
    result = evaluate(dict(zip(("text", "video", "audio"), rows, strict=True)), resamples=0)
    for step, n in ((3, 1), (6, 20), (9, 1)):
        (tmp_path / "evaluations" / f"{step}.json").write_text(json.dumps(result | {"n": n}))
    trained = dataclasses.replace(source, home=epath.Path(tmp_path), run=config, step=7)
    card = model_card(trained, repo="me/a", base="b/c", data="clips")
    assert "| steps | 7 of 9 |" in card and "| clips a step | 24 |" in card and "| losses | " in card and "temperature=0.01" in card
    assert "After 6 steps, on 20 held-out clips, in percent" in card
    assert f"| t2v | {result['directions']['t2v']['R@1']:.2f} |" in card and f"| AVG-single | {result['AVG-single']:.2f} |" in card
    assert "license:" not in card


@pytest.mark.costly
def test_golden_an_upload_is_one_commit_and_can_be_loaded_by_its_name(
    golden: GoldenSet, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["push", "--model", str(converted), *NAMES]
    with hub_on_loopback({}) as hub:
        with asking(hub, tmp_path):
            assert main(command) == BAD_INPUT
        assert capsys.readouterr().err.endswith(
            "omni-jax: me/my-adapter: the Hub does not allow it (401); log in with 'hf auth login' or set HF_TOKEN to a token that may "
            "write there\n"
        )
        with asking(hub, tmp_path, HF_TOKEN="hf_x"):
            assert main(command) == DONE
        found = hub.repositories["me/my-adapter"]
    assert isinstance(found, Repository)
    assert found.files["adapter_model.safetensors"] == (golden.adapter_dir / "adapter_model.safetensors").read_bytes()
    assert b"base_model: tsinghua-ee/WAVE-7B" in found.files["README.md"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--repo", "adapter"], "--repo adapter: is not a name on the Hub; write owner/name"),
        (["--base", "a/b/c"], "--base a/b/c: is not a name on the Hub"),
        (["--data", " "], "--data: is empty"),
    ],
)
def test_names_that_are_none_are_refused(changes: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    assert main(["push", "--model", "m", *NAMES, *changes]) == BAD_INPUT
    assert words in capsys.readouterr().err


def test_golden_a_model_without_an_adapter_is_refused(golden: GoldenSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    to_jax(golden.checkpoint, tmp_path / "plain")
    assert main(["push", "--model", str(tmp_path / "plain"), *NAMES, "--out", str(tmp_path / "out")]) == BAD_INPUT
    assert "has no adapter to publish; export the whole model with omni-jax convert to-torch --base-out" in capsys.readouterr().err
