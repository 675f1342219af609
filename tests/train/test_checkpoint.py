"""Checkpoints: whole or absent, on any mesh, of this run alone."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from omni_jax.parallel import make_mesh
from omni_jax.train.checkpoint import Checkpoints, list_steps, read_trainable
from omni_jax.types import InputError
from tests.full_disk import files_of_at_most
from tests.repository import ROOT
from tests.train.states import assert_equal, state

pytestmark = pytest.mark.jit


def saved(folder: Path, *steps: int, keep: int = 3) -> None:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(state(step))
    checkpoints.wait()
    checkpoints.close()


def test_the_newest_comes_back_and_old_ones_go(tmp_path: Path) -> None:
    saved(tmp_path / "c", 1, 2, 3, 5, keep=2)
    checkpoints = Checkpoints(tmp_path / "c", 2)
    restored = checkpoints.restore(state(0))
    assert restored is not None
    assert_equal(restored, state(5))
    assert list_steps(tmp_path / "c") == [3, 5] and checkpoints.newest() == 5
    checkpoints.save(state(5))  # there already: nothing happens
    checkpoints.close()
    np.testing.assert_array_equal(read_trainable(tmp_path / "c", 3)["head/fc1/kernel"], state(3).trainable["head/fc1/kernel"])


def test_nothing_saved_restores_nothing(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", 2)
    assert checkpoints.restore(state(0)) is None and checkpoints.newest() is None
    assert list_steps(tmp_path / "elsewhere") == []
    checkpoints.close()


def test_another_mesh_takes_it(tmp_path: Path) -> None:
    first = Checkpoints(tmp_path / "c", 2)
    first.save(state(4, make_mesh(fsdp=8)))
    first.wait()
    first.close()
    for mesh in (make_mesh(data=4, fsdp=2), make_mesh(fsdp=2, devices=jax.devices()[:2]), None):
        checkpoints = Checkpoints(tmp_path / "c", 2)
        like = state(0, mesh)
        restored = checkpoints.restore(like)
        assert restored is not None
        assert_equal(restored, state(4))
        assert [x.sharding for x in jax.tree.leaves(restored)] == [x.sharding for x in jax.tree.leaves(like)]
        checkpoints.close()


def test_a_saved_state_is_not_the_one_that_is_given_away(tmp_path: Path) -> None:
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path / "c", 2)
    given = state(6)
    checkpoints.save(given)
    overwrite(given)
    checkpoints.wait()
    restored = checkpoints.restore(state(0))
    assert restored is not None
    assert_equal(restored, state(6))
    checkpoints.close()


def test_a_half_written_one_is_not_taken(tmp_path: Path) -> None:
    saved(tmp_path / "c", 1, 2)
    half = tmp_path / "c" / "3.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "c" / "2", half)
    checkpoints = Checkpoints(tmp_path / "c", 3)
    restored = checkpoints.restore(state(0))
    assert restored is not None and int(restored.step) == 2
    checkpoints.save(state(3))  # waits until what was half written is gone: Orbax removes it in the background
    checkpoints.wait()
    checkpoints.close()
    assert list_steps(tmp_path / "c") == [1, 2, 3] and not half.exists()


def test_a_damaged_one_is_set_aside(tmp_path: Path) -> None:
    saved(tmp_path / "c", 1, 2)
    for file in (tmp_path / "c" / "2").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")
    checkpoints = Checkpoints(tmp_path / "c", 3)
    restored = checkpoints.restore(state(0))
    assert restored is not None
    assert_equal(restored, state(1))
    assert "checkpoint 2 is damaged" in checkpoints.notes[0] and (tmp_path / "c" / "2.damaged").exists()
    checkpoints.save(state(2))
    checkpoints.wait()
    checkpoints.close()
    assert list_steps(tmp_path / "c") == [1, 2]


def rewrite(folder: Path, item: str, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Changes stored values as Orbax itself writes them: readable, and not what was saved."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as files:
        values = {name: np.array(x) for name, x in files.restore(folder / item).items()}
        change(values)
        shutil.rmtree(folder / item)
        files.save(folder / item, values)


def huge(values: dict[str, np.ndarray]) -> None:
    name = next(name for name in values if name.endswith(".mu.head.fc1.kernel"))
    values[name][0, 0] = 2.4e38


def counted(values: dict[str, np.ndarray]) -> None:
    values["skipped"] += 1


def zeroed(values: dict[str, np.ndarray]) -> None:
    values["head.fc1.kernel"][:] = 0


@pytest.mark.parametrize(("item", "change"), [("rest", huge), ("rest", counted), ("trainable", zeroed)])
def test_values_that_are_not_those_saved_are_set_aside(tmp_path: Path, item: str, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    saved(tmp_path / "c", 1, 2)
    rewrite(tmp_path / "c" / "2", item, change)
    if item == "trainable":
        with pytest.raises(InputError, match=r"2/trainable: cannot be read \(.* head/fc1/kernel holds other values than were saved\)"):
            read_trainable(tmp_path / "c", 2)
    checkpoints = Checkpoints(tmp_path / "c", 3)
    restored = checkpoints.restore(state(0, make_mesh(fsdp=8)))
    assert restored is not None
    assert_equal(restored, state(1))
    assert "holds other values than were saved" in checkpoints.notes[0] and (tmp_path / "c" / "2.damaged").exists()
    checkpoints.close()


def test_a_checkpoint_of_an_earlier_version_has_no_digests_and_is_taken(tmp_path: Path) -> None:
    saved(tmp_path / "c", 1)
    shutil.rmtree(tmp_path / "c" / "1" / "digests")
    checkpoints = Checkpoints(tmp_path / "c", 3)
    restored = checkpoints.restore(state(0))
    assert restored is not None
    assert_equal(restored, state(1))
    checkpoints.close()


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        MemoryError("no memory"),
        ValueError("UNAVAILABLE: the service does not answer [tensorstore_spec='...']"),
        OSError(errno.EIO, "Input/output error"),
    ],
    ids=["permission", "memory", "storage", "disk"],
)
def test_one_that_cannot_be_reached_is_not_taken_for_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    saved(tmp_path / "c", 1, 2)
    checkpoints = Checkpoints(tmp_path / "c", 3)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(ocp.CheckpointManager, "restore", fail)
    with pytest.raises(InputError, match=r"c/2: could not be read \(.*\); it may be intact: check storage and memory"):
        checkpoints.restore(state(0))
    checkpoints.close()
    assert list_steps(tmp_path / "c") == [1, 2]


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "c", 1)
    checkpoints = Checkpoints(tmp_path / "c", 3)
    with pytest.raises(InputError, match=r"another architecture or recipe \(trainable head/fc1/kernel is \(8, 4\) there, \(6, 4\) here\)"):
        checkpoints.restore(state(0, rows=6))
    checkpoints.close()
    assert list_steps(tmp_path / "c") == [1]


def test_a_full_disk_stops_with_one_line_and_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    saved(tmp_path / "c", 1)
    checkpoints = Checkpoints(tmp_path / "c", 3)
    told = r"could not be written .*; checkpoint 1 is whole; check disk space and permissions"
    with files_of_at_most(16), pytest.raises(InputError, match=told) as caught:
        checkpoints.save(state(2))
        checkpoints.wait()
    assert "\n" not in str(caught.value)
    again = Checkpoints(tmp_path / "c", 3)
    restored = again.restore(state(0))
    assert restored is not None
    assert_equal(restored, state(1))
    again.close()


def test_what_nobody_waited_for_is_told_when_it_could_not_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path / "c", 1)
    checkpoints = Checkpoints(tmp_path / "c", 3)
    with files_of_at_most(16):
        checkpoints.save(state(2))
        checkpoints.close()
    told = r"warning: .* a checkpoint could not be written \(File too large\); checkpoint 1 is whole; .*"
    assert len(caplog.messages) == 1 and re.fullmatch(told, caplog.messages[0])


@pytest.mark.parametrize(
    ("logger", "said", "told"),
    [
        ("asyncio", "_GatheringFuture exception was never retrieved\nfuture: <ValueError('writing c/2.orbax-checkpoint-tmp/rest')>", False),
        ("asyncio", "Task exception was never retrieved\nfuture: <Task coro=<mine()> exception=KeyError(1)>", True),
        ("asyncio", "Executing <Handle> took 0.2 seconds; the folder is orbax-runs", True),
    ],
)
def test_only_what_a_failed_save_leaves_is_silenced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, logger: str, said: str, told: bool
) -> None:
    Checkpoints(tmp_path / "c", 3).close()
    logging.getLogger(logger).error(said)
    assert (said in caplog.text) == told


_FULL = """
import resource, sys
from pathlib import Path
from omni_jax.train.checkpoint import Checkpoints
from omni_jax.types import InputError
from tests.full_disk import files_of_at_most
from tests.repository import ROOT
from tests.train.states import state

