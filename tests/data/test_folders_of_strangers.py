"""Folders, tars and tables as they lie on other people's disks: nothing is lost without a word, nothing is guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omni_jax.cli.main import main
from omni_jax.data.manifest import Manifest, read_manifest
from omni_jax.types import FilePart, InputError
from tests.data.test_formats import make_tar

V = b"v"


def folder_of(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return root


def table_of(path: Path, columns: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def records(found: Manifest) -> list[tuple[str, str | None, str | None]]:
    """(id, text, name of the video) of each record."""
    assert not found.problems, found.problems
    return [(r.id, r.text, r.video.name if isinstance(r.video, FilePart) else r.video and r.video.name) for r in found.records]


def noted(found: Manifest, words: str) -> bool:
    return any(note.startswith(words) for note in found.notes)


def test_dots_in_the_names_of_a_folder_are_part_of_them(tmp_path: Path) -> None:
    folder_of(tmp_path, {"Mr. Bean.mp4": V, "Mr. Bean.txt": "a man", "Mr. Ed.mp4": V, "10.30.00.wav": V, "a.mp4": V, "a.en.txt": "rain"})
    found = read_manifest(tmp_path)
    assert [record.id for record in found.records] == ["10.30.00", "Mr. Bean", "Mr. Ed", "a"] and found.records[1].text == "a man"
    assert noted(found, "files that belong to no media file by their names, and are not read: 1, the first")
    assert read_manifest(tmp_path, columns={"text": "en.txt"}).records[3].text == "rain"


def test_a_clip_and_a_text_of_a_tar_that_agree_beyond_the_first_dot_are_one_record(tmp_path: Path) -> None:
    names = {f"{key}.{suffix}": V for key in ("v1.0_A", "v1.0_b", "x") for suffix in ("mp4", "txt")}
    found = read_manifest(make_tar(tmp_path / "x.tar", names))
    assert records(found) == [(key, "v", f"{key}.mp4") for key in ("v1.0_A", "v1.0_b", "x")]
    two = read_manifest(make_tar(tmp_path / "two.tar", {"a.left.mp4": V, "a.right.mp4": V, "a.txt": V}))
    assert "choose one with --columns video=left.mp4, or rename the files" in two.problems[0].reason


def test_members_with_idle_parts_in_their_names_are_found(tmp_path: Path) -> None:
    found = read_manifest(
        make_tar(tmp_path / "x.tar", {"././a.mp4": V, ".//b.mp4": V, "s//c.mp4": V, "s/./d.mp4": V, "s/.hidden/e.mp4": V})
    )
    assert [key for key, *_ in records(found)] == ["a", "b", "s/c", "s/d"]


def test_hidden_files_and_folders_with_suffixes_are_no_sources(tmp_path: Path) -> None:
    table_of(tmp_path / "p/a.parquet", {"text": ["rain"]})
    folder_of(tmp_path / "p", {"._a.parquet": "x", ".cache/huggingface/b.parquet": "x"})
    assert records(read_manifest(tmp_path / "p")) == [("a-0", "rain", None)]
    folder_of(tmp_path / "q", {"clips.tar/a.mp4": V})
    assert records(read_manifest(tmp_path / "q")) == [("clips.tar/a", None, "a.mp4")]


def test_links_to_folders_are_followed_once_and_links_to_nothing_are_not_lost(tmp_path: Path) -> None:
    folder_of(tmp_path / "elsewhere", {"b.mp4": V})
    root = folder_of(tmp_path / "root", {"a.mp4": V})
    (root / "videos").symlink_to(tmp_path / "elsewhere")
    (root / "up").symlink_to(root)
    (root / "gone.mp4").symlink_to(root / "nothing")
    (root / "a.txt").symlink_to(root / "nothing")
    found = read_manifest(root)
    assert [record.id for record in found.records] == ["gone", "videos/b"]
    assert found.problems[0].reason.endswith("a: .txt: cannot be read (No such file or directory); check the file, or what it is a link to")


def test_metadata_is_found_at_any_depth_and_what_it_does_not_name_is_told(tmp_path: Path) -> None:
    folder_of(tmp_path, {"data/train/metadata.csv": "file_name,text\na.mp4,rain\n", "data/train/a.mp4": V, "data/train/b.mp4": V})
    folder_of(tmp_path, {"data/test/metadata.jsonl": '{"file_name": "c.mp4", "text": "fog"}', "data/test/c.mp4": V})
    found = read_manifest(tmp_path)
    assert [(text, name) for _, text, name in records(found)] == [("fog", "c.mp4"), ("rain", "a.mp4")]
    assert noted(found, "media files that no metadata file names, and are not read: 1") and noted(found, "splits that are read as one")
    assert [text for _, text, _ in records(read_manifest(tmp_path / "data/test/metadata.jsonl"))] == ["fog"]


def test_files_of_one_name_have_ids_of_their_own_and_absent_files_are_told(tmp_path: Path) -> None:
    for part in ("en", "fr"):
        table_of(tmp_path / part / "train-00000-of-00002.parquet", {"text": [part]})
    for source in (tmp_path, str(tmp_path / "*/*.parquet")):
        found = read_manifest(source)
        assert [(key, text) for key, text, _ in records(found)] == [(f"{part}/train-00000-of-00002-0", part) for part in ("en", "fr")]
        assert noted(found, "files that the names of others say exist, and are not here: 2, the first")
    assert not read_manifest(tmp_path / "en").notes[1:]


FOREIGN = {
    "x.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS pointer"),
    "x.jsonl": (b"<!DOCTYPE html><html>", "is a web page"),
    "x.arrow": (b"ARROW1\0\0", "is an Arrow file; write it as Parquet"),
    "x.xlsx": (b"PK\x03\x04", "is a spreadsheet; save it as CSV"),
    "x.mp4": (b"\0\0\0\x18ftypmp42", "is a media file; name the folder"),
    "x.pkl": (b"\x80\x04\x95", "is a pickle, which is never opened"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_other_kinds_are_named_as_what_they_are(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FOREIGN[name][0])
    with pytest.raises(InputError) as error:
        read_manifest(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}: {FOREIGN[name][1]}")


def test_a_folder_of_save_to_disk_says_how_to_write_it(tmp_path: Path) -> None:
    folder_of(tmp_path, {"train/data-00000-of-00001.arrow": "x", "dataset_dict.json": "{}"})
    with pytest.raises(InputError, match="was written by save_to_disk of datasets; write it as Parquet"):
        read_manifest(tmp_path)
    shards = folder_of(tmp_path / "shards", {"index.arrow": "x", "index.json": "{}", "clips-train.array_record-00000-of-00001": "x"})
    with pytest.raises(InputError, match=r"holds shards of 'omni-jax prepare', .* name the manifest that they were made of"):
        read_manifest(shards)


@pytest.mark.parametrize("text", ['{"data": [{"id": "a"}], "version": 1}', '{"info": {}, "data": [{"id": "a"}]}'])
def test_an_object_that_holds_the_records_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    (problem,) = read_manifest(tmp_path / "x.json").problems
    assert problem.reason.endswith("is no record: it holds 1 objects under 'data'; write these as an array, or one a line")
    (tmp_path / "x.json").write_text('{"a": {"text": "x"}, "b": {"text": "y"}}')
    assert "it holds 2 objects by name" in read_manifest(tmp_path / "x.json").problems[0].reason
    (tmp_path / "x.json").write_text('{"uid": "a", "caption": "rain", "path": "a.mp4", "segments": [{"start": 1}]}')
    assert records(read_manifest(tmp_path / "x.json", columns={"id": "uid", "text": "caption", "video": "path"})) == [
        ("a", "rain", "a.mp4")
    ]


@pytest.mark.parametrize("name", ["x.jsonl", "metadata.jsonl", "x.tar"])
def test_a_column_that_no_record_has_is_refused(tmp_path: Path, name: str) -> None:
    row = json.dumps({"id": "a", "title": "rain", "file_name": "a.mp4"})
    source = make_tar(tmp_path / name, {"a.mp4": V, "a.json": row.encode()}) if name == "x.tar" else folder_of(tmp_path, {name: row}) / name
    with pytest.raises(InputError, match=r"no record has 'titel', which --columns names; they have .*title, file_name"):
        read_manifest(source, columns={"text": "titel"})
    (record,) = read_manifest(source, columns={"text": "title"} | ({"video": "file_name"} if name == "x.jsonl" else {})).records
    assert (record.id, record.text) == ("a", "rain")


def test_what_stands_for_nothing_in_a_table_is_absent(tmp_path: Path) -> None:
    table = (
        folder_of(tmp_path, {"x.csv": "sep=;\nid;text;video;audio\nNA;NaN;a.mp4;null\n;;;\nb;None;;b.wav\n\"c\";['a', 'b'];;\n"}) / "x.csv"
    )
    found = read_manifest(table)
    assert [(r.id, r.text, r.audio and r.audio.name) for r in found.records] == [
        ("NA", None, None),
        ("b", None, "b.wav"),
        ("c", "['a', 'b']", None),
    ]
    assert not found.problems and noted(found, "cells of a word that says that there is nothing, read so: 3")
    assert noted(found, "captions that are lists by their look and are read as one text: 1, the first: c")
    found = read_manifest(table_of(tmp_path / "x.parquet", {"text": [["rain", None], [], None], "video": ["a.mp4"] * 3}))
    assert [(r.id, r.text) for r in found.records] == [("x-0-0", "rain"), ("x-1", None), ("x-2", None)]
    assert [problem.id for problem in found.problems] == ["x-0-1"]


def test_an_id_that_is_lacking_or_cannot_be_kept_says_what_to_do(tmp_path: Path) -> None:
    path = (
        folder_of(
            tmp_path, {"x.jsonl": '{"video_id": "a", "text": "x"}\n{"id": "a\\u0000", "text": "x"}\n{"id": "b", "audio": [0.1, 0.2]}\n'}
        )
        / "x.jsonl"
    )
    reasons = [problem.reason.partition(": ")[2] for problem in read_manifest(path).problems]
    assert reasons[0] == "has no id; give every record its own, or name the field of it: --columns id=video_id"
    assert reasons[1].startswith("id holds a zero character") and "audio is a list; make it the path of a file" in reasons[2]


def test_fetched_files_are_those_of_the_kind_whatever_downloaders_write_beside_them(tmp_path: Path) -> None:
    rows = [{"id": name, "text": "x", "video": f"https://a.b/{name}"} for name in ("a", "p/q", "c.d", "two", "none", "curl")]
    path = folder_of(tmp_path, {"x.jsonl": "\n".join(map(json.dumps, rows))}) / "x.jsonl"
    here = {
        "a.mp4": V,
        "a.webp": V,
        "a.description": V,
        "a.en.vtt": V,
        "p/q.mkv": V,
        "c.d.mp4": V,
        "two.mp4": V,
        "two.webm": V,
        "none.json": V,
        "curl": V,
    }
    found = read_manifest(path, fetched=folder_of(tmp_path / "here", here))
    assert [(r.id, r.video.name) for r in found.records] == [("a", "a.mp4"), ("p/q", "q.mkv"), ("c.d", "c.d.mp4"), ("curl", "curl")]
    two, none = found.problems
    assert two.reason.endswith("--fetched holds two.mp4 and two.webm of one id; keep one of them") and "is a web address" in none.reason


def test_a_role_given_twice_and_a_source_written_over_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder_of(tmp_path, {"x.jsonl": '{"id": "a", "text": "x", "title": "y"}\n{"id": "b"}\n'}) / "x.jsonl"
    assert (
        main(["manifest", "from", str(path), "--out", str(tmp_path / "y.jsonl"), "--columns", "text=text", "--columns", "text=title"]) == 2
    )
    assert "--columns: text is given 2 names; give each role one" in capsys.readouterr().err
    assert main(["manifest", "from", str(path), "--out", str(path)]) == 2
    assert "x.jsonl: is read by this command, too, and would be lost" in capsys.readouterr().err and '"b"' in path.read_text()


def test_a_time_limit_that_would_have_no_effect_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder_of(tmp_path, {"x.jsonl": '{"id": "a", "text": "x", "video": "a.mp4"}'}) / "x.jsonl"
    assert main(["prepare", "--manifest", str(path), "--out", str(tmp_path / "out"), "--workers", "0", "--timeout", "5"]) == 2
    assert "--timeout 5: --workers 0 decodes in this process, which no limit stops" in capsys.readouterr().err
