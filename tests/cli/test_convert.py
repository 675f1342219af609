"""`omni-jax convert`, as a user calls it."""

import os
import re
import signal

import pytest

from omni_jax.cli.main import main
from omni_jax.cli.progress import Progress
from tests.conversion import checkpoints
from tests.conversion.test_round_trip import assert_same_tensors, beats_file


@pytest.mark.jit
def test_golden_there_and_back(golden, tmp_path, capsys):
    model, base, adapter = (str(tmp_path / name) for name in ("model", "base", "adapter"))
    source = ["--base", str(golden.checkpoint), "--adapter", str(golden.adapter_dir)]
    assert main(["convert", "to-jax", *source, "--out", model]) == 0
    out = capsys.readouterr().out
    assert re.fullmatch(r".*/model \(dtype keep\): \d+ tensors, [\d,]+ parameters, [\d,]+ bytes, [\d.]+ s\n", out)
    assert main(["convert", "to-torch", "--model", model, "--base-out", base, "--adapter-out", adapter]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert_same_tensors(checkpoints.read_folder(tmp_path / "base"), checkpoints.read_folder(golden.checkpoint))
    assert_same_tensors(checkpoints.read_folder(tmp_path / "adapter"), checkpoints.read_folder(golden.adapter_dir))


@pytest.mark.parametrize("direction", ["to-jax", "to-torch"])
def test_help_ends_with_an_example(direction, capsys):
    assert main(["convert", direction, "--help"]) == 0
    assert capsys.readouterr().out.rstrip().splitlines()[-1].strip().startswith(f"omni-jax convert {direction} --")


@pytest.mark.jit
@pytest.mark.parametrize("direction", ["to-jax", "to-torch"])
def test_sigterm_leaves_nothing_and_is_one_line(direction, tmp_path, capsys, monkeypatch):
    base = checkpoints.write_base(tmp_path / "base", checkpoints.tensors(checkpoints.model_config()))
    beats_file(base / "BEATs.pt")
    call = ["convert", "to-jax", "--base", str(base), "--out", str(tmp_path / "model")]
    if direction == "to-torch":
        assert main(call) == 0
        call = ["convert", "to-torch", "--model", str(tmp_path / "model"), "--base-out", str(tmp_path / "out")]
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Progress, "update", lambda *_: os.kill(os.getpid(), signal.SIGTERM))  # once weights are being written
    assert main(call) == 143
    assert "stopped by SIGTERM" in capsys.readouterr().err.splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before
    assert signal.getsignal(signal.SIGTERM) == handler


def test_bad_input_is_one_line_and_status_2(tmp_path, capsys):
    assert main(["convert", "to-jax", "--base", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "none: no such folder" in error
    assert not list(tmp_path.iterdir())
