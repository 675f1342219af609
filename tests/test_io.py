"""Files that appear whole or not at all, files that grow, and locks."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from omni_jax.io import GrowingText, WholeFile, atomic_write, atomic_write_text, lock, scratch_folder
from omni_jax.io.remote import absolute, check_holds_weights
from omni_jax.types import InputError


def test_a_file_takes_its_name_when_it_is_whole_and_leaves_the_old_one_otherwise(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    atomic_write_text(target, "雨\n")
    with pytest.raises(KeyboardInterrupt), atomic_write(target) as partial:
        partial.write_text("half")
        assert target.read_text(encoding="utf-8") == "雨\n" and partial.name.startswith(".a.txt.") and partial.suffix == ".unfinished"
        raise KeyboardInterrupt
    assert target.read_text(encoding="utf-8") == "雨\n" and os.listdir(tmp_path) == ["a.txt"]


class StoredObject:
    """An object of a store, which is replaced as a whole."""

    def __init__(self) -> None:
        self.versions: list[str] = []

    def __fspath__(self) -> str:
        return "gs://bucket/metrics.jsonl"

    def exists(self) -> bool:
        return bool(self.versions)

    def read_text(self) -> str:
        return self.versions[-1]

    def write_text(self, text: str) -> None:
        self.versions.append(text)


def test_an_object_that_grows_keeps_what_it_had_and_is_not_replaced_for_each_line(monkeypatch: pytest.MonkeyPatch) -> None:
    there: Any = StoredObject()
    first = GrowingText(there)
    first.write("1\n")
    first.write("2\n")
    assert there.versions == []
    first.sync()
    first.sync()
    first.write("3\n")  # and the process is killed
    assert there.versions == ["1\n2\n"]
    monkeypatch.setattr("omni_jax.io.files.PERIOD_S", 0.0)
    second = GrowingText(there, there.versions[-1])
    there.read_text = None  # it is not read again
    second.write("4\n")
    second.close()
    assert there.versions == ["1\n2\n", "1\n2\n4\n"]


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    one, other = WholeFile(tmp_path / "a"), WholeFile(tmp_path / "a")
    one.path.write_text("one")
    other.path.write_text("other")
    one.finish()
    other.finish()
    one.discard()
    assert (tmp_path / "a").read_text() == "other" and os.listdir(tmp_path) == ["a"]


def test_a_file_that_cannot_be_written_names_its_place_and_what_to_do(tmp_path: Path) -> None:
    place, error = tmp_path / "nowhere" / "a", r"nowhere/a: cannot be written \(No such file or directory\); choose another --out$"
    with pytest.raises(InputError, match=error), atomic_write(place, "choose another --out") as path:
        path.touch()
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match=r"/a: cannot be written \(Is a directory\); check that the folder exists and has space$"):
        atomic_write_text(tmp_path / "a", "")
    assert os.listdir(tmp_path) == ["a"]


def test_a_lock_holds_against_another_process_and_ends_with_it(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys\nfrom omni_jax.io import lock\n"
        "held = lock(pathlib.Path(sys.argv[1]))\nprint('held' if held else 'free no more', flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert lock(tmp_path / "lock") is None
        other.kill()
    held = lock(tmp_path / "lock")
    assert held is not None
    (tmp_path / "lock").unlink()  # as a run that ends removes its folder: the name is free for the next
    with held, lock(tmp_path / "lock") as again:  # type: ignore[union-attr]
        assert again is not None


def test_a_scratch_folder_of_a_killed_process_is_removed_and_that_of_another_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys\nfrom omni_jax.io import scratch_folder\n"
        "with scratch_folder('work') as made:\n    (made / 'half').write_text('x')\n    print(made, flush=True)\n    sys.stdin.read()"
    )
    command, around = [sys.executable, "-c", code], {**os.environ, "TMPDIR": str(tmp_path)}
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with subprocess.Popen(command, env=around, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        left = Path(other.stdout.readline().strip()).parent
        os.utime(left, (0, 0))
        with scratch_folder("work") as made:
            assert made.is_dir() and not list(made.iterdir()) and (left / "files" / "half").exists()
        other.kill()
    with scratch_folder("work") as made:
        assert os.listdir(tmp_path) == [made.parent.name]
    assert os.listdir(tmp_path) == []


def test_an_address_of_a_store_stays_one_and_weights_are_kept_where_orbax_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert os.fspath(absolute("gs://bucket/run")) == "gs://bucket/run" and os.fspath(absolute("run")) == str(tmp_path / "run")
    for place in ("gs://bucket/run", "run", tmp_path):
        check_holds_weights(place)
    with pytest.raises(InputError, match=r"^s3://bucket/run: weights can be kept on a disk or at gs:// alone; choose another place$"):
        check_holds_weights("s3://bucket/run")