checkpoints = Checkpoints(Path(sys.argv[1]), 3)
checkpoints.save(state(1))
checkpoints.wait()
with files_of_at_most(16):
    try:
        checkpoints.save(state(2))
        checkpoints.wait()
    except InputError as error:
        print(error)
    checkpoints.close()
"""


def test_nothing_else_is_printed_when_the_disk_is_full(tmp_path: Path) -> None:
    """Orbax, asyncio and TensorStore print hundreds of lines of a write that fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run([sys.executable, "-c", _FULL, str(tmp_path / "c")], env=environment, capture_output=True, text=True, timeout=300)
    told = "a checkpoint could not be written (File too large); checkpoint 1 is whole; check disk space and permissions and run it again"
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{tmp_path / 'c'}: {told}\n", "")


def test_a_folder_that_is_lost_while_training_is_one_line_and_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    """A file in the place of the folder refuses writes for root as well, which a read-only folder would not."""
    saved(tmp_path / "c", 1)
    checkpoints = Checkpoints(tmp_path / "c", 3)
    (tmp_path / "c").rename(tmp_path / "aside")
    (tmp_path / "c").write_text("")
    with pytest.raises(InputError, match="checkpoint 2 could not be written") as caught:
        checkpoints.save(state(2))
        checkpoints.wait()
    assert "\n" not in str(caught.value)
    (tmp_path / "c").unlink()
    (tmp_path / "aside").rename(tmp_path / "c")
    again = Checkpoints(tmp_path / "c", 3)
    restored = again.restore(state(0))
    assert restored is not None
    assert_equal(restored, state(1))
    again.close()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        Checkpoints(tmp_path / "file" / "c", 3)
