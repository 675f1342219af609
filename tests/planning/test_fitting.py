"""What remat "auto" finds. A stand-in says what fits: GiB by what the layers keep."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from omni_jax.cli.config_file import read_config
from omni_jax.cli.main import main
from omni_jax.planning import fitting, plan
from omni_jax.planning.abstract import planned_batch
from omni_jax.planning.advice import OutOfMemory
from omni_jax.planning.programs import Memory, Program, Setting
from omni_jax.train import remat, step_kind
from tests.planning.test_programs import setting
from tests.repository import ROOT

CONFIG = str(ROOT / "configs/omniretriever_7b.py")
LIMIT = 15.75
ROOMY, LAYERS = LIMIT * (1 - fitting.SPARE), 28
MESH = fitting.planning_mesh


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Stands in for libtpu: GiB that a layer keeps by its policy, in one micro-batch. Returns what can be changed."""
    need = {"layer": 0.08, "attention": 0.16, "dots": 0.8, "base": 2.0}

    def program(given: Setting, mesh: Any, count: int) -> Program:
        kind, shapes = planned_batch(given.config, given.preset, step_kind(count, given.recipe.losses))
        peak = need["base"] + sum(need[name] for name in remat.names(given.recipe.remat, LAYERS))
        if peak > LIMIT:
            return Program("train", kind, shapes, refusal=OutOfMemory(peak, LIMIT, (), "change something"))
        return Program("train", kind, shapes, memory=Memory(peak, LIMIT, 1.0, 1.0), found=())

    for module in (fitting, plan):
        monkeypatch.setattr(module, "train_program", program)
        monkeypatch.setattr(module, "planning_mesh", lambda topology, sizes, compiled: MESH(topology, sizes, compiled=False))
    monkeypatch.setattr(plan, "has_compiler", lambda: True)
    return need


def small(**changes: Any) -> Setting:
    """Returns 256 clips a step as one pool on 16 chips, in blocks of 8."""
    return dataclasses.replace(setting("v5e:4x4", sizes=(1, 16, 1), clips=64, micro_batches=4, blocks=8), **changes)


def found(given: Setting) -> str:
    return fitting.fit(given, (0, 1, 2), lambda line: None).recipe.remat


def test_all_layers_keep_the_most_where_that_fits(compiler: dict[str, float]):
    compiler["dots"] = 0.4
    assert found(small()) == "dots"


@pytest.mark.parametrize("dots", [0.6, 0.8, 1.2, 1.8])
def test_as_many_of_the_last_layers_as_fit_keep_more(compiler: dict[str, float], dots: float):
    compiler["dots"] = dots
    text = found(small())
    kept = remat.names(text, LAYERS).count("dots")
    peak = [2.0 + 0.16 * (LAYERS - n) + dots * n for n in (kept, kept + 1)]
    assert peak[0] <= ROOMY < peak[1] and text == f"attention:{LAYERS - kept},dots"


def test_attention_is_kept_first(compiler: dict[str, float]):
    compiler |= {"layer": 0.4, "attention": 0.8, "dots": 1.2}
    text = found(small())
    kept = remat.names(text, LAYERS).count("attention")
    assert text == f"layer:{LAYERS - kept},attention" and kept


def test_layers_that_keep_more_than_expected_are_fewer(compiler: dict[str, float], monkeypatch: pytest.MonkeyPatch):
    """Two loops take memory of their own."""
    real = fitting.train_program

    def program(given: Setting, mesh: Any, count: int) -> Program:
        made = real(given, mesh, count)
        more = 1.0 if ":" in given.recipe.remat else 0.0
        return made if made.memory is None else dataclasses.replace(made, memory=Memory(made.memory.peak + more, LIMIT, 1.0, 1.0))

    without = remat.names(found(small()), LAYERS).count("dots")
    monkeypatch.setattr(fitting, "train_program", program)
    assert 0 < remat.names(found(small()), LAYERS).count("dots") < without


def test_where_nothing_fits_the_least_is_left_to_be_refused(compiler: dict[str, float]):
    compiler["base"] = 20.0
    assert found(small()) == "layer"


def command(*words: str) -> int:
    batch = {"losses.negatives": "global", "batch.micro_batch": 64, "batch.micro_batches": 4, "batch.blocks": 8, "remat": "auto"}
    fields = [f"--config.{name}={value}" for name, value in batch.items()]
    return main(["compile", "--config", CONFIG, "--topology", "v5e:4x4", "--programs", "train", "--kinds", "0", *fields, *words])


def test_the_command_prints_flags_that_a_run_takes(compiler: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "plan.json"
    assert command("--json", str(out)) == 0
    said = capsys.readouterr()
    (line,) = [line for line in said.out.splitlines() if line.startswith("remat auto found  --config.")]
    run = read_config(CONFIG, [word.removeprefix("--config.") for word in shlex.split(line)[3:]])
    made = json.loads(out.read_text())
    assert run.remat == made["remat"] and run.remat.startswith("attention:")
    tried = said.err.splitlines()
    assert (
        len(tried) == 3
        and tried[0].startswith("remat=attention ")
        and tried[1].endswith("of 14.18 that leave 10% to spare")
        and tried[2].endswith("fits")
    )


def test_without_the_compiler_nothing_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(plan, "has_compiler", lambda: False)
    assert command() == 2
    assert "remat 'auto': libtpu is not installed, which is needed to find what fits" in capsys.readouterr().err
