"""The runner: parts as data, a page that keeps what was not run, and a status that tells of losses."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import ClassVar

import pytest

from tools.torture import __main__ as command
from tools.torture.outcome import Outcome


def test_every_part_has_a_module_and_a_short_form() -> None:
    for module, minutes, _ in command.PARTS.values():
        assert callable(importlib.import_module(f"tools.torture.{module}").run) and minutes > 0
        assert (Path(__file__).parent / f"test_{module}.py").exists()
    assert sum(minutes for _, minutes, _ in command.PARTS.values()) <= command.MINUTES


def test_results_of_parts_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    page, asked = tmp_path / "page.md", []

    class Module:
        @staticmethod
        def run(seed: int, minutes: float) -> Outcome:
            asked.append((seed, minutes))
            lost = ["a <b>loss</b> \x1b[2J"] if len(asked) == 2 else []
            return Outcome("x", seed, tried=[("things", 1234), ("  of them", 5)], lost=lost, notes=["a note"], seconds=1.0)

    monkeypatch.setattr(command.importlib, "import_module", lambda name: Module)
    assert command.main(["--part", "numbers", "--seed", "7", "--minutes", "3", "--page", str(page)]) == 0
    assert command.main(["--part", "media", "--seed", "8", "--page", str(page)]) == 1
    text = page.read_text()
    assert asked[0] == (7, 3.0) and text.startswith("# Reliability")
    assert text.index("## media") < text.index("Lost: 1.") < text.index("## numbers") < text.index("Lost: nothing.")
    assert "| things | 1,234 |" in text and "&lt;b>loss" in text and "\x1b" not in text and "seed 7" in text
    assert command.main(["--part", "media", "--seed", "9", "--page", str(page)]) == 0
    assert page.read_text().count("## media") == 1 and "Lost: 1." not in page.read_text()
    assert "lost: nothing; seed 9" in capsys.readouterr().out


def test_a_scaled_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        FULL: ClassVar = {"kills": 30, "steps": 120}

        @staticmethod
        def run(seed: int, minutes: float, *, kills: int = 30, steps: int = 120) -> Outcome:
            return Outcome("x", seed, tried=[("kills", kills), ("steps", steps)])

    monkeypatch.setattr(command.importlib, "import_module", lambda name: Module)
    for scale, kills, said in (("1", 30, False), ("0.1", 3, True)):
        assert command.main(["--part", "training", "--scale", scale, "--page", str(tmp_path / scale)]) == 0
        text = (tmp_path / scale).read_text()
        assert f"| kills | {kills} |" in text and ("scaled: kills 3 of 30, steps 12 of 120" in text) == said


def test_a_part_that_breaks_is_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        @staticmethod
        def run(seed: int, minutes: float) -> Outcome:
            raise KeyError("gone")

    monkeypatch.setattr(command.importlib, "import_module", lambda name: Module)
    assert command.main(["--part", "supply", "--page", str(tmp_path / "page.md")]) == 1
    assert "the part ended with KeyError: 'gone'" in (tmp_path / "page.md").read_text()
