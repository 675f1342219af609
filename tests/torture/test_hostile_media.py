"""The short form of part `media`: some dozens of files, in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from omni_jax.cli.main import main
from tests.torture import hostile_media
from tests.torture.commands import Done


def test_golden_broken_files_cost_themselves_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.torture.commands import golden

    model = tmp_path / "model"
    assert main(["convert", "to-jax", "--base", str(golden().checkpoint), "--out", str(model)]) == 0

    def embed(arguments: list[str]) -> Done:
        status = main(arguments)
        shown = capsys.readouterr()
        return Done(status, shown.out, shown.err, 0)

    outcome = hostile_media.run(1, 10, mutated=22, tables="audio", model=model, embed=embed)
    assert outcome.lost == []
    assert dict(outcome.tried)["files through embed"] == 33
