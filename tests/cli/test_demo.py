"""The learning demo at a small scale, end to end: mp4 files to a trained model, its scores, its curves and its PyTorch folders."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from omni_jax.api.training_curves import read_rows
from omni_jax.cli import demo_training, parity
from omni_jax.cli.main import main
from omni_jax.conversion.source import model_config, open_checkpoint
from omni_jax.data.synthetic import SyntheticConfig, SyntheticSet
from omni_jax.retrieval import read_embeddings
from omni_jax.types import InputError
from tests.tolerances import assert_close

# The learning part alone, as the demo's command runs it. Data workers start as fresh interpreters, which import this script again.
SMALL = """
import sys
from omni_jax.cli import demo_training, main, parity
from omni_jax.data.synthetic import SyntheticConfig
if __name__ == "__main__":
    clips = SyntheticConfig(clips=1, held_out=4, combinations=28, seconds=1.0)
    changes = {"steps": 15, "batch.micro_batch": 8, "optimizer.warmup_steps": 2, "data.workers": int(sys.argv[2])}
    demo_training.DEMO = demo_training.Scale(clips, f"{demo_training.CONFIG}:quick", tuple(changes.items()))
    demo_training.AVG_ALL = demo_training.DIRECTION = 0.0
    parity.compare_with_reference = lambda out: 0
    sys.argv[:] = ["omni-jax", "demo", "--out", sys.argv[1]]
    main.entry()
"""


def _start(out: Path, workers: int) -> subprocess.Popen[str]:
    """Starts the learning part as the leader of a process group of its own."""
    settings = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONUNBUFFERED": "1"}
    script = out.with_suffix(".py")
    script.write_text(SMALL)
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, str(script), str(out), str(workers)], env=settings, start_new_session=True, **output)


def _learn(out: Path) -> str:
    run = _start(out, workers=0)
    said, _ = run.communicate(timeout=900)
    assert run.returncode == 0, said
    return said


@pytest.mark.slow
def test_the_small_model_learns_is_scored_and_written_for_pytorch(tmp_path, capsys):
    tmp_path /= "demo_out"
    said = _learn(tmp_path)
    announced = said.index("Next, a small model learns: 24 mp4 files"), said.index("Ctrl-C leaves what is finished")
    assert announced[0] < announced[1] < said.index("== make clips")
    # One bar: what a part does stands in the line of the whole.
    lines = said.splitlines()
    assert any(line.startswith("demo: ") and "; train: 0/15 steps" in line for line in lines)
    assert not [line for line in lines if line.startswith(("clips: ", "prepare: ", "train: ", "embed: ", "previews: "))]
    assert lines[-3:] == demo_training.NEXT.splitlines()
    assert f"report {tmp_path / 'held_out.html'}" in said
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
    assert (tmp_path / "curves.html").read_text().count('<svg class="chart"') == 6
    base = open_checkpoint(tmp_path / "torch_base")
    assert model_config(base).decoder.num_layers == 2
    assert (tmp_path / "torch_adapter" / "adapter_model.safetensors").is_file()

    # In int8, from the mp4 files: the trained vectors stay near, and the command says what rounding on the fly loses.
    held = [
        "--model",
        str(tmp_path / "run"),
        "--manifest",
        str(tmp_path / "clips" / "held_out.jsonl"),
        *demo_training._preset(demo_training.DEMO),
    ]
    for kind in ("int8", "int8-dynamic"):
        assert main(["embed", *held, "--out", str(tmp_path / f"{kind}.npz"), "--weights", kind, "--batch-size", "32"]) == 0
        whole, rounded = (read_embeddings(tmp_path / f"{name}.npz").tables for name in ("held_out", kind))
        assert len(rounded) == 7
        for name, rows in rounded.items():
            assert_close(rows, whole[name], f"{kind.replace('-', '_')}_trained")
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("int8-dynamic on 4 of these records, against int8: smallest cosine 0.9") and "mean R@1 of 12 directions " in line

    # Again: what is there is used, and the model is not trained on.
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert "0 mp4 files written" in _learn(tmp_path)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_ctrl_c_in_any_stage_says_what_stays_and_leaves_no_process(tmp_path):
    out = tmp_path / "demo_out"
    # Each run resumes where the one before was stopped. The last is stopped before the step is compiled.
    for seen, stays in (("demo: ", "clips"), ("== prepare shards", "clips"), ("train: 0/15", "run")):
        run = _start(out, workers=1)
        assert run.stdout is not None
        said = []
        for line in run.stdout:
            if seen in line and not any(seen in earlier for earlier in said):
                os.killpg(run.pid, signal.SIGINT)  # as a terminal does
            said.append(line)
        assert run.wait(timeout=300) == 130, "".join(said)
        kept = str(out / stays) if (out / stays).exists() else "nothing yet"  # the first stop may come before the first clip
        assert kept in said[-1] and "run it again to resume" in said[-1]
        until = time.monotonic() + 30  # Python's tracker of resources ends a moment after the command
        while left := _of_group(run.pid):
            assert time.monotonic() < until, left
            time.sleep(0.1)
    assert (out / "run" / "checkpoints").is_dir()


def _of_group(leader: int) -> list[str]:
    """Returns the processes of a group that have not ended; whether their parent has noticed the end of the others is not asked."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = file.read_text().rpartition(")")
        except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
            continue
        state, _, group = rest.split()[:3]
        if int(group) == leader and state not in "ZX":
            found.append(name)
    return found


