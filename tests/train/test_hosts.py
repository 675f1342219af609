"""Hosts that do not fit together, or of which one is lost or stopped: a clear line, in time, and the last whole checkpoint."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from omni_jax.api import processes
from omni_jax.cli.status import BAD_INPUT, STOPPED_AND_SAVED
from omni_jax.parallel import distributed
from omni_jax.train.checkpoint import list_steps
from omni_jax.train.loop import DIGEST
from omni_jax.types import InputError
from tests.tolerances import assert_close
from tests.train.test_interruptions import PLAIN, newest, rows, wait_for
from tests.train.tiny_run import command, environment, finish, free_port, make_files, start

STEPS = 8
FIELDS = {"steps": 3, "data": {"train": "here", "distinct": "caption"}}


def others_say(monkeypatch: pytest.MonkeyPatch, *others: Any) -> None:
    """Lets further processes stand beside this one, which is process 0."""
    monkeypatch.setattr(processes, "process_allgather_str", lambda here: [here, *map(json.dumps, others)])


def test_settings_that_differ_are_named_with_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    same = {"steps": 3, "data.train": True, "data.distinct": "caption"}
    others_say(monkeypatch, same, same)
    processes.check_equal("the config", {**FIELDS, "data": {"train": "there", "distinct": "caption"}})
    others_say(monkeypatch, same, {**same, "steps": 4})
    with pytest.raises(InputError, match="the processes disagree on the config: steps is 3 in process 0 and 4 in process 2; start all"):
        processes.check_equal("the config", FIELDS)
    others_say(monkeypatch, {**same, "data.train": False})
    with pytest.raises(InputError, match=r"data\.train is True in process 0 and False in process 1"):
        processes.check_equal("the config", FIELDS)


def test_hosts_at_different_steps_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    others_say(monkeypatch, {"the newest checkpoint": None})
    message = "the processes disagree on where the run stands: the newest checkpoint is 40 in process 0 and None in process 1"
    with pytest.raises(InputError, match=message):
        processes.check_equal("where the run stands", {"the newest checkpoint": 40})


def test_alone_every_workdir_is_shared(tmp_path: Path) -> None:
    processes.check_equal("the config", FIELDS)
    processes.check_shared(epath.Path(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(config: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run on four devices that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    finish(command(config, workdir, steps=STEPS, **PLAIN), environment(cache, devices=4))
    return workdir


def pair_of(config: Path, cache: Path, workdirs: Sequence[Path], *changes: dict[str, Any]) -> list[Any]:
    """Starts a run as two processes of two devices, each with its workdir and its changes of the config."""
    address, around = f"127.0.0.1:{free_port()}", environment(cache, devices=2) | {distributed.LOST: "20"}
    flags = [("--coordinator", address, "--processes", "2", "--process", str(i)) for i in range(2)]
    settings = [{**PLAIN, "steps": STEPS, **(changes[i] if changes else {})} for i in range(2)]
    return [start(command(config, workdirs[i], *flags[i], **settings[i]), around) for i in range(2)]


def ended(pair: list[Any]) -> list[str]:
    """Returns the last line of each of two processes, which must both have refused."""
    try:
        said = [process.communicate(timeout=300)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [BAD_INPUT] * 2, said
    return [text.strip().splitlines()[-1] for text in said]


@pytest.mark.slow
def test_two_hosts_that_do_not_fit_together_both_say_so(config: Path, cache: Path, tmp_path: Path) -> None:
    first, second, file = tmp_path / "first", tmp_path / "second", tmp_path / "file"
    file.write_text("")
    for folder in (first, second):
        folder.mkdir()
    lines = ended(pair_of(config, cache, [first, first], {}, {"optimizer__learning_rate": 0.5}))
    message = "omni-jax: the processes disagree on the config: optimizer.learning_rate is 0.003 in process 0 and 0.5 in process 1; "
    assert all(line.startswith(message) for line in lines), lines
    lines = ended(pair_of(config, cache, [first, second]))
    assert "process 0 does not see what process 1 writes there; give all processes one --workdir on storage" in lines[0]
    assert "process 1 does not see what process 0 writes there" in lines[1]
    lines = ended(pair_of(config, cache, [first, file / "below"]))
    assert "another process failed; see its own message" in lines[0]
    assert "process 1 cannot write there (Not a directory); give all processes one --workdir" in lines[1]
    # A host whose clips cannot be opened takes the others with it.
    lines = ended(pair_of(config, cache, [first, first], {}, {"data__train": tmp_path / "nowhere.jsonl"}))
    assert "another process failed" in lines[0] and "nowhere.jsonl" in lines[1]
    assert [p.name for p in first.iterdir()] == ["run.lock"] and list(second.iterdir()) == []


@pytest.mark.slow
def test_two_hosts_of_which_one_is_killed_and_one_stopped_end_as_one_host(config: Path, cache: Path, whole: Path, tmp_path: Path) -> None:
    """A kill within a save leaves the checkpoint before, and both go on from it. SIGTERM to one stops both after saving. One process with
    all devices continues with the same batches."""
    moved = tmp_path / "moved"
    pair = pair_of(config, cache, [moved, moved])
    try:
        folder = moved / "checkpoints"
        assert wait_for(pair[0], lambda: bool(list_steps(folder)) and any(folder.glob("*.orbax-checkpoint-tmp"))), pair[0].communicate()[0]
        pair[1].send_signal(signal.SIGKILL)
        last = pair[0].communicate(timeout=300)[0]
    finally:
        for process in pair:
            process.kill()
    # Without heartbeats of the other one jax ends this process, or the save fails first; both say what is the matter.
    assert pair[0].returncode not in (0, None), last
    assert "tasks are unhealthy (stopped sending heartbeats)" in last or "; checkpoint" in last.strip().splitlines()[-1]
    left = newest(moved)
    assert 0 < left < STEPS
    pair = pair_of(config, cache, [moved, moved])
    try:
        assert wait_for(pair[0], lambda: newest(moved) > left), pair[0].communicate()[0]
        pair[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=300)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [STOPPED_AND_SAVED] * 2, said
    assert f"resuming from step {left}" in said[0] and left < newest(moved) < STEPS
    finish(command(config, moved, steps=STEPS, **PLAIN), environment(cache, devices=4))
    ours, theirs = rows(moved), rows(whole)
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine[DIGEST] == other[DIGEST]  # the same global batches in the same order
        assert mine["used_tokens"] == other["used_tokens"]
        for name in ("loss", "L_T", "L_D", "L_A"):
            assert_close(mine[name], other[name], "update_loss")


@pytest.mark.slow
def test_where_the_data_of_one_process_fail_both_save_and_end(config: Path, cache: Path, tmp_path: Path) -> None:
    """The second process reads a copy of the shards, which is damaged while it trains."""
    workdir, copy = tmp_path / "run", tmp_path / "shards"
    shutil.copytree(config.parent / "shards", copy)
    pair = pair_of(
        config, cache, [workdir, workdir], *({"data__train": source, "steps": 400} for source in (config.parent / "shards", copy))
    )
    try:
        assert wait_for(pair[0], lambda: bool(list_steps(workdir / "checkpoints"))), pair[0].communicate()[0]
        for shard in copy.glob("*.array_record*"):
            with shard.open("r+b") as file:
                file.write(bytes(shard.stat().st_size))
        said = [process.communicate(timeout=300)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [BAD_INPUT] * 2, said
    step = newest(workdir)
    assert f"the data of another process failed, see its own message; step {step} is saved" in said[0].splitlines()[-1]
    assert "a clip cannot be used and no other can replace it" in said[1].splitlines()[-1]
    assert [row["step"] for row in rows(workdir)] == list(range(1, step + 1))
