"""A run goes on with the clips that it began with: other lengths are noticed where ids and captions are the same."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from omni_jax.api.training import Outcome, TrainCallbacks, clips_digest, run_training
from omni_jax.api.weights import open_model
from omni_jax.cli.config_file import read_config
from omni_jax.cli.main import main
from omni_jax.config import preset
from omni_jax.data.sources import open_source
from omni_jax.train import RunConfig
from omni_jax.types import InputError
from tests.media_samples import write_clip
from tests.train.tiny_run import CONFIG

SETTINGS = ("frames=2", "pixels=3136", "audio_seconds=1")
PRESET = preset("training").override(list(SETTINGS))


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Eight clips of one file of a second."""
    write_clip(tmp_path / "clip.mp4", 1.0, fps=4, width=56, height=56)
    return write_manifest(tmp_path / "clips.jsonl")


def write_manifest(path: Path, **changes: object) -> Path:
    """Writes a manifest whose last record has the changes."""
    rows = [{"id": f"c{i}-0", "text": f"caption {i}", "video": f"{i}.mp4", "audio": f"{i}.mp4"} for i in range(8)]
    rows[-1] |= changes
    for row in rows:
        media = path.parent / row["video"]
        if not media.exists():
            os.link(path.parent / "clip.mp4", media)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepare(manifest: Path, out: Path) -> Path:
    fields = [part for field in SETTINGS for part in ("--set", field)]
    assert main(["prepare", "--manifest", str(manifest), "--out", str(out), *fields, "--workers", "0"]) == 0
    return out


def begin(run: RunConfig, workdir: Path) -> Outcome:
    """Starts a run that is stopped before its first update: it claims its workdir, and saves."""
    callbacks = TrainCallbacks(log=lambda _: None, begin=lambda *_: None, update=lambda *_: None, stopping=lambda: True)
    return run_training(run, workdir, callbacks)


@pytest.mark.jit
def test_a_run_does_not_go_on_with_a_clip_of_another_length(manifest: Path, tmp_path: Path) -> None:
    before = prepare(manifest, tmp_path / "before")
    moved = shutil.copytree(before, tmp_path / "moved")
    (tmp_path / "7.mp4").unlink()
    write_clip(tmp_path / "7.mp4", 1.5, fps=4, width=56, height=56)
    after = prepare(manifest, tmp_path / "after")
    (tmp_path / "run.py").write_text(CONFIG.format(shards=before, held_out=""))
    runs = {folder: read_config(str(tmp_path / "run.py"), [f"data.train={folder}"]) for folder in (before, moved, after)}
    for folder in (before, moved):
        assert begin(runs[folder], tmp_path / "run").step == 0
    with pytest.raises(InputError, match=r"run: holds another run: its clips differ \(digest mismatch\); choose another --workdir"):
        begin(runs[after], tmp_path / "run")


def test_streamed_clips_have_one_digest_wherever_they_lie(manifest: Path, tmp_path: Path) -> None:
    first = open_source(manifest, PRESET)
    digest = clips_digest(first)
    for source in (open_source(manifest, PRESET), pickle.loads(pickle.dumps(first)), open_source(manifest, PRESET, tmp_path)):
        assert clips_digest(source) == digest
    moved = shutil.copytree(tmp_path, tmp_path.parent / "moved")
    assert clips_digest(open_source(moved / manifest.name, PRESET)) == digest


def test_the_digest_of_a_clip_is_that_of_other_versions(manifest: Path) -> None:
    """A run goes on under a later version, too."""
    assert clips_digest(open_source(manifest, PRESET)) == "466881acea18b6ac1a240e469f873cc5"


@pytest.mark.parametrize("changes", [{"timestamps": [0, 0.5]}, {"audio": None}, {"id": "c7-1"}, {"text": "caption"}])
def test_what_a_manifest_says_of_a_clip_is_in_the_digest(manifest: Path, changes: dict[str, object]) -> None:
    digest = clips_digest(open_source(manifest, PRESET))
    assert clips_digest(open_source(write_manifest(manifest, **changes), PRESET)) != digest


@pytest.mark.jit
def test_a_run_does_not_go_on_with_other_files_or_another_tokenizer(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(CONFIG.format(shards=manifest, held_out=""))
    run, workdir = read_config(str(tmp_path / "run.py"), []), tmp_path / "run"
    assert begin(run, workdir).step == 0
    kept = (tmp_path / "7.mp4").read_bytes()
    (tmp_path / "7.mp4").unlink()  # a link to the file of the other clips
    (tmp_path / "7.mp4").write_bytes(kept + b"\0")
    with pytest.raises(InputError, match=r"run: holds another run: its media files differ \(digest mismatch\); choose another --workdir"):
        begin(run, workdir)
    (tmp_path / "7.mp4").write_bytes(kept)  # copied back at another time
    tokenizer = workdir / "base" / "tokenizer.json"
    record = json.loads(tokenizer.read_text(encoding="utf-8"))
    words = record["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    tokenizer.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(
        InputError, match=r"run: holds another run: its tokenizer files differ \(digest mismatch\); choose another --workdir"
    ):
        begin(run, workdir)
    with pytest.raises(InputError, match=r"base: holds another tokenizer than .*run was trained with"):
        open_model(workdir)
