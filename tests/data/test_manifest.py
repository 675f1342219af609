"""Manifests of both forms, and every way a line can be wrong."""

from __future__ import annotations

import json
import os
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from omni_jax.data.manifest import Problem, read_manifest, write_jsonl_atomic
from omni_jax.types import InputError, Record
from tests.golden_set import GoldenSet

GOOD = b'{"id": "good", "text": "a dog barks"}'


def write(folder: Path, *lines: bytes | dict[str, Any], name: str = "clips.jsonl") -> Path:
    path = folder / name
    path.write_bytes(b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines))
    return path


def official(caption: Any = "a dog barks", **fields: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": caption}], **fields}


def test_golden_manifest(golden: GoldenSet) -> None:
    got = read_manifest(golden.manifest)
    assert not got.problems
    assert got.records == golden.records


def test_plain_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"id": "a", "text": "one", "video": "media/a.mp4", "audio": "media/a.wav", "timestamps": [1, 2.5]},
        b"",
        {"id": "b", "video": "/elsewhere/b.mp4"},
        {"id": "c", "text": "  spaces stay  ", "video": None, "timestamps": None},
        {"id": 17, "audio": "d.wav"},
    )
    got = read_manifest(path)
    assert not got.problems
    assert got.records == (
        Record("a", "one", tmp_path / "media/a.mp4", tmp_path / "media/a.wav", (1.0, 2.5), 1),
        Record("b", None, Path("/elsewhere/b.mp4"), None, None, 3),
        Record("c", "  spaces stay  ", None, None, None, 4),
        Record("17", None, None, tmp_path / "d.wav", None, 5),
    )


def test_official_lines_may_stand_beside_plain_ones(tmp_path: Path) -> None:
    path = write(tmp_path, official("rain", id="a", video="a.mp4", audio="a.mp4", timestamps=[0, 3]), {"id": "b", "text": "plain"})
    got = read_manifest(path)
    assert not got.problems
    assert got.records[0] == Record("a", "rain", tmp_path / "a.mp4", tmp_path / "a.mp4", (0.0, 3.0), 1)
    assert got.records[1].text == "plain"


def test_relative_manifest_and_media_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"id": "a", "video": "v/a.mp4"})
    assert read_manifest("clips.jsonl").records[0].video == tmp_path / "v/a.mp4"
    assert read_manifest("clips.jsonl", "media").records[0].video == tmp_path / "media/v/a.mp4"
    assert read_manifest("clips.jsonl", tmp_path / "x").records[0].video == tmp_path / "x/v/a.mp4"


OUTSIDE = ("../secret.mp4", "v/../../secret.mp4", "/etc/hostname", "link.mp4", "folder/secret.mp4", "..", ".", "gs://bucket/a.mp4")


@pytest.mark.parametrize("where", OUTSIDE)
@pytest.mark.parametrize("key", ["video", "audio"])
def test_a_media_root_that_is_given_confines(tmp_path: Path, where: str, key: str) -> None:
    root = tmp_path / "root"
    (root / "v").mkdir(parents=True)
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (root / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (root / "folder").symlink_to(tmp_path)
    (root / "own.mp4").symlink_to(root / "v")
    inside = ("v/../v/a.mp4", str(root / "b.mp4"), "own.mp4")
    path = write(tmp_path, {"id": "x", key: where}, *({"id": name, key: value} for name, value in zip("abc", inside, strict=True)))
    got = read_manifest(path, root)
    assert [record.id for record in got.records] == ["a", "b", "c"]
    (problem,) = got.problems
    assert problem.id == "x" and f"{key} {where!r} leads out of the media root {root}" in problem.reason
    assert len(read_manifest(path).records) == 4, "without a root the manifest's author is trusted"


def test_a_root_that_is_a_link_is_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "real")
    assert not read_manifest(write(tmp_path, {"id": "a", "video": "a.mp4"}), tmp_path / "root").problems


