"""The journal of an embedding pass: what is kept is whole, bound to its settings, and readable after a kill."""

from __future__ import annotations

import dataclasses
import fcntl
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from omni_jax.retrieval.embedding_pass import Part, assemble
from omni_jax.retrieval.journal import Journal
from omni_jax.types import InputError, Record

SETTINGS = {"tables": ("text",), "dtype": "keep"}


def _part(*numbers: int, problems: tuple[tuple[str, str], ...] = ()) -> Part:
    rows = {"text": np.array([[n, 0.5] for n in numbers], np.float32)} if numbers else {}
    return Part(tuple(f"clip{n}" for n in numbers), rows, problems, (("clip9", "silence"),), 3, 4, 1)


def test_what_was_added_is_read_back(tmp_path: Path):
    parts = [_part(0, 1), _part(3, problems=(("clip2", "clip2.mp4: broken"),)), _part(problems=(("clip4", "gone"),))]
    shapes = {"rows": [(1, 64, 4), (2, 128, 8)], "vision": []}
    parts[1] = dataclasses.replace(parts[1], shapes=shapes)
    journal = Journal(tmp_path / "j", SETTINGS)
    for part in parts:
        journal.add(part)
    del journal  # its process has ended
    again = Journal(tmp_path / "j", SETTINGS)
    assert again.finished() == {f"clip{n}" for n in range(5)}
    assert again.shapes == shapes  # of the last part that has some
    for found, wanted in zip(again.parts, parts, strict=True):
        for field in dataclasses.fields(Part):
            np.testing.assert_equal(getattr(found, field.name), getattr(wanted, field.name))
    outcome = assemble([Record(f"clip{n}") for n in range(5)], again.parts)
    assert outcome.table.ids == ("clip0", "clip1", "clip3") and [name for name, _ in outcome.problems] == ["clip2", "clip4"]
    assert (outcome.used_tokens, outcome.total_tokens, outcome.truncated) == (9, 12, 3)


def test_other_settings_are_refused(tmp_path: Path):
    Journal(tmp_path / "j", SETTINGS).add(_part(0))
    with pytest.raises(InputError, match="other settings"):
        Journal(tmp_path / "j", SETTINGS | {"dtype": "bfloat16"})


def test_work_of_an_earlier_version_is_refused_with_what_to_do(tmp_path: Path):
    Journal(tmp_path / "j", SETTINGS).add(_part(0))
    with pytest.raises(InputError, match=r"j: holds the unfinished work of an earlier version of omni-jax.*remove the folder") as caught:
        Journal(tmp_path / "j", SETTINGS | {"model": {"layers": 2}, "tokenizer": "0" * 32})
    assert "\n" not in str(caught.value)


def test_settings_may_change_while_nothing_is_kept(tmp_path: Path):
    Journal(tmp_path / "j", SETTINGS)
    other = SETTINGS | {"dtype": "bfloat16"}
    Journal(tmp_path / "j", other).add(_part(0))
    assert Journal(tmp_path / "j", other).finished() == {"clip0"}


def test_two_runs_at_once_are_refused(tmp_path: Path):
    first = Journal(tmp_path / "j", SETTINGS)
    with pytest.raises(InputError, match="another run is writing here"):
        Journal(tmp_path / "j", SETTINGS)
    first.remove()
    Journal(tmp_path / "j", SETTINGS).add(_part(0))


def test_a_run_that_waited_at_a_folder_that_was_then_removed_takes_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Between opening the lock and taking it, the run before may finish and remove the folder: a lock of a gone folder keeps nobody out."""
    first, taken = Journal(tmp_path / "j", SETTINGS), []

    def flock(file: IO[bytes], how: int) -> None:
        if not taken:
            taken.append(True)
            first.remove()
        original(file, how)

    original = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock)
    second = Journal(tmp_path / "j", SETTINGS)
    monkeypatch.undo()
    second.add(_part(0))
    with pytest.raises(InputError, match="another run is writing here"):
        Journal(tmp_path / "j", SETTINGS)


def test_a_half_written_part_does_not_count(tmp_path: Path):
    journal = Journal(tmp_path / "j", SETTINGS)
    journal.add(_part(0))
    del journal
    (tmp_path / "j" / ".part-000001.npz.77.partial").write_bytes(b"PK half")
    assert Journal(tmp_path / "j", SETTINGS).finished() == {"clip0"}


def test_a_damaged_part_is_named(tmp_path: Path):
    Journal(tmp_path / "j", SETTINGS).add(_part(0))
    (tmp_path / "j" / "part-000000.npz").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"part-000000\.npz: cannot be read"):
        Journal(tmp_path / "j", SETTINGS)


def test_it_is_gone_when_removed(tmp_path: Path):
    journal = Journal(tmp_path / "j", SETTINGS)
    journal.add(_part(0))
    journal.remove()
    assert list(tmp_path.iterdir()) == []
