"""`omni-jax train`: what cannot be used is one line, before anything is computed."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path

import pytest

import omni_jax
from omni_jax.api.training import Outcome
from omni_jax.cli.config_file import read_config
from omni_jax.cli.main import main
from omni_jax.cli.status import BAD_INPUT, INTERRUPTED, STOPPED_AND_SAVED
from omni_jax.config import ConfigError
from omni_jax.conversion.folder import read_manifest
from omni_jax.types import InputError
from tests.repository import ROOT
from tests.train.tiny_run import CONFIG, make_files

TINY = str(ROOT / "configs" / "tiny.py")


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A config over a manifest of four clips whose files nobody has."""
    rows = [{"id": f"c{i}-0", "text": f"caption {i}", "video": f"{i}.mp4", "audio": f"{i}.mp4"} for i in range(16)]
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "run.py"
    path.write_text(CONFIG.format(shards=tmp_path / "clips.jsonl", held_out=""))
    return str(path)


def fails(capsys: pytest.CaptureFixture[str], workdir: Path, config: str, *changes: str) -> str:
    """Returns the one line that the command gives."""
    capsys.readouterr()
    assert main(["train", "--config", config, "--workdir", str(workdir), *changes]) == BAD_INPUT
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("omni-jax: ")]
    assert len(said) == 1
    return said[0]


@pytest.mark.jit
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--config.model.colour=red"], "config field model.colour: unknown; choose among base"),
        (["--config.losses.weight=1"], "config field losses.weight: unknown"),
        (["--config.batch.micro_batch=lots"], "config field batch.micro_batch='lots': must be a whole number"),
        (["--config.steps=2.5"], "config field steps=2.5: must be a whole number"),
        (["--config.seed"], "write --config.section.field=value"),
        (["--config..seed=1"], "--config..seed=1: write --config.section.field=value"),
        (["--config.model..base=x"], "write --config.section.field=value"),
        (["--config.=1"], "write --config.section.field=value"),
        (["--config.steps.deep=1"], "steps has no fields"),
        (["--config.batch.micro_batch=12"], "a micro-batch of 12 clips does not divide over 8 batch shards"),
        (["--config.mesh.data=3"], "needs 6 devices, 8 are here; change --config.mesh.data"),
        (["--config.mesh.data=3"], "on a CPU, JAX_NUM_CPU_DEVICES=3 in the environment shows as many"),
        (["--config.data.train=nowhere.jsonl"], "nowhere.jsonl"),
        (["--config.batch.micro_batch=64"], "16 clips are fewer than the 64 of a step"),
        (["--config.batch.blocks=8"], "has blocks of one clip; raise batch.micro_batch or lower batch.blocks"),
        (["--config.model.lora.rank=0"], "lora rank 0: must be 1 or more"),
        (["--config.model.lora.rank=2", "--config.model.lora.dropout=1.5"], "lora dropout 1.5"),
        (["--config.optimizer.b2=1.0"], "b2=1.0: must be at least 0 and below 1"),
        (["--config.model.architecture.vision.patch_size=16"], "patch"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, config: str, changes: list[str], message: str
) -> None:
    assert message in fails(capsys, tmp_path / "run", config, *changes)


def test_equal_captions_cannot_be_hard_negatives(capsys: pytest.CaptureFixture[str], tmp_path: Path, config: str) -> None:
    manifest = tmp_path / "clips.jsonl"
    rows = [json.loads(line) | {"text": "the same"} for line in manifest.read_text().splitlines()]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "all captions are equal" in fails(capsys, tmp_path / "run", config)


def test_a_workdir_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path, config: str) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in fails(capsys, tmp_path / "file" / "run", config)


def test_a_folder_of_other_things_stays_as_it_is(capsys: pytest.CaptureFixture[str], tmp_path: Path, config: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "is not empty (notes.txt)" in fails(capsys, tmp_path / "mine", config)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.costly
def test_weights_of_a_start_that_failed_are_drawn_again(capsys: pytest.CaptureFixture[str], tmp_path: Path, config: str) -> None:
    """The first start fails after its weights were drawn; the second has another architecture."""
    late = "--config.batch.micro_batch=64"
    fails(capsys, tmp_path / "run", config, late)
    assert read_manifest(tmp_path / "run" / "base").model.decoder.num_layers == 2
    fails(capsys, tmp_path / "run", config, late, "--config.model.architecture.decoder.num_layers=3")
    assert read_manifest(tmp_path / "run" / "base").model.decoder.num_layers == 3


def test_records_that_cannot_be_trained_on_are_told(capsys: pytest.CaptureFixture[str], tmp_path: Path, config: str) -> None:
    with (tmp_path / "clips.jsonl").open("a") as file:
        file.write('{"id": "text-only", "text": "no picture"}\nnot JSON\n')
    listed = tmp_path / "run" / "skipped_records.jsonl"
    for _ in range(2):  # a start that fails lists them, and is no obstacle to the next one
        capsys.readouterr()
        assert main(["train", "--config", config, "--workdir", str(tmp_path / "run"), "--config.batch.micro_batch=64"]) == BAD_INPUT
        said = capsys.readouterr().err
        assert f"2 records cannot be trained on, listed in {listed}; the first: " in said and "16 clips are fewer" in said
        assert [json.loads(line)["line"] for line in listed.read_text().splitlines()] == [18, 17]


@pytest.mark.parametrize(
    ("number", "status", "name"), [(signal.SIGTERM, STOPPED_AND_SAVED, "SIGTERM"), (signal.SIGINT, INTERRUPTED, "Ctrl-C")]
)
def test_a_stop_without_the_last_evaluation_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: str, number: int, status: int, name: str
) -> None:
    def stopped(*_: object) -> Outcome:
        signal.raise_signal(number)
        return Outcome(6, 6, finished=False)

    monkeypatch.setattr("omni_jax.api.training.run_training", stopped)
    assert main(["train", "--config", config, "--workdir", "run"]) == status
    wanted = f"stopped by {name}; all 6 steps are saved in run, the last evaluation is missing: run it again for it"
    assert wanted in capsys.readouterr().err.splitlines()


