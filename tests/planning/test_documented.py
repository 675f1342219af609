"""Every command that the pages show for `omni-jax compile` works as it stands, and nothing executes on the way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from omni_jax.cli.main import main
from omni_jax.planning import plan, programs
from tests.planning.documented import PAGES, commands, small
from tests.repository import ROOT

COMMANDS = commands()
NAMES = [f"{where}-{number}" for number, (where, _) in enumerate(COMMANDS)]
PLAIN = ["--config", "configs/omniretriever_7b.py", "--topology", "v5e:4x4"]  # the config's own negatives: pools of 32


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def nothing_executes() -> Iterator[None]:
    """An array that is made puts a value on a device, which a planned mesh does not have."""
    with jax.transfer_guard("disallow_explicit"):
        yield


def test_the_pages_show_commands():
    """As many as a plain count of their first lines finds, wherever they stand."""
    shown = sum((ROOT / page).read_text().count("\nomni-jax compile --") for page in PAGES)
    indented = sum((ROOT / page).read_text().count("  omni-jax compile --") for page in PAGES)
    assert len(COMMANDS) == shown + indented + 1 > 3


@pytest.mark.jit
@pytest.mark.parametrize("arguments", [*(arguments for _, arguments in COMMANDS), PLAIN], ids=[*NAMES, "plain"])
def test_a_documented_command_lowers(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_executes: None, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(plan, "has_compiler", lambda: False)
    out = tmp_path / "plan.json"
    assert main(["compile", *small(arguments), "--json", str(out)]) == 0, capsys.readouterr().err
    made = json.loads(out.read_text())["programs"]
    assert made and {program["status"] for program in made} == {"lowered"}


@pytest.mark.tpu
@pytest.mark.parametrize("arguments", [arguments for _, arguments in COMMANDS], ids=NAMES)
def test_a_documented_command_lowers_for_devices_that_are_not_there(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_executes: None, capsys: pytest.CaptureFixture[str]
):
    """All but the compilation itself, which test_tpu.py has."""
    monkeypatch.setattr(programs, "_compiled", lambda program, *_, **__: program)
    out = tmp_path / "plan.json"
    assert main(["compile", *small(arguments), "--json", str(out)]) == 0, capsys.readouterr().err
    assert {program["status"] for program in json.loads(out.read_text())["programs"]} == {"lowered"}


@pytest.mark.tpu
def test_pools_of_their_own_compile(nothing_executes: None, capsys: pytest.CaptureFixture[str]):
    assert main(["compile", *small(PLAIN), "--programs", "train", "--kinds", "1"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "8 x 32 clips a step, negatives=micro" in said and "alone text+video: fits" in said
