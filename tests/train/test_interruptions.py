"""A run that is killed, stopped or moved to other devices is the run that was never interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

from omni_jax.cli.main import main
from omni_jax.cli.status import INTERRUPTED, STOPPED_AND_SAVED
from omni_jax.train.checkpoint import REST, TRAINABLE, list_steps
from tests.train.tiny_run import CLIPS, command, environment, finish, make_files, omni_jax, start

KILLS = 10
STEPS = 24
PLAIN: dict[str, Any] = {"evaluation__manifest": "", "losses__hn_audio_only": True, "checkpoint__every": 1}  # one kind of step: one program
DRAWN = {
    **PLAIN,
    "losses__hn_audio_only": False,
    "losses__pairs": "cycle",
    "model__lora__rank": 2,
    "model__lora__dropout": 0.3,
}  # three, with dropout


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def rows(workdir: Path) -> list[dict[str, Any]]:
    """Returns the rows of updates, without what depends on the clock."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "clips_per_second"} for row in found if "loss" in row]


def arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Returns everything in a checkpoint, by item and name."""
    found = {}
    for item in (TRAINABLE, REST):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            path = (workdir / "checkpoints" / str(step) / item).absolute()
            names = reader.metadata(path).item_metadata.tree
            args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
            found |= {f"{item} {k}": np.asarray(v) for k, v in reader.restore(path, ocp.args.PyTreeRestore(restore_args=args)).items()}
    return found


def newest(workdir: Path) -> int:
    """Returns the updates at the newest whole checkpoint, 0 before the first."""
    return (list_steps(workdir / "checkpoints") or [0])[-1]


def wait_for(process: subprocess.Popen[str], what: Callable[[], bool], seconds: float = 300) -> bool:
    """Waits until `what` holds; returns whether the process was still running then."""
    end = time.monotonic() + seconds
    while process.poll() is None:
        if what():
            return True
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)  # a fraction of a save
    return False


@pytest.fixture(scope="module")
def drawn(config: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run on two devices that nothing disturbed, with every kind of step and with dropout."""
    workdir = tmp_path_factory.mktemp("drawn") / "run"
    finish(command(config, workdir, steps=STEPS, **DRAWN), environment(cache, devices=2))
    return workdir


@pytest.mark.slow
def test_killed_ten_times_equals_never_killed_to_the_bit(config: Path, cache: Path, drawn: Path, tmp_path: Path) -> None:
    around, broken = environment(cache, devices=2), tmp_path / "broken"
    rng = random.Random(2025)
    saving = 0
    for kill in range(KILLS):
        more = newest(broken) + rng.randint(1, 2)
        process = start(command(config, broken, steps=STEPS, **DRAWN), around)
        moment = ("start", "save", "save", "update")[kill % 4]
        if moment == "start":
            time.sleep(rng.uniform(0.5, 4.0))
        elif moment == "save":
            if wait_for(process, lambda: any((broken / "checkpoints").glob("*.orbax-checkpoint-tmp"))):
                time.sleep(rng.uniform(0, 0.03))
                saving += any((broken / "checkpoints").glob("*.orbax-checkpoint-tmp"))
        elif wait_for(process, lambda more=more: newest(broken) >= more):
            time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run ended before it was killed; give it more updates"
    assert saving >= 2, "no kill came in the midst of a save"
    finish(command(config, broken, steps=STEPS, **DRAWN), around)
    assert rows(broken) == rows(drawn) and [row["step"] for row in rows(drawn)] == list(range(1, STEPS + 1))
    expected, found = arrays(drawn, STEPS), arrays(broken, STEPS)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.slow
def test_a_killed_data_worker_is_replaced_and_the_run_is_the_same(config: Path, cache: Path, drawn: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    process = start(command(config, workdir, steps=STEPS, data__workers=1, **DRAWN), environment(cache, devices=2))
    found: list[int] = []
    assert wait_for(process, lambda: bool(found.extend(workers_of(process.pid)) or found)), process.communicate()[0]
    os.kill(found[0], signal.SIGKILL)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    assert "a data worker died; step" in said
    assert rows(workdir) == rows(drawn)


def workers_of(parent: int) -> list[int]:
    """Returns the processes that a run has started to make batches."""
    found = []
    for number in (name for name in os.listdir("/proc") if name.isdecimal()):
        with contextlib.suppress(OSError):
            after = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
            if int(after[1]) == parent and b"spawn_main" in Path(f"/proc/{number}/cmdline").read_bytes():
                found.append(int(number))
    return found


@pytest.mark.slow
def test_from_shards_to_the_12_directions_with_stops_on_the_way(config: Path, cache: Path, tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM save; the run resumes; its workdir is a model that gives what was measured while training."""
    around, workdir = environment(cache, devices=2), tmp_path / "run"
    settings = {**DRAWN, "evaluation__manifest": config.parent / "clips" / "held_out.jsonl", "steps": STEPS}
    for name, status in ((signal.SIGINT, INTERRUPTED), (signal.SIGTERM, STOPPED_AND_SAVED)):
        more = newest(workdir) + 1
        process = start(command(config, workdir, **settings), around)
        assert wait_for(process, lambda more=more: newest(workdir) >= more), process.communicate()[0]
        process.send_signal(name)
        said = process.communicate(timeout=300)[0]
        assert process.returncode == status, said
        assert f"{newest(workdir)} of {STEPS} steps are saved" in said
    said = finish(command(config, workdir, **settings), around)
    assert "resuming from step" in said and f"held-out R@1 after step {STEPS}" in said
    table, result = tmp_path / "t.npz", tmp_path / "t.json"
    manifest = ["--manifest", str(settings["evaluation__manifest"]), "--workers", "0", "--batch-size", "4"]
    finish(omni_jax("embed", "--model", str(workdir), "--out", str(table), *manifest), around)  # as it was trained
    assert main(["eval", str(table), "--json", str(result)]) == 0
    measured, again = json.loads((workdir / "evaluations" / f"{STEPS}.json").read_text()), json.loads(result.read_text())
    assert again["n"] == CLIPS.held_out and len(again["directions"]) == 12
    for direction, figures in measured["directions"].items():
        assert figures["R@1"] == again["directions"][direction]["R@1"], direction
    # The last update once more, evaluated on shards of the held-out clips.
    prepared = tmp_path / "held_out"
    fields = [part for field in ("frames=2", "pixels=3136", "audio_seconds=1") for part in ("--set", field)]
    assert main(["prepare", "--out", str(prepared), *manifest[:4], *fields]) == 0
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    finish(command(config, workdir, **{**settings, "evaluation__manifest": prepared}), around)
    assert json.loads((workdir / "evaluations" / f"{STEPS}.json").read_text()) == measured
