"""The short form of part `faults`: what is expected of a run that cannot save, of commands that stand for one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.torture import faults
from tools.torture.outcome import Outcome

LINE = "omni-jax: runs/x/checkpoints: a checkpoint could not be written (No space left on device); checkpoint 2 is whole"


def _script(text: str, status: int) -> list[str]:
    return [sys.executable, "-c", f"import sys; print({text!r}); sys.exit({status})"]


@pytest.mark.parametrize(
    ("said", "status", "again", "lost"),
    [
        (LINE, 2, 0, []),
        (f"Traceback\n{LINE}", 2, 0, ["full disk: status 2"]),
        (f"{LINE}\nRuntimeWarning: never awaited", 2, 0, ["full disk: status 2"]),
        (LINE, 0, 0, ["full disk: status 0"]),
        (LINE, 2, 1, ["after a full disk: status 1"]),
    ],
)
def test_a_run_that_cannot_save_says_one_line_and_is_gone_on_with(
    tmp_path: Path, said: str, status: int, again: int, lost: list[str]
) -> None:
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    outcome = Outcome("faults", 0)
    process = subprocess.Popen(_script(said, status), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    faults._refused_and_gone_on_with(outcome, "full disk", process, tmp_path, _script("resuming from step 2", again), dict(os.environ))
    assert [line.split(",")[0] for line in outcome.lost] == lost


def test_a_checkpoint_that_is_gone_is_a_loss(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "2"
    folder.mkdir(parents=True)
    outcome = Outcome("faults", 0)
    code = f"import os; os.rmdir({os.fspath(folder)!r}); print({LINE!r}); raise SystemExit(2)"
    process = subprocess.Popen(
        [sys.executable, "-c", f"import time; time.sleep(1); {code}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    faults._refused_and_gone_on_with(outcome, "full disk", process, tmp_path, _script("resuming from step 2", 0), dict(os.environ))
    assert outcome.lost == ["full disk: the checkpoint before it is gone"]
