"""Manifests that people have already: tars, Parquet, tables and folders give the records, and the arrays, of loose files and JSON lines."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from omni_jax.cli import source
from omni_jax.cli.main import main
from omni_jax.config import preset
from omni_jax.data.formats import entry, table
from omni_jax.data.loading import load_features
from omni_jax.data.manifest import Manifest, read_manifest
from omni_jax.data.sources import MediaSource, open_source
from omni_jax.media import parts
from omni_jax.media.audio import read_waveform
from omni_jax.types import ClipError, Features, FilePart, InputError, Record
from tests.media_samples import tones, write_clip

PRESET = preset("training").override(["frames=4", "pixels=5000", "audio_seconds=1"])
KEYS = ("a", "b", "sub/c")


@pytest.fixture(scope="module")
def loose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a video, a sound of its own, a caption and fields for each of KEYS."""
    folder = tmp_path_factory.mktemp("formats") / "loose"
    (folder / "sub").mkdir(parents=True)
    for seed, key in enumerate(KEYS):
        write_clip(folder / f"{key}.mp4", 0.6, fps=5, seed=seed)
        soundfile.write(folder / f"{key}.wav", tones(1.0, 16_000, 1, seed), 16_000)
        (folder / f"{key}.txt").write_text(f"caption {key}\n")
        (folder / f"{key}.json").write_text(json.dumps({"views": seed}))
    return folder


