"""`omni-jax compile` without libtpu, and with what a person may give it wrongly: one line, status 2."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from omni_jax.cli.config_file import planned_model, read_config
from omni_jax.cli.main import main
from omni_jax.planning import chips, devices, plan
from tests.repository import ROOT

SEVEN_B = str(ROOT / "configs/omniretriever_7b.py")
TINY = str(ROOT / "configs/tiny.py")
GIVEN = ["--config", SEVEN_B, "--topology", "v5e:4x4"]


@pytest.fixture(autouse=True)
def without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is installed."""
    monkeypatch.setattr(plan, "has_compiler", lambda: False)


def compile_(*words: str) -> int:
    return main(["compile", *words])


@pytest.mark.jit
def test_without_libtpu_it_lowers_and_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "new/plan.json"
    assert compile_("--config", TINY, "--topology", "v5e:2x2", "--price", "2", "--json", str(out)) == 0
    said = capsys.readouterr().out
    assert devices.MISSING in said and plan.LEFT_OUT in said and "fits" not in said and "compiler estimate" not in said
    assert "40% of peak arithmetic assumed" in said and "predicted" not in said
    found = json.loads(out.read_text())
    assert {program["status"] for program in found["programs"]} == {"lowered"}
    assert {program["program"].split("/")[0] for program in found["programs"]} == {"train", "embed"}
    step = found["programs"][0]
    assert step["memory_gib"] is step["out_of_memory"] is step["collectives"] is None
    assert step["seconds"]["arithmetic"] > 0 and step["seconds"]["interconnect"] == 0
    assert found["period"]["cost"] == pytest.approx(2 * found["period"]["chip_hours_per_million_triples"])


@pytest.mark.jit
@pytest.mark.parametrize("name", ["tiny_nemotron", "omni_embed_nemotron_3b"])
def test_the_second_backbone_is_planned_for_too(name: str, tmp_path: Path):
    """Its attention is not causal, so no hard negative shares its anchor's row."""
    out, config = tmp_path / "plan.json", str(ROOT / f"configs/{name}.py")
    assert compile_("--config", config, "--topology", "v5e:2x2", "--programs", "train", "--kinds", "0", "--json", str(out)) == 0
    (step,) = json.loads(out.read_text())["programs"]
    assert step["status"] == "lowered" and step["kind"]["hard"] == "text" and step["shapes"]["hard_tokens"] > 0
    assert step["shapes"]["fbank_frames"] == 0 == step["operations"]["beats"]["total"]


@pytest.mark.jit
def test_the_note_on_the_evaluator_stands_only_where_it_was_asked_for(capsys: pytest.CaptureFixture[str]):
    assert compile_("--config", TINY, "--topology", "v5e:2x2", "--programs", "train", "--kinds", "1") == 0
    assert plan.LEFT_OUT not in capsys.readouterr().out


@pytest.mark.jit
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--topology", "v3:4x4"], "topology 'v3:4x4': unknown chip 'v3'; choose one of v4, v5e, v5p, v6e, v7x, as in v5e:4x4"),
        (["--topology", "v5e"], "topology 'v5e': write the grid of chips after a colon, as in v5e:4x4"),
        (["--topology", "v5p:4x4"], "topology 'v5p:4x4': v5p grids have 3 dimensions, as in v5p:4x4x4"),
        (["--slices", "0"], "slices 0: must be at least 1"),
        (["--mesh", "data=3,fsdp=5"], "mesh data=3 x fsdp=5 x tensor=1 makes 15 devices, but v5e:4x4 has 16"),
        (["--config.mesh.fsdp=3"], "mesh data=1 x fsdp=3 x tensor=1 makes 3 devices, but v5e:4x4 has 16"),
        (["--slices", "2", "--mesh", "fsdp=8"], "mesh data=1 x fsdp=8 x tensor=1 makes 8 devices, but 2 x v5e:4x4 has 16 a slice"),
        (["--mesh", "tensor"], "mesh 'tensor': write axes as data=1,fsdp=16,tensor=1"),
        (["--mesh", "tensor=2,tensor=4"], "mesh tensor=2,tensor=4: tensor appears twice"),
        (["--mesh", "tensor=8"], "mesh tensor=8 does not divide the decoder's 28 heads and 4 KV heads; use one of 1, 2, 4"),
        (["--config.mesh.tensor=3"], "mesh tensor=3 does not divide the decoder's 28 heads and 4 KV heads; use one of 1, 2, 4"),
        (
            ["--config.batch.micro_batch=40"],
            "micro-batch of 40 clips does not divide over 16 batch shards (data x fsdp); use a multiple of 16",
        ),
        (
            ["--config.batch.blocks=2"],
            "config field batch.blocks=2: the 4 hosts of v5e:4x4 need whole blocks each; make it a multiple of them",
        ),
        (["--programs", "training"], "--programs 'training': give one or more of train, embed, evaluate"),
        (["--programs", ""], "--programs '': give one or more of train, embed, evaluate"),
        (["--kinds", "0,3"], "--kinds '0,3': give one or more of 0, 1, 2"),
        (["--utilisation", "0"], "--utilisation 0.0: must be above 0 and at most 1"),
        (["--utilisation", "nan"], "--utilisation nan: must be above 0 and at most 1"),
        (["--utilisation", "lots"], "argument --utilisation: invalid float value: 'lots'; see omni-jax compile --help"),
        (["--price", "-1"], "argument --price: invalid positive float value: '-1'; see omni-jax compile --help"),
        (["--caption-tokens", "0"], "argument --caption-tokens: invalid positive int value: '0'; see omni-jax compile --help"),
        (
            ["--config.remat=more"],
            "remat 'more': choose one of none, layer, dots, attention, offload, or layers with each, as in layer:22,dots",
        ),
        (
            ["--config.data.preset_fields.audio_seconds=0.0"],
            "config field data.preset='training': audio_seconds=0 has no one shape to plan for; "
            "give a length, as in --config.data.preset_fields.audio_seconds=8",
        ),
        (
            ["--sweep"],
            "--sweep: libtpu is not installed, which is needed to find what fits (pip install 'omni-jax[tpu]'; no TPU is needed)",
        ),
        (["--sweep", "--table", "t.json"], "--table takes plans, and --sweep makes none: leave one out, or write --json"),
        (
            ["--config", "nowhere.py"],
            "--config nowhere.py: no such config; name a Python file, or one of ablation, continue_adapter, omni_embed_nemotron_3b, "
            "omniretriever_7b, paper_ablations, tiny, tiny_nemotron",
        ),
    ],
)
def test_bad_input_is_one_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]):
    assert compile_(*GIVEN, *words) == 2
    said = capsys.readouterr()
    assert said.err == f"omni-jax: {line}\n" and said.out == ""


