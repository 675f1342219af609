"""Manifests as other programs write them: each is read, or is one problem or one line that says what to do."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omni_jax.data.formats import json_entries
from omni_jax.data.loading import load_features
from omni_jax.data.manifest import Manifest, read_manifest
from omni_jax.media import parts
from omni_jax.types import FilePart, InputError
from tests.data.test_formats import PRESET, make_tar

ROW = "id,text,video\na,rain,a.mp4\n"


def contents(found: Manifest, role: str) -> list[bytes | str | None]:
    """The bytes of each record's part of a file, as a reader gets them, or the name of its file."""
    made: list[bytes | str | None] = []
    for record in found.records:
        media = getattr(record, role)
        if isinstance(media, FilePart):
            parts.check_part(media)
            with parts.open_bytes(media) as file:
                made.append(file.read())
        else:
            made.append(media and media.name)
    return made


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_long_and_foreign_names_are_found_in_every_kind_of_tar(tmp_path: Path, kind: int) -> None:
    folder = "d" * 90 + "/"
    keys = [folder + "n" * 80, *([folder + "n" * 150, "é" * 90] if kind != tarfile.USTAR_FORMAT else [])]
    with tarfile.open(tmp_path / "x.tar", "w", format=kind) as tar:
        for key in keys:
            for suffix in ("mp4", "txt"):
                member = tarfile.TarInfo(f"./{key}.{suffix}")
                member.size, member.mtime = len(key), 1.5  # a time of its own is a header of its own in pax
                tar.addfile(member, io.BytesIO(b"x" * len(key)))
    found = read_manifest(tmp_path / "x.tar")
    assert [record.id for record in found.records] == keys and not found.problems
    assert contents(found, "video") == [b"x" * len(key) for key in keys]


@pytest.mark.parametrize(
    ("name", "role"), [("a.MKA", "audio"), ("a.m4b", "audio"), ("a.wv", "audio"), ("a.vob", "video"), ("a.m2ts", "video")]
)
def test_a_folder_of_files_of_less_usual_suffixes(tmp_path: Path, name: str, role: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    found = read_manifest(tmp_path)
    assert contents(found, role) == [name] and not found.problems


@pytest.mark.parametrize("how", ["gnu", "0.0", "0.1", "1.0"])
def test_a_sparse_member_is_a_problem_of_its_record(tmp_path: Path, how: str) -> None:
    with (tmp_path / "sparse.mp4").open("wb") as file:
        file.truncate(1 << 20)
    kind = ["--format=gnu"] if how == "gnu" else ["--format=pax", f"--sparse-version={how}"]
    subprocess.run(["tar", "-C", str(tmp_path), "--sparse", *kind, "-cf", str(tmp_path / "x.tar"), "sparse.mp4"], check=True)
    assert [problem.reason.partition("'")[2] for problem in read_manifest(tmp_path / "x.tar").problems] == [
        "sparse.mp4' is not a plain file; put the file itself into the tar"
    ]


def test_what_lies_beside_the_clips_of_a_tar_is_no_record_and_what_lies_behind_it_is_a_problem(tmp_path: Path) -> None:
    clips = {"a.mp4": b"v", "a.txt": b"rain", "b.mp4": b"v", "b.txt": b"c" * ((1 << 20) + 1)}
    beside = {"._a.mp4": b"x", ".DS_Store": b"x", "__MACOSX/._a.mp4": b"x", "README": b"x", "LICENSE.md": b"x"}
    one = make_tar(tmp_path / "one.tar", clips | beside)
    found = read_manifest(one)
    assert [record.id for record in found.records] == ["a"] and any(note.startswith("files .md that are not read") for note in found.notes)
    assert [problem.reason for problem in found.problems] == [f"{one}:b: .txt: over 1 MiB of text is no caption; shorten it"]
    (tmp_path / "joined.tar").write_bytes(one.read_bytes() + make_tar(tmp_path / "other.tar", {"c.txt": b"fog"}).read_bytes())
    assert "bytes that are not read follow the end of the tar" in read_manifest(tmp_path / "joined.tar").problems[-1].reason
    found = read_manifest(make_tar(tmp_path / "only.tar", {"README": b"x"}))
    assert not found.records and "has no text, video or audio" in found.problems[0].reason


AUDIO = [{"bytes": b"one", "path": "a.wav"}, {"bytes": None, "path": "b.wav"}, None, {"bytes": b"two", "path": None}]


def in_struct(kind: Any, **more: Any) -> pa.Array:
    """AUDIO as `datasets` stores it; `more`: further fields of the struct."""
    return pa.array(AUDIO, pa.struct({"bytes": kind, "path": pa.string(), **more}))


@pytest.mark.parametrize(
    "column",
    [
        *(in_struct(kind) for kind in (pa.binary(), pa.large_binary())),
        in_struct(pa.binary(), sampling_rate=pa.int32()),
        *(pa.array([b"one", b"b", None, b"two"], kind) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())),
        pa.array([b"one", b"b", None, b"two"]).dictionary_encode(),
    ],
    ids=lambda column: str(column.type),
)
def test_bytes_of_any_arrow_type_are_read_from_any_row_group(tmp_path: Path, column: pa.Array) -> None:
    for text in (
        pa.array(list("abcd")),
        pa.array(list("abcd"), pa.large_string()).dictionary_encode(),
        pa.array(list("abcd"), pa.string_view()),
    ):
        for rows in (1, 3):
            pq.write_table(pa.table({"text": text, "audio": column}), tmp_path / "x.parquet", row_group_size=rows)
            found = read_manifest(tmp_path / "x.parquet")
            assert [record.text for record in found.records] == list("abcd") and not found.problems
            assert contents(found, "audio") == [b"one", "b.wav" if column.type.num_fields else b"b", None, b"two"]