def make_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def members_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Rows as `datasets` stores them: the first with bytes and path, the second with bytes alone, the last with a path alone."""
    video = [{"bytes": (folder / f"{key}.mp4").read_bytes(), "path": f"{Path(key).name}.mp4"} for key in KEYS]
    audio = [{"bytes": (folder / f"{key}.wav").read_bytes(), "path": None} for key in KEYS]
    audio[-1] = {"bytes": None, "path": str(folder / f"{KEYS[-1]}.wav")}
    return [{"caption": f"caption {key}", "film": v, "audio": a} for key, v, a in zip(KEYS, video, audio, strict=True)]


def make_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    features = {"film": {"_type": "Video"}, "audio": {"_type": "Audio"}, "caption": {"_type": "Value", "dtype": "string"}}
    made = pa.Table.from_pylist(rows)
    pq.write_table(made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), path, **options)
    return path


def arrays(manifest: Manifest, workers: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    found = []
    for features in load_features(manifest.records, PRESET, "va", workers):
        assert isinstance(features, Features), features
        assert features.vision is not None and features.audio is not None
        found.append((features.vision.patches, features.audio[0].log_mel))
    return found


def assert_same(found: Manifest, expected: Manifest, workers: int = 0) -> None:
    assert not found.problems
    assert [record.text for record in found.records] == [record.text for record in expected.records]
    for one, other in zip(arrays(found, workers), arrays(expected), strict=True):
        assert np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1])


def test_the_command_line_knows_every_format_and_role() -> None:
    assert tuple(table.FORMATS) == source.FORMATS and source.ROLES == entry.ROLES


def test_loose_files_are_grouped_by_their_names(loose: Path) -> None:
    found = read_manifest(loose)
    assert not found.problems and [record.id for record in found.records] == list(KEYS)
    assert found.records[2] == Record("sub/c", "caption sub/c", loose / "sub/c.mp4", loose / "sub/c.wav", line=3)
    assert found.records[2].extra == {"views": 2}


def test_a_tar_gives_the_records_and_arrays_of_the_loose_files(loose: Path, tmp_path: Path) -> None:
    path = make_tar(tmp_path / "shard.tar", members_of(loose))
    found, expected = read_manifest(path), read_manifest(loose)
    assert [record.id for record in found.records] == list(KEYS)
    part = found.records[0].video
    assert isinstance(part, FilePart) and str(part) == f"{path}/a.mp4"
    assert path.read_bytes()[part.start : part.start + part.size] == (loose / "a.mp4").read_bytes()
    assert_same(found, expected, workers=1)
    for source_of_clips in (path, loose):
        streamed = open_source(source_of_clips, PRESET)
        assert isinstance(streamed, MediaSource) and list(streamed.ids) == list(KEYS)


def test_parquet_gives_the_arrays_of_the_loose_files_however_its_pages_are_kept(loose: Path, tmp_path: Path) -> None:
    expected = read_manifest(loose)
    for number, options in enumerate(({"row_group_size": 2, "compression": "zstd"}, {"use_dictionary": False, "write_statistics": False})):
        path = make_parquet(tmp_path / f"train-{number}.parquet", rows_of(loose), **options)
        found = read_manifest(path, columns={"text": "caption"})
        assert [record.id for record in found.records] == [f"train-{number}-{i}" for i in range(3)]
        assert [type(record.audio) for record in found.records[1:]] == [FilePart, type(loose)]
        assert_same(found, expected, workers=1 - number)


def test_cells_are_found_in_any_order_and_two_columns_are_kept_open(loose: Path, tmp_path: Path) -> None:
    found = read_manifest(make_parquet(tmp_path / "x.parquet", rows_of(loose), row_group_size=2), columns={"text": "caption"})
    for number in (2, 0, 1, 1):
        part = found.records[number].video
        assert isinstance(part, FilePart)
        with parts.open_bytes(part) as file:
            assert file.read() == (loose / f"{KEYS[number]}.mp4").read_bytes()
    for record in found.records[:2]:
        assert isinstance(record.audio, FilePart)
        with parts.open_bytes(record.audio) as file:
            assert file.read(4) == b"RIFF"
    assert parts._column.cache_info().currsize == 2


def test_a_manifest_from_any_source_reads_back_as_the_same_records(loose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = make_tar(tmp_path / "shard.tar", members_of(loose))
    parquet = make_parquet(tmp_path / "x.parquet", rows_of(loose))
    out = tmp_path / "clips.jsonl"
    assert main(["manifest", "from", str(tar), str(parquet), "--columns", "text=caption", "--out", str(out)]) == 0
    assert "6 records (text 6, video 6, audio 6), the first: a" in capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0]["video"]["file"] == "shard.tar" and rows[0]["views"] == 0 and rows[5]["audio"] == str(loose / "sub/c.wav")
    read, made = read_manifest(out), read_manifest([tar, parquet], columns={"text": "caption"})
    assert [(r.id, r.text, r.video, r.audio) for r in read.records] == [(r.id, r.text, r.video, r.audio) for r in made.records]
    assert_same(dataclasses.replace(read, records=read.records[:3]), read_manifest(loose))


def test_preparing_from_a_tar_gives_the_bytes_of_preparing_loose_files(loose: Path, tmp_path: Path) -> None:
    made = make_tar(tmp_path / "shard.tar", members_of(loose))
    settings = ["--set", "frames=4", "--set", "pixels=5000", "--set", "audio_seconds=1", "--workers", "0"]
    for name, manifest in (("one", loose), ("other", made)):
        assert main(["prepare", "--manifest", str(manifest), "--out", str(tmp_path / name), *settings]) == 0
    shards = [next((tmp_path / name).glob("*.array_record*")).read_bytes() for name in ("one", "other")]
    assert shards[0] == shards[1]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_a_folder_with_metadata_is_read_as_datasets_does(loose: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "data" / "train"
    shutil.copytree(loose, folder, ignore=shutil.ignore_patterns("*.txt", "*.json"))
    rows = [{"file_name": f"{key}.mp4", "audio_file_name": f"{key}.wav", "text": f"caption {key}", "label": 1.5} for key in KEYS]
    if name.endswith("csv"):
        lines = ["file_name,audio_file_name,text,label", *(",".join(map(str, row.values())) for row in rows)]
        (folder / name).write_text("\n".join(lines) + "\n")
    elif name.endswith("jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), folder / name)
    found = read_manifest(folder.parent)
    assert not found.problems and found.records[2].video == folder / "sub/c.mp4" and found.records[2].audio == folder / "sub/c.wav"
    assert [record.text for record in found.records] == [f"caption {key}" for key in KEYS]
    assert [record.id.rpartition("-")[0] for record in found.records] == (
        ["a", "b", "c"] if name != "metadata.parquet" else ["metadata"] * 3
    )


def test_ids_that_are_made_do_not_depend_on_the_order_or_the_place(tmp_path: Path) -> None:
    lines = ["name,path", "rain,v/a.mp4", "fog,v/a.mp4", '"wind, and ""hail""",b.mp4']
    for folder, order in (("one", lines), ("other", [lines[0], *reversed(lines[1:])])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "clips.csv").write_text("\n".join(order) + "\n")
    one, other = (read_manifest(tmp_path / name / "clips.csv", columns={"text": "name", "video": "path"}) for name in ("one", "other"))
    assert [record.id for record in one.records] == [record.id for record in reversed(other.records)]
    assert one.records[2].text == 'wind, and "hail"' and one.records[0].video == tmp_path / "one/v/a.mp4"
    assert any(f"3 records have no id and are called by their file and a digest; the first: {one.records[0].id}" in n for n in one.notes)