def test_a_line_without_end_is_one_problem_and_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "clips.jsonl"
    with path.open("wb") as file:
        file.write(GOOD + b'\n{"id": "x", "text": "')
        for _ in range(40):
            file.write(b"a" * (1 << 20))
        file.write(b'"}\n{"id": "last", "text": "t"}\n')
    tracemalloc.start()
    got = read_manifest(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [record.line for record in got.records] == [1, 3]
    assert [(p.line, p.reason.split(": ")[1]) for p in got.problems] == [
        (2, "a line of over 16 MiB is no record; write one JSON object a line")
    ]
    assert peak < 40 << 20


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path, b"\xef\xbb\xbf" + GOOD + b"\r", b'{"id": "b", "text": "\xe9\x9b\xa8"}\r')
    got = read_manifest(path)
    assert not got.problems
    assert [record.text for record in got.records] == ["a dog barks", "雨"]


BAD_LINES: dict[str, tuple[bytes | dict[str, Any], str | None, str]] = {
    "malformed": (b'{"id": "x", "text": ', None, "malformed JSON (Expecting value at column 21); write one JSON object a line"),
    "two objects": (b'{"id": "x"} {"id": "y"}', None, "malformed JSON (Extra data"),
    "NaN": (b'{"id": "x", "text": NaN}', "x", "record 'x': has no text, video or audio"),
    "deep": (b"[" * 100_000, None, "malformed JSON"),
    "long number": (b'{"id": ' + b"9" * 5000 + b"}", None, "malformed JSON"),
    "bytes": (b'{"id": "x", "text": "caf\xe9"}', None, "byte 25 of the line is not UTF-8"),
    "surrogate": (b'{"id": "x", "text": "\\ud83d"}', "x", "the caption holds half of a surrogate pair"),
    "list": (b"[1, 2]", None, "a list where a record belongs"),
    "unknown field": ({"id": "x", "text": "t", "vidoe": "a.mp4"}, "x", "unknown field 'vidoe'; the fields are id, text, video, audio"),
    "mixed forms": (official(id="x", text="t"), "x", "unknown field 'text'; the fields are id, conversations"),
    "field twice": (b'{"id": "x", "text": "t", "text": "u"}', None, "field 'text' appears twice"),
    "no id": ({"text": "t"}, None, "has no id"),
    "null id": ({"id": None, "text": "t"}, None, "has no id"),
    "empty id": ({"id": "", "text": "t"}, None, "has no id"),
    "list id": ({"id": ["x"], "text": "t"}, None, "id is a list"),
    "boolean id": ({"id": True, "text": "t"}, None, "id is true or false"),
    "duplicate id": ({"id": "good", "text": "t"}, "good", "id 'good' was used on line 1 already"),
    "number as text": ({"id": "x", "text": 3}, "x", "record 'x': text is a number; make it a string"),
    "empty caption": ({"id": "x", "text": ""}, "x", "record 'x': the caption is empty; write one"),
    "blank caption": ({"id": "x", "text": " \n", "video": "a.mp4"}, "x", "record 'x': the caption is empty"),
    "empty official caption": (official("", id="x", video="a.mp4"), "x", "record 'x': the caption is empty"),
    "number as path": ({"id": "x", "video": 3}, "x", "record 'x': video is a number; make it the path of a file"),
    "empty path": ({"id": "x", "audio": ""}, "x", "record 'x': audio is an empty string"),
    "nul in path": ({"id": "x", "audio": "a\0.wav"}, "x", "record 'x': audio is a string; make it the path"),
    "web address": ({"id": "x", "video": "http://a.b/c.mp4"}, "x", "record 'x': video http://a.b/c.mp4: is a web address, and"),
    "no modality": ({"id": "x"}, "x", "record 'x': has no text, video or audio"),
    "all null": ({"id": "x", "text": None, "video": None}, "x", "record 'x': has no text, video or audio"),
    "no turns": ({"id": "x", "conversations": []}, "x", "conversations must be"),
    "three turns": (
        {"id": "x", "conversations": [{"from": who, "value": "v"} for who in ("human", "gpt", "human")]},
        "x",
        "conversations must be",
    ),
    "turns are text": ({"id": "x", "conversations": "hello"}, "x", "conversations must be"),
    "caption of a turn": (official(7, id="x"), "x", "conversations must be"),
    "reversed interval": ({"id": "x", "video": "a.mp4", "timestamps": [3, 2]}, "x", "record 'x': timestamps [3, 2] must be [start, end]"),
    "empty interval": ({"id": "x", "video": "a.mp4", "timestamps": [2, 2]}, "x", "record 'x': timestamps [2, 2] must be"),
    "negative interval": ({"id": "x", "video": "a.mp4", "timestamps": [-1, 2]}, "x", "record 'x': timestamps [-1, 2] must be"),
    "interval of words": ({"id": "x", "video": "a.mp4", "timestamps": ["a", "b"]}, "x", 'record \'x\': timestamps ["a", "b"] must be'),
    "interval of three": ({"id": "x", "video": "a.mp4", "timestamps": [0, 1, 2]}, "x", "record 'x': timestamps [0, 1, 2] must be"),
    "endless interval": (b'{"id": "x", "video": "a.mp4", "timestamps": [0, 1e999]}', "x", "record 'x': timestamps [0, Infinity] must be"),
    "huge interval": (b'{"id": "x", "video": "a.mp4", "timestamps": [0, 1' + b"0" * 400 + b"]}", "x", "record 'x': timestamps [0, 1000"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_never_stops_the_others(tmp_path: Path, case: str) -> None:
    line, known_id, words = BAD_LINES[case]
    path = write(tmp_path, GOOD, line, {"id": "last", "text": "t"})
    got = read_manifest(path)
    assert [record.id for record in got.records] == ["good", "last"]
    (problem,) = got.problems
    assert problem.reason.startswith(f"{path}:2: {words}")
    assert "\n" not in problem.reason
    assert (problem.id, problem.line, problem.file) == (known_id, 2, str(path))


def test_only_the_second_use_of_an_id_is_refused(tmp_path: Path) -> None:
    got = read_manifest(
        write(tmp_path, *({"id": "same", "text": f"{i}"} for i in range(3)), {"id": 1, "text": "t"}, {"id": "1", "text": "t"})
    )
    assert [(r.id, r.line) for r in got.records] == [("same", 1), ("1", 4)]
    assert [(p.id, p.line) for p in got.problems] == [("same", 2), ("same", 3), ("1", 5)]


@given(st.lists(st.binary(max_size=40).filter(lambda data: b"\n" not in data), max_size=5))
def test_no_bytes_raise(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    path = write(tmp_path_factory.mktemp("fuzz"), GOOD, *lines)
    got = read_manifest(path)
    assert len(got.records) + len(got.problems) == 1 + sum(bool(line.strip()) for line in lines)


def test_unusable_manifests(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n  \n")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, words in {
        "missing.jsonl": "manifest not found; check the path",
        "": "is a directory; name the manifest file in it",
        "empty.jsonl": "the manifest is empty; give one with records",
        "blank.jsonl": "the manifest is empty",
        "pipe.jsonl": "is a pipe, which cannot be read twice; write the manifest into a file",
    }.items():
        with pytest.raises(InputError) as error:
            read_manifest(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: {words}")
    with pytest.raises(InputError, match="not a kind of storage that is known"):
        read_manifest("http://a.b/clips.jsonl")


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[epath.Path]:
    """gs://bucket, kept in a local folder."""

    def local(path: Any) -> Path:
        return tmp_path / os.fspath(path).removeprefix("gs://")

    folder = tmp_path / "bucket"
    folder.mkdir()
    with epath.testing.mock_epath(
        open=lambda original, path, *args, **kwargs: open(local(path), *args, **kwargs),
        isdir=lambda original, path: local(path).is_dir(),
        replace=lambda original, path, target: local(path).replace(local(target)),
    ):
        yield epath.Path("gs://bucket")


def test_manifest_in_an_object_store(bucket: epath.Path, tmp_path: Path) -> None:
    write(tmp_path / "bucket", {"id": "a", "video": "v/a.mp4"}, {"id": "b", "audio": "gs://other/b.wav"})
    got = read_manifest("gs://bucket/clips.jsonl")
    assert not got.problems
    assert [str(record.video or record.audio) for record in got.records] == ["gs://bucket/v/a.mp4", "gs://other/b.wav"]
    assert write_jsonl_atomic("gs://bucket/out.jsonl", [{"id": "a"}]) == 1
    assert (tmp_path / "bucket/out.jsonl").read_text() == '{"id": "a"}\n'


def test_problems_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "clips.errors.jsonl"
    problems = [Problem("a", 3, "a.mp4", "a.mp4: truncated; fetch it again"), Problem(None, 4, "clips.jsonl", "雨")]
    assert write_jsonl_atomic(target, [problem.row() for problem in problems]) == 2
    rows = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == {"id": "a", "line": 3, "file": "a.mp4", "reason": "a.mp4: truncated; fetch it again"}
    assert rows[1]["reason"] == "雨"

    def interrupted() -> Iterator[dict[str, Any]]:
        yield {"id": "b"}
        raise KeyboardInterrupt

    before = target.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_jsonl_atomic(target, interrupted())
    assert target.read_bytes() == before
    assert os.listdir(tmp_path) == [target.name]
    with pytest.raises(InputError, match="cannot be written"):
        write_jsonl_atomic(tmp_path / "nowhere" / "x.jsonl", [])


# ------------------------------------------------------------------------------------------------------------ other people's manifests


def as_array(folder: Path, *entries: Any, indent: int | None = 1, name: str = "clips.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(list(entries), indent=indent), encoding="utf-8")
    return path


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["clips.json", "clips.jsonl"])
def test_an_array_is_read_entry_by_entry(tmp_path: Path, indent: int | None, name: str) -> None:
    entries = [official("rain", id="a", video="a.mp4"), 7, {"id": "b", "text": "plain"}, official("fog", id="a", video="c.mp4")]
    got = read_manifest(as_array(tmp_path, *entries, indent=indent, name=name))
    assert [(r.id, r.text) for r in got.records] == [("a", "rain"), ("b", "plain")]
    assert [p.reason.partition(": ")[2] for p in got.problems] == [
        "entry 2: a number where a record belongs; correct the entry",
        f"entry 4: id 'a' was used on line {2 if indent else 1} already; give every record its own",
    ]
    assert all(p.reason.startswith(f"{tmp_path / name}:{p.line}: entry ") for p in got.problems)
    assert [r.line for r in got.records] == ([2, 17] if indent else [1, 1])


def test_a_damaged_array_keeps_the_entries_before_the_damage(tmp_path: Path) -> None:
    path = as_array(tmp_path, *({"id": str(i), "text": "t"} for i in range(4)))
    whole = path.read_text()
    path.write_text(whole[: whole.index('"2"')])
    got = read_manifest(path)
    assert [r.id for r in got.records] == ["0", "1"]
    (problem,) = got.problems
    assert "entry 3: malformed JSON" in problem.reason and "nothing from here on can be read" in problem.reason
    path.write_text('[{"id": "a", "text": "t", "text": "u"}, {"id": "b", "text": NaN}, {"id": "c", "text": "t", "score": NaN}]')
    got = read_manifest(path)
    assert [r.id for r in got.records] == ["c"]
    assert ["appears twice" in got.problems[0].reason, "has no text, video or audio" in got.problems[1].reason] == [True, True]
    for text in ("[", "[[[[", '[{"id": "a", "text": "t"}', "[" * 50_000, "[\xff"):
        path.write_bytes(text.encode("latin-1"))
        assert read_manifest(path).problems
    path.write_text("[]")
    with pytest.raises(InputError, match="empty"):
        read_manifest(path)


@pytest.mark.parametrize("indent", [None, 2])
def test_what_follows_an_array_is_a_problem(tmp_path: Path, indent: int | None) -> None:
    path = as_array(tmp_path, {"id": "a", "text": "t"}, indent=indent)
    whole = path.read_text()
    path.write_text(f"{whole} \n\n")
    assert read_manifest(path).problems == ()
    path.write_text(f"{whole} {whole}")
    got = read_manifest(path)
    assert [r.id for r in got.records] == ["a"]
    (problem,) = got.problems
    assert problem.line == whole.count("\n") + 1 and "follows the end of the array" in problem.reason


def test_conversations_of_null_are_absent(tmp_path: Path) -> None:
    got = read_manifest(write(tmp_path, {"id": "a", "text": "t", "conversations": None}, {"text": "t", "conversations": None}))
    assert [(r.id, r.text) for r in got.records] == [("a", "t")]
    (problem,) = got.problems
    assert "has no id" in problem.reason


def test_a_line_that_is_an_array_is_one_bad_line_among_others(tmp_path: Path) -> None:
    got = read_manifest(write(tmp_path, b"[1, 2]", GOOD))
    assert [r.line for r in got.records] == [2] and [p.line for p in got.problems] == [1]


def test_conversations_without_ids_get_the_same_ones_in_any_order(tmp_path: Path) -> None:
    entries = [official(caption, video=f"v/{name}.mp4") for caption, name in (("rain", "a"), ("fog", "a"), ("sun", "b"))]
    got = read_manifest(as_array(tmp_path, *entries, entries[0]))
    names = [r.id for r in got.records]
    assert [name.rpartition("-")[0] for name in names] == ["a", "a", "b"] and len(set(names)) == 3
    assert [r.id for r in read_manifest(write(tmp_path, *reversed(entries))).records] == names[::-1]
    assert any("3 conversations have no id" in note and names[0] in note for note in got.notes)
    (problem,) = got.problems
    assert "the same entry appears on line 2 already" in problem.reason
    assert read_manifest(write(tmp_path, official("a", id="x"))).notes[0].startswith("1 conversations ask something of their own")


def test_system_turns_lists_of_one_and_other_fields(tmp_path: Path) -> None:
    turns = [
        {"from": "system", "value": "You are helpful."},
        {"from": "human", "value": "<image>\nPlease describe the video."},
        {"from": "gpt", "value": "rain"},
    ]
    entry = {"conversations": turns, "video": ["a.mp4"], "audio": ["a.wav"], "type": "retrieval", "neg_text": ["sun"], "duration": 3.5}
    got = read_manifest(write(tmp_path, {"id": "x", **entry}, {"id": "y", **entry, "url": "http://a/b"}))
    assert not got.problems
    assert got.records[0] == Record("x", "rain", tmp_path / "a.mp4", tmp_path / "a.wav", None, 1)
    assert got.records[1].extra == {"type": "retrieval", "neg_text": ["sun"], "duration": 3.5, "url": "http://a/b"}
    assert got.notes == (
        "fields that are carried along and not used: type (2 records), neg_text (2 records), duration (2 records), url (1 records)",
    )


def test_a_caption_that_ends_with_the_end_token_is_the_caption_without_it(tmp_path: Path) -> None:
    """The training code adds the token only where a label lacks it; elsewhere in a caption it is text."""
    got = read_manifest(
        write(tmp_path, official("rain<|im_end|>", id="x"), {"id": "y", "text": "rain<|im_end|>"}, official("<|im_end|>", id="z"))
    )
    assert [r.text for r in got.records] == ["rain", "rain<|im_end|>"] and "the caption is empty" in got.problems[0].reason


def test_pos_image_holds_the_video_of_a_sound(tmp_path: Path) -> None:
    pair = {"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\nPlease describe the video."}]}
    sound = official("", id="x", audio="a.wav", pos_image=pair)
    got = read_manifest(
        write(
            tmp_path,
            sound,
            {**sound, "id": "own", "video": "b.mp4"},
            {**sound, "id": "cut", "timestamps": [0, 1]},
            {**sound, "id": "picture", "pos_image": {"image": "a.png"}},
        )
    )
    assert got.records == (Record("x", None, tmp_path / "a.mp4", tmp_path / "a.wav", None, 1),)
    assert [p.id for p in got.problems] == ["own", "cut", "picture"]
    assert "pos_image" in got.problems[0].reason and "timestamps" in got.problems[1].reason


NEAR: dict[str, tuple[dict[str, Any], str]] = {
    "caption": ({"id": "x", "caption": "rain", "video": "a.mp4"}, "unknown field 'caption'; .*did you mean 'text'"),
    "caption of a null text": ({"id": "x", "text": None, "caption": "rain", "video": "a.mp4"}, "did you mean 'text'"),
    "two in capitals": ({"id": "x", "text": "rain", "Video": "a.mp4", "VIDEO": "b.mp4"}, "did you mean 'video'"),
    "video_path beside sound": ({"id": "x", "audio": "a.wav", "video_path": "a.mp4"}, "did you mean 'video'"),
    "video_path": ({"id": "x", "text": "rain", "video_path": "a.mp4"}, "did you mean 'video'"),
    "path": ({"id": "x", "text": "rain", "path": "a.mp4"}, "did you mean 'video' or 'audio'"),
    "frame_dir": ({"id": "x", "text": "rain", "frame_dir": "frames/x"}, "did you mean 'video'"),
    "image": ({"id": "x", "text": "rain", "image": "a.png"}, "did you mean 'video'"),
    "audo": ({"id": "x", "text": "rain", "audo": "a.wav"}, "did you mean 'audio'"),
    "timestamp": ({"id": "x", "video": "a.mp4", "timestamp": [0, 1]}, "did you mean 'timestamps'"),
    "interval": ({"id": "x", "audio": "a.wav", "interval": [0, 1]}, "did you mean 'timestamps'"),
    "messages": ({"id": "x", "messages": [{"role": "user"}], "video": "a.mp4"}, "did you mean 'conversations'"),
    "several files": ({"id": "x", "video": ["a.mp4", "b.mp4"]}, "video lists 2 files"),
    "several captions": ({"id": "x", "text": ["a", "b"]}, "holds 2 captions"),
}


@pytest.mark.parametrize("case", NEAR)
def test_a_name_that_stands_for_a_field_that_is_lacking_gets_advice(tmp_path: Path, case: str) -> None:
    entry, words = NEAR[case]
    (problem,) = read_manifest(write(tmp_path, GOOD, entry)).problems
    assert re.search(words, problem.reason), problem.reason


def test_the_same_names_beside_the_field_are_carried_along(tmp_path: Path) -> None:
    got = read_manifest(
        write(
            tmp_path,
            {"id": "a", "text": "t", "video": "a.mp4", "caption": "u", "path": "x", "video_id": "y", "timestamps": [0, 1], "start": 0},
            {"id": "b", "text": "t", "audio": "a.wav", "image": "cover.png", "file": "b.json", "Prefix": "x"},
            {"id": "c", "text": "t", "start": 3, "title": "x"},
        )
    )
    assert not got.problems
    assert set(got.records[0].extra) == {"caption", "path", "video_id", "start"} and got.records[1].video is None
    assert not any("timestamps" in note for note in got.notes)


@pytest.mark.parametrize(
    "extra",
    [{"start": 0, "end": 1}, {"Start Time": "00:01", "end-time": "00:09"}, {"begin": 2.5}, {"segment": 7}, {"timestamp": "2024-05-01"}],
)
def test_numbers_that_may_say_an_interval_lose_no_record_and_are_told(tmp_path: Path, extra: dict[str, Any]) -> None:
    got = read_manifest(write(tmp_path, {"id": "a", "video": "a.mp4", **extra}, {"id": "b", "text": "t", **extra}))
    assert not got.problems and got.records[0].timestamps is None and got.records[0].extra == extra
    told = [note for note in got.notes if "write timestamps: [start, end] in seconds" in note]
    assert len(told) == ("timestamp" not in extra)
    assert all(f"{name} (1 records)" in note for note in told for name in extra)


def test_fields_in_capitals_are_read_and_told(tmp_path: Path) -> None:
    entry = {"ID": 7, "Text": "rain", "Video": "a.mp4", "AUDIO": "a.wav", "audio": None, "Timestamps": [0, 1]}
    got = read_manifest(write(tmp_path, entry, {"id": "b", "text": "t", "Text": "u"}, {"id": "c", "text": "t", "Text": 3}))
    assert not got.problems
    assert got.records[0] == Record("7", "rain", tmp_path / "a.mp4", tmp_path / "a.wav", (0.0, 1.0), 1)
    assert [r.text for r in got.records[1:]] == ["t", "t"] and got.records[1].extra == {"Text": "u"}
    assert any(note.startswith("fields that are read as those without capitals: ID (1 records), Text (1 records)") for note in got.notes)