def test_other_parquet_is_read_or_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    turns = [[{"from": "human", "value": "<video>"}, {"from": "gpt", "value": text}] for text in ("rain", "fog")]
    pq.write_table(pa.table({"conversations": turns, "video": ["a.mp4", "b.mp4"]}), path)
    assert [record.text for record in read_manifest(path).records] == ["rain", "fog"]
    texts = pa.array(["a"])
    pq.write_table(pa.table({"Text": texts, "Audio": in_struct(pa.binary())[:1]}), path)
    assert [(record.text, record.audio is not None) for record in read_manifest(path).records] == [("a", True)]
    pq.write_table(pa.table({"text": texts, "clip": [{"video": {"bytes": b"x"}}]}), path)
    with pytest.raises(InputError, match=r"column 'clip', which --columns names, is struct<video: struct<bytes: binary>>; text, numbers,"):
        read_manifest(path, columns={"video": "clip"})
    for table, words in (
        (pa.table({"text": texts, "audio": in_struct(pa.binary())[:1]})[:0], "the manifest is empty"),
        (pa.table({}), "no column is called text"),
        (pa.Table.from_arrays([texts, texts], names=["text", "text"]), "two columns are called 'text'; rename one"),
    ):
        pq.write_table(table, path)
        with pytest.raises(InputError, match=words):
            read_manifest(path)


