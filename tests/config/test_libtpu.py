"""Where libtpu is installed and there is no TPU, nothing is printed about it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from omni_jax.config.libtpu import NO_TPU, silence_libtpu
from tests.golden_set import GoldenSet


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu" or None)


def device(root: Path, vendor: str, number: str) -> Path:
    folder = root / "sys/bus/pci/devices/0000:00:04.0"
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "device").write_text(f"{number}\n")
    return root


@pytest.mark.parametrize(("vendor", "number"), [("0x1ae0", "0x0042"), ("0x10de", "0x2330")])
def test_a_machine_without_a_tpu_is_quiet_and_what_the_user_set_stays(tmp_path: Path, installed: None, vendor: str, number: str) -> None:
    environment = {"TPU_MIN_LOG_LEVEL": "0"}
    silence_libtpu(environment, device(tmp_path, vendor, number))
    assert environment == NO_TPU | {"TPU_MIN_LOG_LEVEL": "0"}


def test_a_machine_with_a_tpu_is_left_alone(tmp_path: Path, installed: None) -> None:
    (tmp_path / "accel/dev").mkdir(parents=True)
    (tmp_path / "accel/dev/accel0").touch()
    for root in (device(tmp_path / "pci", "0x1ae0", "0x0063"), tmp_path / "accel"):
        environment: dict[str, str] = {}
        silence_libtpu(environment, root)
        assert environment == {}


def test_who_asks_for_a_tpu_or_has_no_libtpu_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for found, environment in ((True, {"JAX_PLATFORMS": "tpu,cpu"}), (False, {})):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=found: found or None)
        before = dict(environment)
        silence_libtpu(environment, tmp_path)
        assert environment == before


@pytest.mark.tpu
@pytest.mark.parametrize("platforms", ["", "cpu"])
def test_golden_checkpoint_is_converted_without_a_line_of_libtpu(tmp_path: Path, golden: GoldenSet, platforms: str) -> None:
    unset = {"JAX_PLATFORMS", *NO_TPU}
    environment = {name: value for name, value in os.environ.items() if name not in unset} | (
        {"JAX_PLATFORMS": platforms} if platforms else {}
    )
    command = [sys.executable, "-m", "omni_jax.cli.main", "convert", "to-jax", "--base", str(golden.dir / "checkpoint")]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], env=environment, capture_output=True, text=True, check=True)
    assert [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and not line.startswith("convert to-jax")] == []
