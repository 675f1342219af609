"""What `embed` says of a manifest before the model is loaded."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from omni_jax.cli import embed
from omni_jax.cli.main import main
from omni_jax.config import Preset
from omni_jax.types import InputError


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(args: argparse.Namespace, source: None, chosen: Preset) -> None:
        raise InputError("the model was loaded")

    monkeypatch.setattr(embed, "named_model", lambda args: None)
    monkeypatch.setattr(embed, "choose_preset", lambda args, source: Preset())
    monkeypatch.setattr(embed, "load_model", load)


def run(folder: Path, *rows: dict[str, Any], tables: str | None = None) -> int:
    manifest = folder / "m.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = ["--tables", tables] if tables else []
    return main(["embed", "--model", "nowhere", "--manifest", str(manifest), "--out", str(folder / "o.npz"), *chosen])


def test_no_usable_line_is_said_with_the_first_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, {"id": "a", "caption": "rain"}, {"id": "b", "caption": "fog"}) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("omni-jax: ")]
    assert len(said) == 1 and "no record can be embedded; the first: " in said[0] and "did you mean 'text'?" in said[0]
    assert "o.errors.jsonl lists all" in said[0]
    errors = [json.loads(line) for line in (tmp_path / "o.errors.jsonl").read_text().splitlines()]
    assert [error["id"] for error in errors] == ["a", "b"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.jsonl", "o.errors.jsonl"]


def test_no_record_for_the_tables_asked_for_is_said_likewise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, {"id": "a", "text": "rain"}, tables="video,av") == 2
    assert "record 'a': has nothing of what the tables video, av need" in capsys.readouterr().err
    assert json.loads((tmp_path / "o.errors.jsonl").read_text())["id"] == "a"


def test_other_fields_and_lacking_modalities_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": "a", "text": "rain", "duration": 1}, {"id": "b", "text": "fog", "video": "b.mp4", "url": "x"}]
    assert run(tmp_path, *rows) == 2
    said = capsys.readouterr().err
    assert "the model was loaded" in said
    assert "carried along and not used: duration (1 records), url (1 records)" in said
    assert "some of the 2 records lack a modality: video 1, tv 1 records" in said
