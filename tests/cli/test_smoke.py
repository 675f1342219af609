"""`omni-jax smoke`: sizes that fit any pod; the job itself runs in tests/launch/test_end_to_end.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from omni_jax.cli.main import main
from omni_jax.cli.smoke import batch_sizes, clips_for, mesh_sizes
from omni_jax.types import InputError


@pytest.mark.parametrize(
    ("devices", "processes", "slices"), [(1, 1, 1), (4, 1, 1), (16, 4, 1), (256, 64, 1), (512, 128, 2), (8, 8, 1), (24, 6, 3), (2, 2, 2)]
)
def test_sizes_fit_any_pod(devices: int, processes: int, slices: int) -> None:
    batch, mesh = batch_sizes(devices, processes), mesh_sizes(devices, devices // processes, slices)
    assert mesh["slices"] * mesh["data"] * mesh["fsdp"] * mesh["tensor"] == devices
    assert batch["micro_batch"] % devices == 0 or devices == 1
    assert batch["blocks"] % processes == 0
    assert batch["micro_batch"] // batch["blocks"] >= 2  # a shuffle without fixed points needs two
    assert clips_for(batch["micro_batch"]).combinations > batch["micro_batch"]


def test_slices_that_are_none() -> None:
    with pytest.raises(InputError, match="8 devices are not so many equal slices"):
        mesh_sizes(8, 4, 3)
    with pytest.raises(InputError, match="at most 624"):
        clips_for(1024)


def test_bad_arguments_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["smoke"]) == 2
    assert main(["smoke", "--workdir", str(tmp_path / "run"), "--scratch", str(tmp_path / "file")]) == 2
    assert main(["smoke", "--workdir", str(tmp_path / "run"), "--slices", "0"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("omni-jax: ")]
    assert len(lines) == 3
    assert "--workdir" in lines[0] and "name another --scratch" in lines[1] and "--slices 0" in lines[2]
