"""Paths of media and times of clips, as people write them: in every kind of manifest, and in Python."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath

from omni_jax.config import Preset
from omni_jax.data.items import parse_items
from omni_jax.data.manifest import read_manifest
from omni_jax.data.paths import media_path
from omni_jax.data.times import interval
from omni_jax.media.source import check_file
from omni_jax.types import ClipError, InputError, Record


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `videos/a b.mp4`; `clips/a.mp4` is in the home folder beside it."""
    for file in ("root/videos/a b.mp4", "home/clips/a.mp4"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_bytes(b"x")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "root"


def written(root: Path) -> dict[str, Path]:
    """Path as somebody writes it -> the file."""
    file, home = root / "videos/a b.mp4", root.parent / "home/clips/a.mp4"
    encoded = os.fspath(file).replace(" ", "%20")
    return {
        "videos/a b.mp4": file,
        os.fspath(file): file,
        "videos\\a b.mp4": file,
        ".\\videos\\a b.mp4": file,
        f"file://{encoded}": file,
        f"FILE://localhost{encoded}": file,
        f"file:{encoded}": file,
        f"file://{'/' + encoded}": file,
        f"file:/%2F{encoded[1:]}": file,
        f"file://{file}": file,
        "~/clips/a.mp4": home,
        "~\\clips\\a.mp4": home,
    }


def test_every_way_to_write_a_path_names_the_file_in_every_kind_of_manifest(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    names = written(root)
    rows = [{"id": str(number), "video": name} for number, name in enumerate(names)]
    (root / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "m.csv").write_text("id,video\n" + "".join(f"{row['id']},{row['video']}\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), root / "m.parquet")
    for folder in ("rows", "table"):
        (root / folder).mkdir()
        (root / folder / "videos").symlink_to(root / "videos")
    (root / "rows" / "metadata.jsonl").write_text("".join(json.dumps({"file_name": name}) + "\n" for name in names))
    (root / "table" / "metadata.csv").write_text("file_name\n" + "".join(f"{name}\n" for name in names))
    for source in ("m.jsonl", "m.csv", "m.parquet", "rows", "table"):
        found = read_manifest(root / source)
        assert not found.problems
        assert [os.path.realpath(str(record.video)) for record in found.records] == list(map(os.fspath, names.values())), source
        assert not [note for note in found.notes if "no metadata file names" in note]
        assert not [record.id for record in found.records if "\\" in record.id]
    items = list(parse_items([{"video": name} for name in names], Preset(), lambda: root))
    assert [os.path.normpath(str(item.record.video)) for item in items] == list(map(os.fspath, names.values()))


def test_a_file_that_is_called_as_it_is_written_comes_first(root: Path) -> None:
    for name in ("~", "videos\\a b.mp4"):
        (root / name).write_bytes(b"x")
        assert media_path(name, root) == root / name


def test_a_missing_file_is_named_as_it_would_be_found(root: Path) -> None:
    assert media_path("~/no.mp4", root) == root.parent / "home/no.mp4"
    with pytest.raises(
        ClipError, match=r"videos\\no.mp4: file not found; .* --media-root .with / for each backslash it is not there either"
    ):
        check_file(media_path("videos\\no.mp4", root))


def test_object_stores_have_no_backslashes_and_no_home(root: Path) -> None:
    bucket = epath.Path("gs://bucket/clips")
    assert os.fspath(media_path("videos\\a.mp4", bucket)) == "gs://bucket/clips/videos/a.mp4"
    assert os.fspath(media_path("gs://other/a.mp4", root)) == "gs://other/a.mp4"


@pytest.mark.parametrize("name", ["file://host/a.mp4", "file://a.mp4", "file:///a%00.mp4", "file:////%00"])
def test_an_address_of_no_file_here_is_a_problem_of_its_record(root: Path, name: str) -> None:
    (root / "m.jsonl").write_text(json.dumps({"id": "x", "video": name}))
    (problem,) = read_manifest(root / "m.jsonl").problems
    assert f"record 'x': video {name}: names no file of this machine; write file:///PATH" in problem.reason
    (item,) = parse_items([{"video": name}], Preset(), lambda: root)
    assert f"its video {name}: names no file" in str(item.error)
    with pytest.raises(InputError):
        media_path(name, root)


def test_a_text_that_no_file_can_be_called_is_a_problem_of_its_record(root: Path) -> None:
    names = ["~a\0/x.mp4", "~\ud800/x.mp4", "videos\\\0.mp4", "videos/a b.mp4"]
    (root / "metadata.jsonl").write_text("".join(json.dumps({"file_name": name, "id": str(n)}) + "\n" for n, name in enumerate(names)))
    found = read_manifest(root)
    assert [record.id for record in found.records] == ["3"]
    assert [problem.reason.split(": ")[0].rpartition(":")[2] for problem in found.problems] == ["1", "2", "3"]
    assert not [note for note in found.notes if "no metadata file names" in note]
    for item in parse_items([{"video": name} for name in names[:3]], Preset(), lambda: root):
        assert "holds a zero character or half of a surrogate pair" in str(item.error)
    assert media_path(os.fsdecode(b"\xff.mp4"), root) == root / os.fsdecode(b"\xff.mp4")  # a name that is not UTF-8


@pytest.mark.parametrize("name", ["~/clips/a.mp4", "~\\clips\\a.mp4", "videos\\..\\..\\home\\clips\\a.mp4", "file:///etc/passwd"])
def test_a_media_root_confines_however_a_path_is_written(root: Path, name: str) -> None:
    (root / "m.jsonl").write_text(json.dumps({"id": "x", "video": name}))
    (problem,) = read_manifest(root / "m.jsonl", root).problems
    assert "leads out of the media root" in problem.reason


@pytest.mark.parametrize(
    ("value", "found"),
    {
        (0, 1.5): (0, 1.5),
        ("0", "2"): (0, 2),
        ("00:01:02.5", "01:00:00"): (62.5, 3600),
        ("1:02", "90:00"): (62, 5400),
        ("00:00:01,250", "2"): (1.25, 2),
        "[0, 1.5]": (0, 1.5),
        '["0:01", "0:05"]': (1, 5),
        "[00:01, 00:05]": (1, 5),
        "00:01:02-00:01:05": (62, 65),
        "00:00:01.000 --> 00:00:02.500": (1, 2.5),
        "0:10 to 0:20": (10, 20),
        "00:00:01,500 --> 00:00:02,000": (1.5, 2),
        "0:01,0:05": (1, 5),
        "0:01,5": (1, 5),
        " [\t1 ,\n 2 ] ": (1, 2),
    }.items(),
)
def test_times_are_seconds_or_as_clocks_show_them(value: Any, found: tuple[float, float]) -> None:
    assert interval(value) == found


WRONG = ["", "0:10", "0:20-0:10", "-1, 5", "1:75-2:00", "1:60:00-2:00:00", "01:02:03:04-01:02:04:00", "[" * 5000, "a-b", {"0": 1, "1": 2}]
WRONG += [["0:10"], ["0:20", "0:10"], ["1:75", "2:00"], [True, 2], ["0", "nan"], ["0", "9" * 5000], [0, None], 5]
LONG = " " * 2000  # a pattern that tries every way to share spaces out would take hours
WRONG += [f"{LONG}1{LONG}x", f"1{'.' * 2000}x", f"1 2{LONG}x", [f"0{LONG}", f"{'1:' * 2000}x"]]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: str(value)[:20])
def test_wrong_times_are_one_clear_line(tmp_path: Path, value: Any) -> None:
    (tmp_path / "m.jsonl").write_text(json.dumps({"id": "x", "text": "t", "timestamps": value}))
    (problem,) = read_manifest(tmp_path / "m.jsonl").problems
    assert problem.reason.startswith(f"{tmp_path / 'm.jsonl'}:1: record 'x': timestamps {json.dumps(value)[:80]}")
    assert problem.reason.endswith(" must be [start, end] in seconds or HH:MM:SS with 0 <= start < end")
    (item,) = parse_items([{"text": "t", "timestamps": value}], Preset(), lambda: tmp_path)
    assert str(item.error).endswith(" must be (start, end) in seconds or HH:MM:SS with 0 <= start < end")


def test_columns_of_times_are_read_as_lists_are(tmp_path: Path) -> None:
    def times(name: str, columns: dict[str, str]) -> list[tuple[float, float] | None]:
        found = read_manifest(tmp_path / name, columns=columns)
        assert not found.problems
        return [record.timestamps for record in found.records]

    (tmp_path / "a.csv").write_text("id,text,from,to\na,t,0:01,00:00:02.5\nb,t,1,2.5\nc,t,,0:03\n")
    assert times("a.csv", {"start": "from", "end": "to"}) == [(1, 2.5), (1, 2.5), (0, 3)]
    (tmp_path / "b.csv").write_text('id,text,timestamps\na,t,0:01-0:02\nb,t,"[1, 2]"\nc,t,\n')
    assert times("b.csv", {}) == [(1, 2), (1, 2), None]
    pq.write_table(pa.table({"text": ["t"], "timestamps": [["0:01", "0:02"]]}), tmp_path / "c.parquet")
    assert times("c.parquet", {}) == [(1, 2)]
    assert isinstance(read_manifest(tmp_path / "c.parquet").records[0], Record)


def test_one_way_to_write_times_does_not_name_an_entry_otherwise_than_another(tmp_path: Path) -> None:
    def name(file: str, text: str, columns: dict[str, str]) -> str:
        (tmp_path / file).write_text(text)
        (record,) = read_manifest(tmp_path / file, columns=columns).records
        assert record.timestamps == (0, 5)
        (tmp_path / file).unlink()
        return record.id

    for written in ("[0.0, 5.0]", '"0-5"', '["0:00", "0:05"]', '[0, "5"]'):
        assert name("metadata.jsonl", json.dumps({"file_name": "v.mp4", "timestamps": json.loads(written)}), {}) == "v-e11ae96d2a02719e"
    for cell in ('"[0.0, 5.0]"', "0:00 to 0:05"):
        assert name("metadata.csv", f"file_name,timestamps\nv.mp4,{cell}\n", {}) == "v-e11ae96d2a02719e"
    for cells in ("0,5", ",5.0", "0:00,0:05"):
        assert name("metadata.csv", f"file_name,a,b\nv.mp4,{cells}\n", {"start": "a", "end": "b"}) == "v-e11ae96d2a02719e"
    assert name("metadata.csv", 'file_name,timestamps\nv.mp4,"[0, 5]"\n', {}) == "v-7c6f01bb3cb4f1a6", "whole numbers as JSON has them"


def test_a_column_in_capitals_is_of_times_only_where_it_holds_them(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("id,text,Timestamps\na,t,2020-01-01\nb,t,12.5\nc,t,0:01-0:02\n")
    found = read_manifest(tmp_path / "m.csv")
    assert not found.problems
    assert [record.timestamps for record in found.records] == [None, None, (1, 2)]
    assert [record.extra.get("Timestamps") for record in found.records] == ["2020-01-01", "12.5", None]