@pytest.mark.parametrize(
    "data",
    [
        ROW.replace("\n", "\r\n").encode("utf-8-sig"),
        ROW.replace("\n", "\r").encode(),
        ROW.replace(",", ";").encode(),
        ROW.replace(",", "\t").encode(),
        ROW.replace(",", "|").encode(),
        ROW.replace(",", ", ").encode(),
        ROW.replace("id,text,video", "ID,Text,Video").encode(),
        b"\n" + ROW.encode(),
        ROW.replace("id,", ",id,").replace("a,rain", "0,a,rain").encode(),  # with the index that pandas writes
    ],
    ids=["a byte-order mark and CRLF", "CR", "semicolons", "tabs", "bars", "spaces", "capitals", "an empty line", "a column of no name"],
)
def test_tables_are_read_as_spreadsheets_and_pandas_write_them(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.csv").write_bytes(data)
    (record,) = read_manifest(tmp_path / "x.csv").records
    assert (record.id, record.text, record.video) == ("a", "rain", tmp_path / "a.mp4")


@pytest.mark.parametrize("data", [ROW.encode("utf-16"), ROW.replace("video", "vidéo").encode("latin1")])
def test_a_table_in_another_encoding_is_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.csv").write_bytes(data)
    with pytest.raises(InputError, match=r"x.csv: is not UTF-8; save the table as UTF-8$"):
        read_manifest(tmp_path / "x.csv")


def test_cells_over_several_lines_are_read_and_a_quote_that_is_left_open_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('id,text\na,"rain;\n""fog"""\nb,"sun\nc,wind\nd,hail\n')
    found = read_manifest(tmp_path / "x.csv")
    assert [record.text for record in found.records] == ['rain;\n"fog"'] and any("go over several lines: 1" in note for note in found.notes)
    assert found.problems[0].reason.endswith("x.csv:4: a quote is not closed before the end of the file, 3 lines further: close it")
    (tmp_path / "x.csv").write_text('id,text\na,"rain;\n""fog"""')
    assert [record.text for record in read_manifest(tmp_path / "x.csv").records] == ['rain;\n"fog"']
    (tmp_path / "x.csv").write_text('id,text,video\na,"rain,a.mp4\nb,fog,b.mp4\n')
    (problem,) = read_manifest(tmp_path / "x.csv").problems
    assert problem.reason.endswith(":2: a quote is not closed before the end of the file, 2 lines further: close it")
    (tmp_path / "x.csv").write_text('id,text,video\na,"rain,a.mp4\nb,""fog"",b.mp4"\n')
    (problem,) = read_manifest(tmp_path / "x.csv").problems
    assert problem.reason.endswith(":2: has 2 cells where the first line has 3; it goes over 2 lines: close the quote")


def test_a_file_name_of_metadata_that_names_nothing_is_that_records_problem(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file_name,text\ngone.wav,rain\nnoise,fog\n")
    found = read_manifest(tmp_path)
    assert [problem.reason.partition(":3: ")[2][:23] for problem in found.problems] == ["file_name 'noise' has n"]
    (outcome,) = load_features(found.records, PRESET, "a", 0)
    assert str(outcome).startswith(f"{tmp_path / 'gone.wav'}: ")


@pytest.mark.parametrize("text", [json.dumps([{"id": "a", "text": "x"}], indent=n) for n in (None, 2)])
def test_an_array_lines_and_one_object_are_the_same_record(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    for data in (text, text.strip("[]\n "), "\ufeff" + text.strip("[]\n ")):
        path.write_text(data)
        assert [(record.id, record.text) for record in read_manifest(path).records] == [("a", "x")]
    path.write_text('{\n "id": "a",\n "text": "x"\n}\n{\n "id": "b",\n "text": "y"\n}\n')
    with pytest.raises(
        InputError, match=r"x.json: is JSON over several lines, and no array and no single record; write an array, or one rec"
    ):
        read_manifest(path)
    path.write_text(json.dumps({"videos": [{"id": "a", "text": "x"}]}, indent=2))
    assert len(read_manifest(path).problems) == 1
    monkeypatch.setattr(json_entries, "_LONGEST_LINE", 20)
    with pytest.raises(InputError, match="is JSON over several lines"):
        read_manifest(path)


def test_a_quote_that_is_written_in_another_way_is_a_problem_of_its_row(tmp_path: Path) -> None:
    """Spark and MySQL write a backslash before it, others nothing at all: `csv` and pandas drop it, or what follows, without a word."""
    rows = ['a,"he said \\"hi\\" loudly"', 'b,"rain" and fog', 'c,5" of rain', 'd,"a ""b"", c"', 'e,"open', "f,x"]
    (tmp_path / "x.csv").write_text("id,text\n" + "\n".join(rows) + "\n")
    found = read_manifest(tmp_path / "x.csv")
    assert [(record.id, record.text) for record in found.records] == [("c", '5" of rain'), ("d", 'a "b", c')]
    reasons = [problem.reason.partition("x.csv:")[2] for problem in found.problems]
    assert reasons[:2] == [f"{line}: text follows a quote that closes a cell; write a quote within a cell twice" for line in (2, 3)]
    assert reasons[2].startswith("6: a quote is not closed before the end of the file, ")


def test_an_id_in_capitals_names_the_rows_of_parquet_as_of_any_table(tmp_path: Path) -> None:
    pq.write_table(pa.table({"ID": ["a", "b"], "text": ["x", "y"]}), tmp_path / "x.parquet")
    assert [record.id for record in read_manifest(tmp_path / "x.parquet").records] == ["a", "b"]
    pq.write_table(pa.table({"Id": [0.5, 1.5], "text": ["x", "y"]}), tmp_path / "y.parquet")
    assert [record.id for record in read_manifest(tmp_path / "y.parquet").records] == ["y-0", "y-1"]


def test_a_source_within_a_folder_or_a_pattern_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from omni_jax.cli.main import main

    row = '{"file_name": "a.mp4", "text": "rain"}\nnot JSON\n'
    (tmp_path / "metadata.jsonl").write_text(row)
    for source in (tmp_path, tmp_path / "*.jsonl"):
        for flag in ("--out", "--fetch-list"):
            assert main(["manifest", "from", str(source), flag, str(tmp_path / "metadata.jsonl")]) == 2
            assert "is read by this command, too, and would be lost" in capsys.readouterr().err
    assert (tmp_path / "metadata.jsonl").read_text() == row
