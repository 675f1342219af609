"""A workdir belongs to one run, and its checkpoints are models."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

from omni_jax.configs import tiny
from omni_jax.train import RunConfig
from omni_jax.train.checkpoint import Checkpoints
from omni_jax.train.workdir import (
    LATER,
    WorkdirConfig,
    check_workdir_free,
    claim_workdir,
    is_workdir,
    read_config,
    read_trained,
    read_workdir,
    run_lock,
    run_of,
    trained_fingerprints,
)
from omni_jax.types import InputError
from tests.train.random_batches import MODEL
from tests.train.states import state

RUN = RunConfig.from_config(tiny.get_config())
CONFIG = WorkdirConfig(RUN.to_json(), MODEL, "base", {"base weights": "b1", "adapter weights": None, "clips": "c1"}, 200)


def changed(**values: Any) -> WorkdirConfig:
    """Returns the config with dotted fields of the run replaced ("__" for a dot)."""
    run = RUN.to_json()
    for name, value in values.items():
        section, _, field = name.partition("__")
        if field:
            run[section][field] = value
        else:
            run[section] = value
    return dataclasses.replace(CONFIG, run=run)


def test_the_same_run_goes_on(tmp_path: Path) -> None:
    claim_workdir(tmp_path, CONFIG)
    claim_workdir(tmp_path, changed(mesh__fsdp=8, data__workers=7, log__every=9, checkpoint__keep=5))
    found = read_config(tmp_path)
    assert found is not None and run_of(found).mesh.fsdp == 8 and found.model == MODEL


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (changed(optimizer__learning_rate=0.5), r"optimizer\.learning_rate is 0\.002 there, 0\.5 here"),
        (changed(seed=3, batch__micro_batch=4), r"batch\.micro_batch is 48 there, 4 here; seed is 0 there, 3 here"),
        (dataclasses.replace(CONFIG, digests={**CONFIG.digests, "base weights": "b2"}), "its base weights differ"),
        (dataclasses.replace(CONFIG, digests={**CONFIG.digests, "clips": "c2"}), "its clips differ"),
        (dataclasses.replace(CONFIG, total_steps=9), "it has 200 steps, this one has 9"),
        (dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, lora=None)), r"architecture\.lora"),
    ],
)
def test_another_run_is_refused(tmp_path: Path, other: WorkdirConfig, message: str) -> None:
    claim_workdir(tmp_path, CONFIG)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(InputError, match=rf"holds another run: .*{message}") as caught:
        claim_workdir(tmp_path, other)
    assert "\n" not in str(caught.value) and (tmp_path / "config.json").read_bytes() == before


def test_digests_that_an_older_run_lacks_are_not_held_against_it(tmp_path: Path) -> None:
    later = dict.fromkeys(LATER, "d1")
    claim_workdir(tmp_path, CONFIG)
    claim_workdir(tmp_path, dataclasses.replace(CONFIG, digests={**CONFIG.digests, **later}))
    for name in LATER:
        with pytest.raises(InputError, match=f"holds another run: its {name} differ"):
            claim_workdir(tmp_path, dataclasses.replace(CONFIG, digests={**CONFIG.digests, **later, name: "d2"}))


def test_a_run_of_an_earlier_version_goes_on_under_the_new_names_of_its_fields(tmp_path: Path) -> None:
    old = CONFIG.to_json()
    weights = old["run"]["losses"].pop("weights")
    del old["run"]["losses"]["scalars"]
    old["run"]["losses"] |= {f"{name}_weight": value for name, value in weights.items()}
    (tmp_path / "config.json").write_text(json.dumps(old))
    with pytest.raises(InputError, match=r"losses\.weights\.tuple is 1\.0 there, 0\.5 here"):
        claim_workdir(tmp_path, changed(losses__weights={**weights, "tuple": 0.5}))
    claim_workdir(tmp_path, CONFIG)
    assert read_config(tmp_path) == CONFIG


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_text("")
    with pytest.raises(InputError, match=r"not empty \(holiday\.jpg\)"):
        claim_workdir(tmp_path, CONFIG)


def test_what_a_start_that_failed_left_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    for name in ("run.lock", "skipped_records.jsonl", "skipped_records.3.jsonl", "quarantine.jsonl"):
        (tmp_path / name).write_text("")
    check_workdir_free(tmp_path)
    (tmp_path / "skipped.txt").write_text("")
    with pytest.raises(InputError, match=r"not empty \(skipped\.txt\)"):
        check_workdir_free(tmp_path)


@pytest.mark.jit
def test_checkpoints_are_models(tmp_path: Path) -> None:
    claim_workdir(tmp_path, CONFIG)
    with pytest.raises(InputError, match="has no checkpoint yet"):
        read_workdir(tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3)
    for step in (2, 4):
        checkpoints.save(state(step))
    checkpoints.close()
    with pytest.raises(InputError, match="base weights are no longer at"):
        read_workdir(tmp_path)
    (tmp_path / "base").mkdir()
    assert is_workdir(tmp_path)
    for step, wanted in ((None, 4), (2, 2)):
        assert read_workdir(tmp_path, step) == (CONFIG, epath.Path(tmp_path) / "base", wanted)
        found = read_trained(tmp_path, wanted)
        assert sorted(found) == sorted(trained_fingerprints(tmp_path, wanted) or ()) == ["bridge/norm/scale", "head/fc1/kernel"]
        np.testing.assert_array_equal(found["head/fc1/kernel"], state(wanted).trainable["head/fc1/kernel"])
    with pytest.raises(InputError, match="no checkpoint of step 3; choose one of 2, 4"):
        read_workdir(tmp_path, 3)


def test_no_workdir_and_a_damaged_config_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not the workdir of a training run \(config\.json is missing\)"):
        read_workdir(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        read_config(tmp_path)


def test_two_runs_at_once_are_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time; from omni_jax.train.workdir import run_lock\n"
        "with run_lock(sys.argv[1]): print('held', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "w")], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another run is training here"), run_lock(tmp_path / "w"):
            pass
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    with run_lock(tmp_path / "w"):
        pass


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), run_lock(tmp_path / "file" / "w"):
        pass