def test_a_list_of_captions_is_a_record_each_where_the_column_is_named_or_of_parquet(tmp_path: Path) -> None:
    rows = [{"video_id": "v7", "caption": ["rain", "fog"], "video": "v7.mp4"}, {"video_id": "v8", "caption": ["sun"], "video": "v8.mp4"}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    for name in ("train.json", "train.parquet"):
        found = read_manifest(tmp_path / name, columns={"id": "video_id", "text": "caption", "audio": "video", "video": "video"})
        assert [(r.id, r.text, r.audio) for r in found.records] == [
            ("v7-0", "rain", tmp_path / "v7.mp4"),
            ("v7-1", "fog", tmp_path / "v7.mp4"),
            ("v8", "sun", tmp_path / "v8.mp4"),
        ]


def test_columns_give_intervals_and_pictures(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("key\tpicture\tfrom\tto\n1\ta.png\t\t2.5\n2\tb.png\t1\t0\n3\tc.png\tx\t2\n")
    found = read_manifest(tmp_path / "t.tsv", columns={"id": "key", "image": "picture", "start": "from", "end": "to"})
    assert [(r.id, r.video, r.timestamps) for r in found.records] == [("1", tmp_path / "a.png", (0.0, 2.5))]
    assert [problem.reason.partition("timestamps")[2][:12] for problem in found.problems] == [' ["1", "0"] ', ' ["x", "2"] ']


def test_a_picture_in_a_tar_is_a_video_of_one_frame(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(file, "PNG")
    (record,) = read_manifest(make_tar(tmp_path / "p.tar", {"x.png": file.getvalue(), "x.txt": b"grey"})).records
    (features,) = load_features([record], PRESET, "v", 0)
    assert isinstance(features, Features) and features.vision is not None


def test_patterns_name_several_files_and_an_id_is_used_once(tmp_path: Path) -> None:
    for number in range(3):
        make_tar(tmp_path / f"{number:03}.tar", {f"k{number % 2}.txt": b"words"})
    for pattern in ("{000..002}.tar", "*.tar", "00[0-2].tar"):
        found = read_manifest(tmp_path / pattern)
        assert [record.id for record in found.records] == ["k0", "k1"]
        (problem,) = found.problems
        assert problem.reason.startswith(f"{tmp_path / '002.tar'}:k0: id 'k0' was used in {tmp_path / '000.tar'} already")
    assert len(read_manifest(tmp_path).records) == 2
    with pytest.raises(InputError, match="no file matches the pattern"):
        read_manifest(tmp_path / "*.parquet")


def bad_tar(path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, kind in (("link.mp4", tarfile.SYMTYPE), ("hard.mp4", tarfile.LNKTYPE), ("pipe.mp4", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/hostname"
            tar.addfile(member)
        for name in (
            *("/abs.mp4", "../up.mp4", "link.txt", "good.txt", "lone.json", "two.a.mp4", "two.b.mp4", "latin.txt"),
            *("twice.txt", "twice.txt", "broken.json", "other.npy"),
        ):
            data = b"\xff" if name == "latin.txt" else b"{" if name == "broken.json" else b"{}" if name == "lone.json" else b"words"
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_what_is_wrong_with_a_tar_is_said_of_each_record(tmp_path: Path) -> None:
    found = read_manifest(bad_tar(tmp_path / "bad.tar"))
    assert [record.id for record in found.records] == ["good"]
    said = {str(problem.id): problem.reason for problem in found.problems}
    for name, words in {
        "link": "member 'link.mp4' is a link",
        "hard": "member 'hard.mp4' is a link",
        "pipe": "is not a plain file",
        "/abs": "has a name that leads out of the tar",
        "../up": "has a name that leads out of the tar",
        "lone": "has no text, video or audio",
        "two": "has several files of video (.a.mp4, .b.mp4); choose one with --columns video=a.mp4",
        "latin": ".txt: byte 1 is not UTF-8",
        "twice": "has two files .txt",
        "broken": ".json: malformed JSON",
    }.items():
        assert words in said[name]
    assert any(note.startswith("records without a file of video, which others have") for note in found.notes)
    assert any(note.startswith("files .npy that are not read: 1, the first:") for note in found.notes)
    (_, two) = read_manifest(tmp_path / "bad.tar", columns={"video": "b.mp4"}).records
    assert isinstance(two.video, FilePart) and two.video.name == "two.b.mp4"


def test_a_truncated_tar_gives_what_is_whole_and_one_problem(loose: Path, tmp_path: Path) -> None:
    whole = make_tar(tmp_path / "whole.tar", members_of(loose))
    data, last = whole.read_bytes(), read_manifest(whole).records[-1].audio
    assert isinstance(last, FilePart)
    for length, words in ((last.start + 100, "member 'sub/c.wav' is truncated"), (last.start - 300, "the tar is truncated or damaged")):
        (tmp_path / "cut.tar").write_bytes(data[:length])
        found = read_manifest(tmp_path / "cut.tar")
        assert [record.id for record in found.records][:2] == ["a", "b"]
        assert any(words in problem.reason for problem in found.problems)


def test_a_tar_that_changed_since_it_was_listed_is_noticed(loose: Path, tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", members_of(loose))
    record = read_manifest(path).records[1]
    assert isinstance(record.audio, FilePart)
    make_tar(path, {"other.txt": bytes(100), **members_of(loose)})
    with pytest.raises(ClipError, match=r"x.tar/b.wav: the tar has no such member at byte \d+ any more; list it again"):
        read_waveform(record.audio)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ClipError, match="truncated: the tar ends within the member"):
        read_waveform(record.audio)


def test_unusable_sources_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.csv").write_text("caption,path\nrain,a.mp4\n")
    pq.write_table(pa.Table.from_pylist([{"caption": "rain", "n": 1}]), tmp_path / "x.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:-20])
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    make_tar(tmp_path / "empty.tar", {})
    (tmp_path / "folder").mkdir()
    for name, columns, words in (
        ("x.csv", {}, "no column is called text, video, audio or file_name; its columns are caption, path; name them, as in --columns"),
        ("x.csv", {"text": "words"}, "has no column 'words', which --columns names; its columns are caption, path"),
        ("x.parquet", {}, "no column is called text, video, audio or file_name; its columns are caption, n; name them, as in --columns"),
        ("x.parquet", {"text": "caption", "video": "mp4"}, "has no column 'mp4'"),
        ("cut.parquet", {}, "is not a complete Parquet file"),
        ("x.tar.gz", {}, "is compressed with gzip, and is not unpacked here"),
        ("empty.tar", {}, "the manifest is empty"),
        ("folder", {}, "is a directory; name the manifest file in it"),
        ("gone.tar", {}, "manifest not found"),
    ):
        with pytest.raises(InputError) as error:
            read_manifest(tmp_path / name, columns=columns)
        assert str(error.value).startswith(f"{tmp_path / name}: {words}")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"run pip install 'omni-jax\[parquet\]'"):
        read_manifest(tmp_path / "x.parquet")


def test_a_damaged_page_costs_its_rows_and_no_others(loose: Path, tmp_path: Path) -> None:
    path = make_parquet(tmp_path / "x.parquet", rows_of(loose), row_group_size=1, compression="none", write_statistics=True)
    chunk: Any = pq.ParquetFile(path).metadata.row_group(1).column(1)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset : chunk.data_page_offset + 8] = bytes(8)
    path.write_bytes(data)
    found = read_manifest(path, columns={"text": "caption"})
    outcomes = list(load_features(found.records, PRESET, "v", 0))
    good = [isinstance(outcome, Features) for outcome in outcomes]
    assert good == [True, False, True] and str(outcomes[1]).startswith(f"{path}/1/film/b.mp4: cannot be read")


def test_web_addresses_are_refused_and_listed_for_a_downloader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "web.csv").write_text("id,caption,url,from,to\nx,rain,https://a.b/c.mp4,1,2\ny,fog,d.mp4,,\n")
    columns = ["--columns", "text=caption,video=url", "--columns", "start=from,end=to"]
    assert main(["manifest", "from", str(tmp_path / "web.csv"), *columns, "--out", str(tmp_path / "m.jsonl")]) == 1
    said = capsys.readouterr().err
    assert "record 'x': video https://a.b/c.mp4: is a web address, and nothing is fetched; 'omni-jax manifest from SOURCE" in said
    assert main(["manifest", "from", str(tmp_path / "web.csv"), *columns, "--fetch-list", str(tmp_path / "list.tsv")]) == 0
    assert (tmp_path / "list.tsv").read_text() == "id\turl\tstart\tend\nx\thttps://a.b/c.mp4\t1.0\t2.0\n"
    assert [row["id"] for row in map(json.loads, (tmp_path / "m.jsonl").read_text().splitlines())] == ["y"]
    (tmp_path / "got").mkdir()
    (tmp_path / "got" / "x.webm").touch()
    arguments = ["manifest", "from", str(tmp_path / "web.csv"), *columns, "--out", str(tmp_path / "m.jsonl"), "--fetched"]
    assert main([*arguments, str(tmp_path / "got")]) == 0
    row = json.loads((tmp_path / "m.jsonl").read_text().splitlines()[0])
    assert row == {"id": "x", "text": "rain", "video": "got/x.webm", "timestamps": [1.0, 2.0]}
    assert main([*arguments, str(tmp_path / "nowhere")]) == 2 and "no such folder" in capsys.readouterr().err


def test_parts_of_files_that_no_one_made_are_refused(tmp_path: Path) -> None:
    bad = ({"file": "a.tar"}, {"file": "a.tar", "name": "x", "start": -1, "size": 1}, {"file": 3, "name": "x", "start": 0, "size": 1})
    rows = [{"id": str(i), "video": value} for i, value in enumerate(bad)]
    rows.append({"id": "out", "video": {"file": "../a.tar", "name": "x", "start": 0, "size": 1}})
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_manifest(tmp_path / "m.jsonl", tmp_path)
    assert not found.records and "leads out of the media root" in found.problems[3].reason
    assert all("part of" in problem.reason for problem in found.problems[:3])


def test_bad_rows_of_a_table_are_problems_of_those_rows(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"id,text\na,rain\nb,fog,more\nc,\xff\nd,\n\ne,sun\n")
    found = read_manifest(tmp_path / "x.csv")
    assert [record.id for record in found.records] == ["a", "e"]
    assert [(problem.line, problem.reason.partition(": ")[2][:12]) for problem in found.problems] == [
        (3, "has 3 cells "),
        (4, "is not UTF-8"),
        (5, "record 'd': "),
    ]


@pytest.mark.parametrize("name", ["s.tar", "s.parquet", "s.csv"])
def test_damaged_bytes_are_problems_or_one_line_and_nothing_else(tmp_path: Path, name: str) -> None:
    rows = [{"text": f"caption {i}", "video": {"bytes": b"y" * 300, "path": f"{i}.mp4"}} for i in range(6)]
    make_tar(tmp_path / "s.tar", {f"{i}.{kind}": data for i in range(4) for kind, data in (("mp4", b"x" * 700), ("txt", b"words"))})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "s.parquet", row_group_size=2)
    (tmp_path / "s.csv").write_text("id,text,video\n" + "".join(f'{i},"cap, {i}",{i}.mp4\n' for i in range(6)))
    whole, rng = (tmp_path / name).read_bytes(), np.random.default_rng(0)
    read = 0
    for number in range(60):
        data = bytearray(whole if number % 4 else whole[: rng.integers(1, len(whole))])
        for place in rng.integers(0, len(data), rng.integers(1, 8)):
            data[place] = rng.integers(256)
        (tmp_path / name).write_bytes(data)
        try:
            records = read_manifest(tmp_path / name).records
        except InputError as error:
            assert "\n" not in str(error)
            continue
        read += 1
        for part in (record.video for record in records if isinstance(record.video, FilePart)):
            try:
                parts.check_part(part)
            except ClipError as error:
                assert "\n" not in str(error)
    assert read > 5
