"""An ablation as its command makes it, at a minimal size, and what a kill in the midst of a run leaves of its table."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from omni_jax.ablation.runs import FIRST, TIMED, AblationCallbacks, _looked, score_of
from omni_jax.api.shared import Shared
from omni_jax.cli.config_file import read_config
from omni_jax.retrieval.directions import AVERAGES, DIRECTIONS
from omni_jax.types import InputError

ARGUMENTS = (
    *("--arms", "L_A", "--arm", "cooler=L_A --config.losses.temperature=0.05", "--seeds", "2", "--equal", "cpu_time"),
    *("--clips", "24", "8", "--config.batch.micro_batch=4", "--config.steps=12", "--config.checkpoint.every=4"),
    "--config.evaluation.truncate_dims=(4,32)",
)


def _start(out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "omni_jax", "ablate", *ARGUMENTS, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)


def _finish(out: Path) -> str:
    run = _start(out)
    said, _ = run.communicate(timeout=600)
    assert run.returncode == 0, said
    return said


@pytest.mark.slow
def test_a_killed_ablation_gives_the_same_table_bit_for_bit_when_it_is_run_again(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole" / "out", tmp_path / "killed" / "out"
    said = _finish(whole)
    table = json.loads((whole / "random-cpu_time.json").read_text())
    assert [arm["name"] for arm in table["arms"]] == ["L_A", "cooler"] and "ablate: 6/6 runs" in said
    first, second = table["arms"]
    figures = [*DIRECTIONS, *AVERAGES, "AVG-all@4", "AVG-all@32"]
    assert first["difference"] is None and list(second["difference"]) == list(second["R@1"]) == figures
    assert first["R@1"]["AVG-all@32"] == first["R@1"]["AVG-all"]  # all of its 32 dimensions
    assert first["steps"] == 12 and second["steps"] == max(1, round(12 * first["cpu_seconds_per_step"] / second["cpu_seconds_per_step"]))
    assert all(len(arm["R@1"]["t2v"]["seeds"]) == 2 for arm in table["arms"])
    assert 0 < table["ceilings"]["AVG-single"] <= 100 and table["command"].endswith("--out out")
    assert "cooler" in (whole / "random-cpu_time.html").read_text() and said.count("ceiling") == 1
    assert "omni-jax ablate --arms L_A --arm 'cooler=L_A " in (whole / "random-cpu_time.md").read_text()

    # What was measured is kept; the rest is made anew, and killed while the second seed trains.
    killed.mkdir(parents=True)
    shutil.copy(whole / "costs.json", killed)
    place = killed / "runs" / "random" / "L_A" / "12-seed1" / "checkpoints"
    run = _start(killed)
    until = time.monotonic() + 300
    while not any(place.glob("[48]")):
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate(timeout=60)
    assert not (killed / "random-cpu_time.json").exists()
    _finish(killed)
    for ending in ("json", "txt", "md", "html"):
        name = f"random-cpu_time.{ending}"
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_a_finished_run_is_used_again_and_one_of_another_config_is_refused(tmp_path: Path) -> None:
    run, calls = read_config("ablation", ["evaluation.manifest=held_out"]), []
    callbacks = AblationCallbacks(lambda *said: calls.append(said), lambda steps: None, lambda: None, lambda: False)
    (tmp_path / "score.json").write_text(json.dumps({"scores": {"t2v": 50.0}, "config": run.to_json()}))
    assert score_of(run, tmp_path, "L_A, seed 0", callbacks, Shared()) == {"t2v": 50.0} and calls == [("L_A, seed 0", 400, 400)]
    with pytest.raises(InputError, match="holds a run of another config; choose another --out"):
        score_of(dataclasses.replace(run, seed=1), tmp_path, "L_A, seed 1", callbacks, Shared())


def test_a_warm_start_is_reached_where_two_modalities_beat_the_better_one(tmp_path: Path) -> None:
    (tmp_path / "evaluations").mkdir()
    rates = dict.fromkeys(DIRECTIONS, 30.0) | {"t2a": 20.0, "t2v": 30.0, "t2av": 34.0, "a2t": 21.0, "v2t": 28.0, "av2t": 40.0}
    for step, found in ((100, rates), (200, rates | {"t2av": 35.0}), (1000, rates)):
        rows = {name: {"R@1": value} for name, value in found.items()}
        (tmp_path / "evaluations" / f"{step}.json").write_text(json.dumps({"directions": rows}))
    last, reached = _looked(tmp_path, 5.0)
    assert reached is not None and reached["steps"] == last["steps"] == 200 and reached["t2av"] == 35.0
    (tmp_path / "evaluations" / "200.json").unlink()
    last, reached = _looked(tmp_path, 5.0)
    assert reached is None and last["steps"] == 1000 and _looked(tmp_path, 4.0)[1] is not None
    for name in ("v2at", "at2v"):  # sound and caption together
        assert _looked(tmp_path, 5.0)[1] is None
        rates[name] = 35.0
        rows = {name: {"R@1": value} for name, value in rates.items()}
        (tmp_path / "evaluations" / "1000.json").write_text(json.dumps({"directions": rows}))
    assert _looked(tmp_path, 5.0)[1] is not None


def test_costs_are_timed_over_whole_periods_of_the_schedule_of_losses() -> None:
    assert FIRST % 3 == TIMED % 3 == 0
