"""The short form of part `media`: some dozens of files, in this process, with one model for both runs."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from omni_jax.api import OmniRetriever
from omni_jax.cli import embed as command
from omni_jax.cli.main import main
from tools.torture import hostile_media
from tools.torture.commands import Done, golden

pytestmark = pytest.mark.jit


def test_golden_broken_files_cost_themselves_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    assert main(["convert", "to-jax", "--base", str(golden().checkpoint), "--out", str(model)]) == 0
    load = functools.cache(lambda: OmniRetriever.from_pretrained(model))

    def loaded(args: object, source: object, chosen: object) -> OmniRetriever:
        found = load()
        found.preset = chosen  # type: ignore[assignment]
        found._planners.clear()  # shapes are remembered from group to group; a new process begins without
        return found

    def embed(arguments: list[str]) -> Done:
        status = main(arguments)
        shown = capsys.readouterr()
        return Done(status, shown.out, shown.err, 0)

    monkeypatch.setattr(command, "load_model", loaded)
    outcome = hostile_media.run(1, 10, mutated=22, tables="video", model=model, embed=embed)
    assert outcome.lost == []
    assert dict(outcome.tried)["files through embed"] == 33
