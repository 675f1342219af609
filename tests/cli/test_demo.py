"""The learning demo at a small scale, end to end: mp4 files to a trained model, its scores, its curves and its PyTorch folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conversion.source import model_config, open_checkpoint
from omni_jax.cli import learning
from omni_jax.data.synthetic import SyntheticConfig
from omni_jax.train.curves import read_rows
from omni_jax.types import InputError

SMALL = """
import sys
from pathlib import Path
from omni_jax.cli import learning
from omni_jax.data.synthetic import SyntheticConfig
clips = SyntheticConfig(clips=1, held_out=4, combinations=28, seconds=1.0)
changes = {"steps": 15, "batch.micro_batch": 8, "optimizer.warmup_steps": 2, "losses.hn_audio_only": True, "data.workers": 0}
sys.exit(learning.learn(Path(sys.argv[1]), learning.Scale(clips, tuple(changes.items()))))
"""


def _learn(out: Path) -> str:
    settings = {**os.environ, "JAX_NUM_CPU_DEVICES": "2", "OPENBLAS_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", SMALL, str(out)], capture_output=True, text=True, timeout=900, env=settings)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.slow
def test_the_small_model_learns_is_scored_and_written_for_pytorch(tmp_path):
    said = _learn(tmp_path)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 16))
    loss = [row["loss"] for row in rows]
    assert np.mean(loss[-3:]) < 0.8 * np.mean(loss[:3])
    scored = json.loads((tmp_path / "held_out.json").read_text())
    assert len(scored["directions"]) == 12 and scored["n"] == 4
    kept = json.loads((tmp_path / "learning.json").read_text())
    assert kept["AVG-all"] == scored["AVG-all"] and kept["chance"] == 25.0
    # Clips, captions, tokenizer and order follow from seeds and every clip's media have one size: the counts are the same everywhere.
    used, whole = (sum(row[name] for row in rows) for name in ("used_tokens", "total_tokens"))
    assert kept["padding"] == 1 - used / whole and len({row["total_tokens"] for row in rows}) == 1
    assert "; 8.7 % of the training tokens were padding" in said
    assert {stage["name"] for stage in kept["stages"]} >= {"make clips", "prepare shards", "train", "score the held-out clips"}
    assert "chance 25.0 %" in said
    assert (tmp_path / "curves.html").read_text().count("<svg") == 6
    base = open_checkpoint(tmp_path / "torch_base")
    assert model_config(base).decoder.num_layers == 3
    assert (tmp_path / "torch_adapter" / "adapter_model.safetensors").is_file()

    # Again: what is there is used, and the model is not trained on.
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert "0 mp4 files written" in _learn(tmp_path)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_an_earlier_folder_is_replaced_and_another_is_refused(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder, name in ((ours, "config.json"), (theirs, "notes.txt")):
        folder.mkdir()
        (folder / name).write_text("{}")
    learning._remove_earlier(ours)
    assert not ours.exists()
    with pytest.raises(InputError, match="is not a folder of an earlier demo"):
        learning._remove_earlier(theirs)


def test_the_demo_reads_clips_as_its_config_trains_them():
    scale = learning.Scale(SyntheticConfig(), (("steps", 3), ("batch.micro_batch", 4)))
    assert learning._settings(scale).steps == 3
    arguments = learning._preset(scale)
    fields = learning._settings(scale).data.preset_fields
    assert arguments[:2] == ["--preset", "training"]
    assert f"audio_seconds={fields['audio_seconds']}" in arguments


def test_the_chance_and_the_weakest_direction_are_said(tmp_path):
    rates = {"t2v": 50.0, "v2t": 12.5}
    scored = {"directions": {d: {"R@1": r, "R@5": 99.0} for d, r in rates.items()}, "AVG-all": 31.25, "n": 8}
    (tmp_path / "scores.json").write_text(json.dumps(scored))
    result = learning._result(tmp_path / "scores.json")
    assert result == {"directions": rates, "AVG-all": 31.25, "n": 8, "chance": 12.5}
    said = learning._said(result, learning._padding([{"used_tokens": 6, "total_tokens": 8}, {"used_tokens": 9, "total_tokens": 12}]))
    assert said == (
        "held-out clips, gallery of 8: AVG-all 31.2 % (chance 12.5 %), weakest v2t 12.5 %; 25.0 % of the training tokens were padding"
    )
    assert "padding" not in learning._said(result, learning._padding([{"loss": 1.0}]))


def test_the_ablation_gives_one_loss_the_time_of_three_and_keeps_what_was_run(tmp_path, monkeypatch, capsys):
    clock, trained = [0.0], []

    def train(out, workdir, scale):
        changes = dict(scale.changes)
        trained.append((workdir.name, changes))
        clock[0] += changes.get("steps", 10) * (2.0 if changes["losses.tuple_weight"] else 1.0)

    def score(model, manifest, name, scale, report):
        rate = 10.0 * len(trained)
        Path(f"{name}.json").write_text(json.dumps({"directions": {"t2v": {"R@1": rate}}, "AVG-all": rate, "n": 50}))

    monkeypatch.setattr(learning, "_make_data", lambda *_: None)
    monkeypatch.setattr(learning, "_train", train)
    monkeypatch.setattr(learning, "_score", score)
    monkeypatch.setattr(learning, "_cpu_seconds", lambda: clock[0])
    scale = learning.Scale(SyntheticConfig(), (("steps", 10),))
    assert learning.ablate(tmp_path, scale) == 0
    assert [name for name, _ in trained] == ["L_A", "L_A___L_D", "L_A___L_D___L_T", "L_A__equal_CPU_time"]
    assert [changes["losses.distillation_weight"] for _, changes in trained] == [0.0, 1.0, 1.0, 0.0]
    assert [changes["steps"] for _, changes in trained] == [10, 10, 10, 20]
    kept = json.loads((tmp_path / "ablation" / "ablation.json").read_text())
    assert [(row["steps"], row["cpu"], row["AVG-all"]) for row in kept.values()] == [(10, 10, 10), (10, 10, 20), (10, 20, 30), (20, 20, 40)]
    said = capsys.readouterr().out
    assert "Equal steps are not equal compute" in said and "nothing has converged" in said and "chance 2.0 %" in said
    learning.ablate(tmp_path, scale)
    assert len(trained) == 4