@pytest.mark.jit
def test_files_that_are_no_config(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "none.py").write_text("def get_config():\n    return None\n")
    (tmp_path / "raises.py").write_text("def get_config():\n    raise ValueError('two\\nlines')\n")
    (tmp_path / "imports.py").write_text("import no_such_module\n")
    wrong = {
        tmp_path / "absent.py": "no such config",
        tmp_path / "empty.py": "defines no get_config",
        f"{tmp_path / 'none.py'}:x": "0 positional",
        tmp_path / "none.py": "gave NoneType; it must give a ConfigDict",
        tmp_path / "raises.py": "raises.py: ValueError: two",
        tmp_path / "imports.py": "imports.py: ModuleNotFoundError: No module named",
    }
    for file, message in wrong.items():
        with pytest.raises(InputError, match=message) as caught:
            read_config(str(file))
        assert "\n" not in str(caught.value)


def test_a_packaged_config_is_found_by_name_and_a_file_of_the_same_name_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text("")
    assert read_config("omniretriever_7b") == read_config(str(ROOT / "configs" / "omniretriever_7b.py"))
    assert read_config("tiny:quick") == read_config(f"{TINY}:quick") != read_config("tiny")
    with pytest.raises(InputError, match=r"--config tiny\.py: defines no get_config"):
        read_config("tiny.py")
    with pytest.raises(InputError, match=r"--config tinny: no such config; name a Python file, or one of .*omniretriever_7b"):
        read_config("tinny")
    assert main(["train", "--list-configs"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == sorted(f.stem for f in (ROOT / "configs").glob("*.py") if f.stem != "__init__")


def test_continuing_from_the_released_adapter_changes_the_recipe_in_what_it_says_alone() -> None:
    released, continued = read_config("omniretriever_7b"), read_config("continue_adapter")
    assert continued.model.lora is None and continued.losses.negatives == "global" and continued.data.distinct == "id_prefix"
    same = dataclasses.replace(continued, model=released.model, data=released.data, losses=released.losses, epochs=released.epochs)
    assert same == released


def test_a_recipe_that_a_config_does_not_have() -> None:
    with pytest.raises(ConfigError, match=r"tiny:x: write tiny, or tiny:quick"):
        read_config(f"{TINY}:x")


def test_a_config_takes_an_argument_and_changes() -> None:
    ablations = str(ROOT / "configs" / "paper_ablations.py")
    run = read_config(f"{ablations}:L_A", ["steps=7", "epochs=0", "model.base=b", "losses.hn_audio_only=true"])
    assert (dict(run.losses.weights), run.steps, run.model.base, run.losses.hn_audio_only) == ({"pairwise": 1.0}, 7, "b", True)
    with pytest.raises(ConfigError, match="choose one of L_A"):
        read_config(f"{ablations}:L_B")


def test_an_old_name_of_a_field_is_read_and_the_new_one_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_config(TINY, ["losses.tuple_weight=0"]).losses.weights == {"distillation": 1.0, "pairwise": 1.0}
    line = "config field losses.tuple_weight is now losses.weights.tuple; the old name is read by this version alone\n"
    assert capsys.readouterr().err == line
    (tmp_path / "own.py").write_text(
        f"import runpy\ndef get_config():\n    config = runpy.run_path({TINY!r})['get_config']().to_dict()\n"
        "    del config['losses']['weights']\n    config['losses']['tuple_weight'] = 0.5\n    return config\n"
    )
    run = read_config(str(tmp_path / "own.py"), ["losses.weights.pairwise=3"])
    assert run.losses.weights == {"tuple": 0.5, "distillation": 1.0, "pairwise": 3.0}
    assert capsys.readouterr().err == line


@pytest.mark.jit
@pytest.mark.slow
def test_a_run_from_python_trains_resumes_and_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = read_config(str(make_files(tmp_path)), ["steps=2", "evaluation.manifest=", "batch.blocks=1"])
    assert isinstance(run, omni_jax.TrainConfig)
    lines: list[str] = []
    outcome = omni_jax.train(run, tmp_path / "run", log=lines.append, show_progress=True)
    assert (outcome.step, outcome.total, outcome.finished) == (2, 2, True)
    assert lines
    assert "2/2" in capsys.readouterr().err
    assert omni_jax.train(run.to_json(), tmp_path / "run", log=lines.append).finished
    model = omni_jax.OmniRetriever.from_pretrained(tmp_path / "run")
    assert model.encode("a caption").shape == (model.dim,)