@pytest.mark.parametrize("place", ["file", "file/inside", "/proc/demo_out"])
def test_an_output_that_cannot_be_written_is_said_at_once(tmp_path, capsys, place):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / place)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"omni-jax: --out {tmp_path / place}: cannot be written (") and said.err.count("\n") == 1
    assert not said.out


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), demo_training.Stopped(130), demo_training.Stopped(75)])
def test_a_stopped_demo_says_what_stays_and_returns_the_status_of_the_stop(tmp_path, capsys, monkeypatch, stop):
    def stopped(out, scale, stages):
        (out / "clips").mkdir(parents=True)
        raise stop

    monkeypatch.setattr(parity, "compare_with_reference", lambda out: 0)
    monkeypatch.setattr(demo_training, "_make_data", stopped)
    assert main(["demo", "--out", str(tmp_path / "demo")]) == getattr(stop, "status", 130)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"the demo was stopped; what is finished stays ({tmp_path / 'demo' / 'clips'}") and last.endswith(
        "run it again to resume"
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_that_python_drops_stops_the_demo_after_the_stage(tmp_path, capfd, monkeypatch):
    class Dropping:
        def __del__(self):  # as in a callback of the garbage collector: what it raises is dropped
            signal.raise_signal(signal.SIGINT)

    def make(folder, config, **options):
        Dropping()
        return SyntheticSet(folder / "train.jsonl", folder / "held_out.jsonl", written=1)

    monkeypatch.setattr(parity, "compare_with_reference", lambda out: 0)
    monkeypatch.setattr(demo_training, "write_set", make)
    before = signal.getsignal(signal.SIGINT)
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 130
    said = capfd.readouterr()
    assert "== make clips" in said.out and "== prepare shards" not in said.out
    assert "the demo was stopped" in said.err.splitlines()[-1]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_command_that_a_signal_ended_stops_the_demo_and_one_that_failed_is_named(tmp_path):
    missing = ["eval", str(tmp_path / "none.npz")]
    with pytest.raises(InputError, match="omni-jax eval ended with status 2; run the demo again to resume"):
        demo_training._command(missing)


def test_a_demo_goes_on_under_its_settings_and_starts_over_under_others(tmp_path):
    scale = demo_training.Scale(SyntheticConfig(clips=1), f"{demo_training.CONFIG}:quick")
    marks = {"clips": "synthetic.json", "shards": "preparation.json", "run": "config.json"}

    def fill():
        for folder, mark in marks.items():
            (tmp_path / folder).mkdir()
            (tmp_path / folder / mark).write_text("{}")

    def there():
        return [folder for folder in marks if (tmp_path / folder).exists()]

    fill()  # by a version that noted no settings
    demo_training._begin(tmp_path, scale)
    assert there() == []
    fill()
    demo_training._begin(tmp_path, scale)
    assert there() == list(marks)
    demo_training._begin(tmp_path, dataclasses.replace(scale, changes=(("steps", 3),)))
    assert there() == []


def test_an_earlier_folder_is_replaced_and_another_is_refused(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder, name in ((ours, "config.json"), (theirs, "notes.txt")):
        folder.mkdir()
        (folder / name).write_text("{}")
    demo_training._remove_earlier(ours)
    assert not ours.exists()
    with pytest.raises(InputError, match="is not a folder of an earlier demo"):
        demo_training._remove_earlier(theirs)


def test_the_demo_reads_clips_as_its_config_trains_them():
    scale = demo_training.Scale(changes=(("steps", 3), ("batch.micro_batch", 4)))
    assert demo_training._settings(scale).steps == 3
    arguments = demo_training._preset(scale)
    fields = demo_training._settings(scale).data.preset_fields
    assert arguments[:2] == ["--preset", "training"]
    assert f"audio_seconds={fields['audio_seconds']}" in arguments


def test_the_chance_and_the_weakest_direction_are_said(tmp_path):
    rates = {"t2v": 50.0, "v2t": 12.5}
    scored = {"directions": {d: {"R@1": r, "R@5": 99.0} for d, r in rates.items()}, "AVG-all": 31.25, "n": 8}
    (tmp_path / "scores.json").write_text(json.dumps(scored))
    result = demo_training._result(tmp_path / "scores.json")
    assert result == {"directions": rates, "AVG-all": 31.25, "n": 8, "chance": 12.5}
    said = demo_training._said(
        result, demo_training._padding([{"used_tokens": 6, "total_tokens": 8}, {"used_tokens": 9, "total_tokens": 12}])
    )
    assert said == (
        "held-out clips, gallery of 8: AVG-all 31.2 % (chance 12.5 %), weakest v2t 12.5 %; 25.0 % of the training tokens were padding"
    )
    assert "padding" not in demo_training._said(result, demo_training._padding([{"loss": 1.0}]))
