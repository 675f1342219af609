"""What a run could not use is listed once, over starts and after a line that was cut off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from etils import epath

from omni_jax.train.skipped_records import SkippedRecords
from omni_jax.types import InputError

BAD = {"id": "a", "update": 3, "reason": "cannot be read"}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_record_and_reason_is_listed_once_over_starts(tmp_path: Path) -> None:
    first = SkippedRecords(epath.Path(tmp_path), 0)
    assert not first.path.exists()
    assert first.add(BAD) and not first.add({**BAD, "update": 9})
    assert first.add({**BAD, "reason": "is empty"}) and first.add({"id": None, "line": 2, "file": "m.jsonl", "reason": "not JSON"})
    with (tmp_path / "skipped_records.jsonl").open("a") as file:
        file.write('{"id": "cut o')  # as a killed run leaves it
    again = SkippedRecords(epath.Path(tmp_path), 0)
    assert not again.add(BAD) and again.add({**BAD, "id": "b"})
    assert [row["id"] for row in lines(tmp_path / "skipped_records.jsonl")] == ["a", "a", None, "b"]


def test_in_an_object_store_the_list_is_not_replaced_for_each_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni_jax.io.files.is_remote", lambda _: True)
    first = SkippedRecords(epath.Path(tmp_path), 0)
    assert first.add(BAD) and first.add({**BAD, "id": "b"}) and not first.path.exists()
    first.sync()
    assert first.add({**BAD, "id": "c"}) and [row["id"] for row in lines(tmp_path / "skipped_records.jsonl")] == ["a", "b"]
    first.close()
    again = SkippedRecords(epath.Path(tmp_path), 0)
    assert not again.add(BAD) and again.add({**BAD, "id": "d"})
    again.close()
    assert [row["id"] for row in lines(tmp_path / "skipped_records.jsonl")] == ["a", "b", "c", "d"]


def test_processes_have_files_of_their_own(tmp_path: Path) -> None:
    for process in (0, 1):
        SkippedRecords(epath.Path(tmp_path), process).add({**BAD, "id": str(process)})
    assert lines(tmp_path / "skipped_records.jsonl")[0]["id"] == "0" and lines(tmp_path / "skipped_records.1.jsonl")[0]["id"] == "1"


def test_a_file_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "skipped_records.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"skipped_records.jsonl: cannot be read .* move it away"):
        SkippedRecords(epath.Path(tmp_path), 0)