def test_full_effort_leaves_the_compiler_to_itself():
    run = read_config(TINY)
    model, _ = planned_model(run.model)
    quick, full = (plan.Request(run, model, "v5e:2x2", full_effort=full).setting() for full in (False, True))
    assert (quick.options, full.options) == (devices.QUICK, {})


def test_the_command_in_a_table_has_the_mesh_of_the_config():
    model, _ = planned_model(read_config(TINY).model)

    def written(*changes: str, mesh: str = "") -> str:
        return plan.command(plan.Request(read_config(TINY, changes), model, "v5e:4x4", mesh=mesh), ["train"], [0])

    assert "mesh" not in written()
    assert written("mesh.data=2", "mesh.tensor=2") == f"{written()} --config.mesh.data=2 --config.mesh.tensor=2"
    assert written("mesh.data=2", mesh="fsdp=16") == written(mesh="fsdp=16")


def test_full_effort_on_a_chip_whose_clock_is_not_known_is_refused_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(chips.CHIPS, "v5e", dataclasses.replace(chips.CHIPS["v5e"], mxus=None))
    assert compile_(*GIVEN, "--full-effort") == 2
    line = "chip v5e: its clock is not known, so cycles cannot be turned into time; plan without --full-effort"
    assert capsys.readouterr().err == f"omni-jax: {line}\n"


def test_eval_is_short_for_evaluate(capsys: pytest.CaptureFixture[str]):
    assert compile_("--config", TINY, "--topology", "v5e:2x2", "--programs", "eval") == 0
    assert plan.LEFT_OUT in capsys.readouterr().out


def test_no_topology_is_one_line(capsys: pytest.CaptureFixture[str]):
    assert compile_("--config", SEVEN_B) == 2
    assert capsys.readouterr().err == "omni-jax: the following arguments are required: --topology; see omni-jax compile --help\n"


def test_the_embedding_pass_needs_a_length_too(capsys: pytest.CaptureFixture[str]):
    assert compile_(*GIVEN, "--programs", "embed", "--config.data.preset=nemotron") == 2
    assert "data.preset='nemotron': audio_seconds=0 has no one shape" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["no JSON", "{}", "[1]"])
def test_a_table_that_is_none_is_kept_and_refused_before_anything_is_compiled(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    table = tmp_path / "notes.json"
    table.write_text(text)
    monkeypatch.setattr(plan, "make", lambda *a: pytest.fail("made a plan first"))
    assert compile_(*GIVEN, "--table", str(table)) == 2
    assert capsys.readouterr().err == f"omni-jax: {table}: not a table of omni-jax compile; name another file\n"
    assert table.read_text() == text


def test_a_place_that_cannot_be_written_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(plan, "make", lambda *a: pytest.fail("made a plan first"))
    assert compile_(*GIVEN, "--json", str(tmp_path / "file/plan.json")) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"omni-jax: {tmp_path}/file") and said.count("\n") == 1
