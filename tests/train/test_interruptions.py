"""A run that is killed, stopped or moved to other devices is the run that was never interrupted."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

from omni_jax.cli.status import INTERRUPTED, STOPPED_AND_SAVED
from omni_jax.train.checkpoint import REST, TRAINABLE, steps_of
from tests.tolerances import assert_close
from tests.train.tiny_run import CLIPS, command, environment, finish, free_port, make_files, omni_jax, start

KILLS = 10
STEPS = 24
PLAIN: dict[str, Any] = {"evaluation__manifest": "", "losses__hn_audio_only": True, "checkpoint__every": 1}  # one kind of step: one program


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
    return (steps_of(workdir / "checkpoints") or [0])[-1]


def wait_for(process: subprocess.Popen[str], what: Callable[[], bool], seconds: float = 300) -> bool:
    """Waits until `what` holds; returns whether the process was still running then."""
    end = time.monotonic() + seconds
    while process.poll() is None:
        if what():
            return True
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)
    return False


@pytest.mark.slow
def test_killed_ten_times_equals_never_killed_to_the_bit(config: Path, cache: Path, tmp_path: Path) -> None:
    around = environment(cache, devices=2)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(command(config, whole, steps=STEPS, **PLAIN), around)
    rng = random.Random(2025)
    saving = 0
    for kill in range(KILLS):
        more = newest(broken) + rng.randint(1, 2)
        process = start(command(config, broken, steps=STEPS, **PLAIN), around)
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
    finish(command(config, broken, steps=STEPS, **PLAIN), around)
    assert rows(broken) == rows(whole) and [row["step"] for row in rows(whole)] == list(range(1, STEPS + 1))
    expected, found = arrays(whole, STEPS), arrays(broken, STEPS)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.slow
def test_two_processes_of_four_devices_go_on_as_one_of_eight(config: Path, cache: Path, tmp_path: Path) -> None:
    """SIGTERM to one of two processes stops both after saving; one process with all devices goes on with the same batches."""
    steps = 6
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    finish(command(config, whole, steps=steps, **PLAIN), environment(cache, devices=8))
    address = f"127.0.0.1:{free_port()}"
    pair = [
        start(
            command(config, moved, "--coordinator", address, "--processes", "2", "--process", str(i), steps=steps, **PLAIN),
            environment(cache, devices=4),
        )
        for i in range(2)
    ]
    try:
        assert wait_for(pair[0], lambda: bool(steps_of(moved / "checkpoints"))), pair[0].communicate()[0]
        pair[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=300)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [STOPPED_AND_SAVED] * 2, said
    stopped = newest(moved)
    assert 0 < stopped < steps
    finish(command(config, moved, steps=steps, **PLAIN), environment(cache, devices=8))
    ours, theirs = rows(moved), rows(whole)
    assert [row["step"] for row in ours] == list(range(1, steps + 1))
    # Tokens and captions of all processes together, and losses: another clip or another order would show in both.
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["used_tokens"] == other["used_tokens"]
        for name in ("loss", "L_T", "L_D", "L_A"):
            assert_close(mine[name], other[name], "update_loss")


@pytest.mark.slow
def test_from_shards_to_the_12_directions_with_stops_on_the_way(config: Path, cache: Path, tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM save; the run goes on; its workdir is a model that gives what was measured while training."""
    around, workdir = environment(cache, devices=2), tmp_path / "run"
    settings = {**PLAIN, "evaluation__manifest": config.parent / "clips" / "held_out.jsonl", "steps": 40}
    for name, status in ((signal.SIGINT, INTERRUPTED), (signal.SIGTERM, STOPPED_AND_SAVED)):
        more = newest(workdir) + 1
        process = start(command(config, workdir, **settings), around)
        assert wait_for(process, lambda more=more: newest(workdir) >= more), process.communicate()[0]
        process.send_signal(name)
        said = process.communicate(timeout=300)[0]
        assert process.returncode == status, said
        assert f"{newest(workdir)} of 40 updates are saved" in said
    other = finish(command(config, workdir, **{**settings, "optimizer__learning_rate": 0.5}), around, status=2)
    assert "holds another run: optimizer.learning_rate is 0.003 there, 0.5 here" in other.splitlines()[-1]
    said = finish(command(config, workdir, **settings), around)
    assert "going on after update" in said and "held-out R@1 after update 40" in said
    table, result = tmp_path / "t.npz", tmp_path / "t.json"
    fields = [part for field in ("frames=2", "pixels=3136", "audio_seconds=1") for part in ("--set", field)]
    manifest = ["--manifest", str(settings["evaluation__manifest"]), "--workers", "0", "--batch-size", "4"]
    finish(omni_jax("embed", "--model", str(workdir), "--out", str(table), *manifest, *fields), around)
    finish(omni_jax("eval", str(table), "--json", str(result)), around)
    measured, again = json.loads((workdir / "evaluations" / "40.json").read_text()), json.loads(result.read_text())
    assert again["n"] == CLIPS.held_out and len(again["directions"]) == 12
    for direction, figures in measured["directions"].items():
        assert figures["R@1"] == again["directions"][direction]["R@1"], direction
