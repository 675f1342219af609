"""What a run says of its data before it begins, and which held-out clips it evaluates."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from etils import epath

from omni_jax.api.evaluation import Evaluator
from omni_jax.api.start_report import data_notes
from omni_jax.api.training import TrainCallbacks, run_training
from omni_jax.cli.config_file import read_config
from omni_jax.cli.main import main
from omni_jax.data.sources import open_source
from omni_jax.train import RunConfig
from omni_jax.types import ClipError, Features, InputError
from tests.media_samples import write_clip
from tests.train.tiny_run import CONFIG


def write_manifest(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Media of a second: one with sound, one without."""
    write_clip(tmp_path / "loud.mp4", 1.0, fps=4, width=56, height=56)
    write_clip(tmp_path / "mute.mp4", 1.0, fps=4, width=56, height=56, audio=False)
    return tmp_path


def config(folder: Path, train: Path, held_out: Path | str, *changes: str) -> RunConfig:
    (folder / "run.py").write_text(CONFIG.format(shards=train, held_out=held_out))
    return read_config(str(folder / "run.py"), list(changes))


def begun(run: RunConfig, workdir: Path) -> list[str]:
    """Returns what a run that is stopped before its first update has said."""
    said: list[str] = []
    run_training(run, workdir, TrainCallbacks(said.append, lambda *_: None, lambda *_: None, lambda: True))
    return said


def row(i: int, **fields: Any) -> dict[str, Any]:
    return {"id": f"c{i}-0", "text": f"caption {i}", "video": "loud.mp4", **fields}


@pytest.mark.jit
def test_a_run_says_what_it_will_not_use(clips: Path, tmp_path: Path) -> None:
    rows = [row(i, duration=1.0, timestamps=[0, 0.1 * (i + 1)]) for i in range(19)]
    train = write_manifest(clips / "clips.jsonl", [*rows, {"id": "text", "text": "alone"}])
    said = "\n".join(begun(config(tmp_path, train, "", "steps=2"), tmp_path / "run"))
    for words in (
        "1 records cannot be trained on",
        f"{train}: fields that are carried along and not used: duration (19 records)",
        "2 steps of 8 clips take 16 of the 19 clips; 3 are never trained on",
        "19 of 19 clips have no audio field and are trained with silence; nothing is learned of sound",
        "19 of 19 clips have the same audio: where such clips fill more than half of a block",
    ):
        assert words in said, said


@pytest.mark.jit
def test_a_run_says_that_it_is_evaluated_on_what_it_trains_on(clips: Path, tmp_path: Path) -> None:
    rows = [row(i, audio="loud.mp4", timestamps=[0, 0.1 * (i + 1)]) for i in range(9)]
    train = write_manifest(clips / "clips.jsonl", rows)
    # One is known by id and caption, one by its file and interval; one is new; one lacks a caption.
    held = [rows[0] | {"timestamps": [0.5, 1]}, rows[1] | {"id": "x"}, row(30, audio="loud.mp4"), {"id": "y", "video": "loud.mp4"}]
    held_out = write_manifest(clips / "held_out.jsonl", held)
    said = "\n".join(begun(config(tmp_path, train, held_out, "steps=0", "epochs=2."), tmp_path / "run"))
    assert f"{held_out}: 2 of 3 held-out clips are trained on as well, the first: 'c0-0'" in said
    assert f"{held_out}: 1 records cannot be evaluated" in said and "'y': has no text and no audio, which the 12 directions need" in said
    assert "an epoch of 1 steps of 8 clips leaves 1 of the 9 clips out" in said and "silence" not in said


def test_a_manifest_and_a_prepared_folder_hold_the_same_held_out_clips(clips: Path, tmp_path: Path) -> None:
    """Silence would be found by nothing, and count as found wherever all of it ties."""
    names = ("loud", "mute", "loud", "mute")
    rows = [{"id": f"h{i}", "text": f"caption {i}", "video": f"{n}.mp4", "audio": f"{n}.mp4"} for i, n in enumerate(names)]
    held_out, folder = write_manifest(clips / "held_out.jsonl", rows), tmp_path / "held_out"
    fields = [part for field in ("frames=2", "pixels=3136", "audio_seconds=1") for part in ("--set", field)]
    assert main(["prepare", "--manifest", str(held_out), "--out", str(folder), *fields, "--workers", "0"]) == 0

    def evaluator(where: Path) -> Evaluator:
        run, said = config(tmp_path, folder, where), []
        return Evaluator(run, epath.Path(tmp_path), None, None, {}, None, said.append, lambda: False)  # type: ignore[arg-type]

    run = config(tmp_path, folder, folder, f"data.media_root={tmp_path}", f"evaluation.media_root={tmp_path}", "batch.micro_batch=2")
    planner: Any = SimpleNamespace(updates_per_epoch=2, negatives=None, alike=lambda _: [0, 1, 2, 3])
    notes = list(data_notes(run, open_source(folder, run.data.resolved_preset()), planner, 2))
    assert [note.partition("=")[0] for note in notes[:2]] == ["data.media_root", "evaluation.media_root"]
    assert notes[2] == "2 of 4 clips have no sound and are trained with silence" and len(notes) == 3
    prepared, streamed = evaluator(folder), evaluator(held_out)
    assert [r.id for r in prepared.records] == ["h0", "h2"] and [p.id for p in prepared.problems] == ["h1", "h3"]
    assert all("has no audio" in problem.reason for problem in prepared.problems)
    assert len({(r.video, r.audio) for r in prepared.records}) == 2  # clips of the same files would share one embedding
    found = list(streamed._decoded(streamed.records))
    assert [r.id for r, f in zip(streamed.records, found, strict=True) if isinstance(f, Features)] == ["h0", "h2"]
    assert all("has no sound that can be read" in str(f) for f in found if isinstance(f, ClipError))
    lines: list[str] = []
    noted = write_manifest(clips / "noted.jsonl", [row | {"views": 3} for row in rows])
    Evaluator(config(tmp_path, folder, noted), epath.Path(tmp_path), None, None, {}, None, lines.append, lambda: False)  # type: ignore[arg-type]
    assert any(line.startswith(f"{noted}: ") and "views" in line for line in lines)
    with pytest.raises(InputError, match=r"no record has text, video and audio.*; the first: record 'a': has no video and no audio"):
        evaluator(write_manifest(clips / "text.jsonl", [{"id": "a", "text": "x"}]))
