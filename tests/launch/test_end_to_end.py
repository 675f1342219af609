"""Two processes of two devices started by launch/local.sh: one is killed, all start again, and the run ends as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from omni_jax.cli.main import main
from tests.repository import ROOT
from tests.train.test_interruptions import arrays, newest, rows, wait_for
from tests.train.tiny_run import environment, finish, free_port, make_files

STEPS = 8


def children(process: int) -> dict[str, int]:
    """Returns the processes that the script started: number in the run -> process id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(") ")[2].split()[1]) == process:
                told = dict(item.partition("=")[::2] for item in (folder / "environ").read_text().split("\0"))
                found[told.get("OMNI_JAX_PROCESS", "")] = int(folder.name)
        except OSError:  # ended meanwhile
            continue
    return found


@pytest.mark.slow
def test_a_run_that_loses_a_process_starts_again_and_ends_with_the_same_adapter(tmp_path: Path) -> None:
    config = make_files(tmp_path)
    around = environment(tmp_path / "cache") | {"OMNI_JAX": f"{sys.executable} -m omni_jax.cli.main"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def command(workdir: Path, *more: str) -> list[str]:
        options = ["--processes", "2", "--devices", "2", "--port", str(free_port()), "--restarts", "2", "--grace", "5"]
        changes = [f"--config.steps={STEPS}", "--config.checkpoint.every=2", "--config.losses.hn_audio_only=true", "--config.mesh.fsdp=2"]
        sizes = ["--config.mesh.data=2", "--config.batch.micro_batch=8", "--config.model.lora.rank=2", "--config.model.lora.alpha=4.0"]
        run = ["train", "--config", str(config), "--workdir", str(workdir), *changes, *sizes, *more]
        return [str(ROOT / "launch" / "local.sh"), *options, "--", *run]

    finish(command(whole, "--config.evaluation.manifest="), around)
    process = subprocess.Popen(command(broken), env=around, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert wait_for(process, lambda: newest(broken) >= 2), process.communicate()[0]
        os.kill(children(process.pid)["1"], signal.SIGKILL)
        said = process.communicate(timeout=400)[0]
    finally:
        process.terminate()
    assert process.returncode == 0, said
    assert "a process was lost" in said and "resuming from step" in said
    assert rows(broken) == rows(whole)
    expected, found = arrays(whole, STEPS), arrays(broken, STEPS)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert (broken / "evaluations" / f"{STEPS}.json").exists()
    for workdir in (whole, broken):
        out = ["--base-out", f"{workdir}-base", "--adapter-out", f"{workdir}-adapter"]
        assert main(["convert", "to-torch", "--model", str(workdir), *out]) == 0
    adapters = [(Path(f"{workdir}-adapter") / "adapter_model.safetensors").read_bytes() for workdir in (whole, broken)]
    assert adapters[0] == adapters[1]


@pytest.mark.slow
def test_the_smoke_job_of_two_processes_passes_and_leaves_nothing(tmp_path: Path) -> None:
    around = environment(tmp_path / "cache") | {"OMNI_JAX": f"{sys.executable} -m omni_jax.cli.main"}
    start = [str(ROOT / "launch" / "local.sh"), "--processes", "2", "--devices", "2", "--port", str(free_port())]
    config = make_files(tmp_path)
    run = ["smoke", "--config", str(config), "--workdir", str(tmp_path / "run"), "--scratch", str(tmp_path / "scratch")]
    said = finish([*start, "--", *run], around)
    assert "process 0 of 2" in said and "process 1 of 2" in said
    assert "smoke: passed: 2 processes, 4 devices" in said and "one step, loss" in said
    assert list((tmp_path / "run").iterdir()) == []
