"""Benchmarks: every published form, made small here, and what of it is at hand."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest

from omni_jax.data.benchmarks import BENCHMARKS, Annotations, Item, fetch_rows, manifest_rows, match_media, read_annotations, training_rows
from omni_jax.data.manifest import read_manifest, write_jsonl_atomic
from omni_jax.types import InputError


def write_csv(path: Path, rows: Sequence[Sequence[str]], encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows(rows)
    return path


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_pickle(path: Path, content: object, protocol: int = 2) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def read(name: str, path: Path, **options) -> Annotations:
    return read_annotations(name, path, **options)


def told(found: Annotations) -> dict[str, tuple[str, ...]]:
    return {item.id: item.captions for item in found.items}


def test_clotho_has_five_captions_a_clip(tmp_path: Path) -> None:
    head = ["file_name", *(f"caption_{i}" for i in range(1, 6))]
    rows = [["Rain, on leaves.wav", *(f"Rain falls {i}." for i in range(5))], ["b.wav", "One.", "", "Three.", "", ""]]
    found = read("clotho", write_csv(tmp_path / "c.csv", [head, *rows], "utf-8-sig"))
    assert told(found) == {"Rain, on leaves.wav": tuple(f"Rain falls {i}." for i in range(5)), "b.wav": ("One.", "Three.")}


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_sounddescs_pickle_is_read_without_unpickling(tmp_path: Path, protocol: int) -> None:
    path = write_pickle(tmp_path / "descriptions.pkl", {"07033137": "Rain.", "nhu05091190": ["A thrush sings,", "then stops."]}, protocol)
    assert told(read("sounddescs", path)) == {"07033137": ("Rain.",), "nhu05091190": ("A thrush sings, then stops.",)}
    (tmp_path / "test_list.txt").write_text("nhu05091190\n07000000\n")
    found = read("sounddescs", path, split=tmp_path / "test_list.txt")
    assert [item.id for item in found.items] == ["nhu05091190"] and "07000000" in found.problems[0]


def test_a_pickle_that_asks_to_run_code_is_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    with pytest.raises(InputError, match=r"raw\.pkl: its pickle asks for .*nothing was run"):
        read("msvd", write_pickle(tmp_path / "raw.pkl", {"a": Trap()}))
    assert not (tmp_path / "ran").exists()


def test_msrvtt_1k_a(tmp_path: Path) -> None:
    rows = [["key", "vid_key", "video_id", "sentence"], ["ret0", "msr9770", "video9770", "a person is connecting something"]]
    assert told(read("msrvtt", write_csv(tmp_path / "m.csv", rows))) == {"video9770": ("a person is connecting something",)}
    with pytest.raises(InputError, match="no column for the caption; its columns are key, video_id"):
        read("msrvtt", write_csv(tmp_path / "m.csv", [["key", "video_id"], ["ret0", "video9770"]]))


def test_msvd_pickle_and_text_say_the_same(tmp_path: Path) -> None:
    name = "-4wsuPCjDBc_5_15"
    words = {name: [["a", "squirrel", "eats"], ["an", "animal", "is", "chewing"]], "zzz": [["rain"]]}
    pickled = read("msvd", write_pickle(tmp_path / "raw-captions.pkl", words))
    (tmp_path / "AllVideoDescriptions.txt").write_text(f"# MSR corpus\n\n{name} a squirrel eats\nzzz rain\n{name} an animal is chewing\n")
    assert read("msvd", tmp_path / "AllVideoDescriptions.txt") == pickled
    assert told(pickled) == {name: ("a squirrel eats", "an animal is chewing"), "zzz": ("rain",)}
    squirrel, rain = pickled.items
    assert squirrel.interval == (5, 15) and squirrel.url == "https://www.youtube.com/watch?v=-4wsuPCjDBc"
    assert rain.interval is None and rain.url is None
    assert list(fetch_rows(pickled.items)) == [(name, squirrel.url, "5", "15")]


def test_didemo_descriptions_make_one_paragraph(tmp_path: Path) -> None:
    moment = {"times": [[0, 0]], "num_segments": 6, "dl_link": "https://example.org/1"}
    rows = [{"video": "1@N0_a.avi", "description": text, "annotation_id": i, **moment} for i, text in enumerate(("first", "second "))]
    rows.append({"video": "2@N0_b.mov", "description": "other", "annotation_id": 9})
    found = read("didemo", write_json(tmp_path / "test_data.json", rows))
    assert told(found) == {"1@N0_a.avi": ("first second",), "2@N0_b.mov": ("other",)}
    assert [item.url for item in found.items] == ["https://example.org/1", None]


def test_vatex_takes_the_english_captions(tmp_path: Path) -> None:
    name = "G9zN5TTuGO4_000179_000189"
    path = write_json(tmp_path / "v.json", [{"videoID": name, "enCap": ["One.", "Two."], "chCap": ["一"]}, {"videoID": "x", "enCap": []}])
    found = read("vatex", path)
    assert told(found) == {name: ("One.", "Two.")} and found.items[0].interval == (179, 189)
    assert found.problems == (f"{path}: entry 2: clip 'x' has no caption",)
    with pytest.raises(InputError, match="entry 1 has no videoID or no enCap"):
        read("vatex", write_json(tmp_path / "v.json", [{"id": 1}]))


def test_youcook2_has_a_clip_a_step_of_each_subset(tmp_path: Path) -> None:
    steps = [{"segment": [5, 21.5], "id": 0, "sentence": "Grill the\ntomatoes."}, {"segment": [9, 2], "id": 1, "sentence": "x"}, {}]
    videos = {
        "GLd3aX16zBg": {"subset": "validation", "annotations": steps},
        "xHr8X2Wpmno": {"subset": "training", "annotations": steps[:1]},
    }
    path = write_json(tmp_path / "y.json", {"database": {**videos, "gone": {}}})
    found = read("youcook2", path)
    assert told(found) == {"GLd3aX16zBg_0": ("Grill the tomatoes.",)} and found.items[0].interval == (5, 21.5)
    assert found.items[0].url == "https://www.youtube.com/watch?v=GLd3aX16zBg" and found.items[0].sources == ("GLd3aX16zBg",)
    assert [line.partition(": ")[2] for line in found.problems] == [
        "video 'GLd3aX16zBg': step 1 has an empty sentence or segment",
        "video 'GLd3aX16zBg': step 2 has no segment and sentence",
        "video 'gone' has no annotations",
    ]
    assert list(told(read("youcook2_train", path))) == ["xHr8X2Wpmno_0"]
    for content in ([], {"database": {}}, {"database": {"a": {"subset": "testing", "annotations": []}}}):
        with pytest.raises(InputError, match=r"y\.json: (expected an object|holds no clip)"):
            read("youcook2", write_json(tmp_path / "y.json", content))


def test_training_rows_are_a_record_a_caption_that_prepare_takes(tmp_path: Path) -> None:
    (tmp_path / "abcdefghijk.mp4").write_bytes(b"film")
    items = (Item("abcdefghijk_1_3", ("One.", "Two."), ("abcdefghijk_1_3",), ("abcdefghijk",), (1.0, 3.0)),)
    rows = list(training_rows(match_media(items, tmp_path, ("video",)), tmp_path))
    assert rows[1] == {
        "id": "abcdefghijk_1_3-1",
        "text": "Two.",
        "timestamps": [1.0, 3.0],
        "video": "abcdefghijk.mp4",
        "audio": "abcdefghijk.mp4",
    }


BENCH = [
    (["youtube_id", "start", "end", "caption"], ["abcdefghijk", "1.5", "3.66", "A dog."]),
    (["Source URL", "Clip Interval", "Caption"], ["https://www.youtube.com/watch?v=abcdefghijk&t=3", "[1.5, 3.66]", "A dog."]),
    (["video_url", "timestamps", "text"], ["https://youtu.be/abcdefghijk", "00:00:01.5-00:00:03.66", "A dog."]),
]


@pytest.mark.parametrize(("head", "row"), BENCH)
def test_omniretriever_columns_go_by_many_names(tmp_path: Path, head: list[str], row: list[str]) -> None:
    (item,) = read("omniretriever", write_csv(tmp_path / "b.csv", [head, row])).items
    assert item.id == "abcdefghijk_1.5_3.66" and item.captions == ("A dog.",) and item.interval == (1.5, 3.66)
    assert item.sources == ("abcdefghijk",) and item.url is not None and "abcdefghijk" in item.url


def test_omniretriever_names_the_columns_it_cannot_find(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "b.csv", [["clip_id", "wo", "von", "bis", "caption"], ["7", "https://e.org/x.mp4", "0", "2", "A dog."]])
    with pytest.raises(
        InputError, match=r"no column for source \(url, .*start \(start.*end \(.*columns are clip_id, wo, .*--column source="
    ):
        read("omniretriever", path)
    (item,) = read("omniretriever", path, columns={"source": "wo", "start": "von", "end": "bis"}).items
    assert (item.id, item.sources, item.interval) == ("7", ("x",), (0, 2))
    with pytest.raises(InputError, match="no column 'hier' for the source"):
        read("omniretriever", path, columns={"source": "hier"})
    with pytest.raises(InputError, match="the roles are id, source"):
        read("omniretriever", path, columns={"place": "wo"})


def test_rows_that_cannot_be_used_are_named_and_stop_nothing(tmp_path: Path) -> None:
    good = ["abcdefghijk", "0", "2", "A dog."]
    bad = [["abcdefghijk", "5", "2", "x"], ["abcdefghijk", "soon", "2", "x"], ["", "0", "1", "x"], ["b", "0", "1", " "], good]
    path = write_csv(tmp_path / "b.csv", [["ytid", "start", "end", "caption"], good, *bad])
    found = read("omniretriever", path)
    assert len(found.items) == 1
    for number, (line, words) in enumerate(
        zip(found.problems, ["ends before", "not two times", "no source", "no caption", "already"], strict=True), 3
    ):
        assert line.startswith(f"{path}: line {number}: ") and words in line


@pytest.mark.parametrize("name", BENCHMARKS)
def test_files_of_another_form_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "annotations.csv"
    for content in (b"", b"\xff\xfe", b"just words\n", b"a,b\n1,2\n", b"{}", b"[]"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"annotations\.csv") as caught:
            read(name, path)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no such file"):
        read(name, tmp_path / "none.csv")


def test_a_row_of_another_width_is_a_problem_of_that_row(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    head = "file_name,caption_1,caption_2"
    path.write_text(f'{head}\na.wav,One.,Two.\nb.wav,One, two.,Three.\nc.wav,One.\nd.wav,"One, two.",Three.,\ne.wav,"open,x\nf.wav,y,z\n')
    found = read("clotho", path)
    assert told(found) == {"a.wav": ("One.", "Two."), "d.wav": ("One, two.", "Three.")}
    for line, words in zip(
        found.problems,
        ["line 3: 4 cells where the head has 3; put a cell", "line 4: 2 cells", "lines 6 to 7: 2 cells where the head has 3; is a quote"],
        strict=True,
    ):
        assert line.startswith(f"{path}: {words}"), line
    for name, columns, row in (
        ("omniretriever", "youtube_id,start,end,caption", "abcdefghijk,0,2,A dog, barking"),
        ("msrvtt", "video_id,sentence", "video1,A dog, barking"),
    ):
        path.write_text(f"{columns}\n{row}\n")
        with pytest.raises(InputError, match=r"holds no rows; the first: .*line 2: \d cells where the head has \d"):
            read(name, path)
    path.write_text("video_id,sentence,sentence\nvideo1,A dog.,A cat.\n")
    with pytest.raises(InputError, match="column 'sentence' appears twice"):
        read("msrvtt", path)


def test_clotho_v2_with_a_caption_a_row_counts_empty_ones(tmp_path: Path) -> None:
    rows = [["file_name", "caption"], ["a.wav", "One."], ["b.wav", "Two."], ["a.wav", "Three."]]
    found = read("clotho_v2", write_csv(tmp_path / "c.csv", rows))
    assert told(found) == {"a.wav": ("One.", "Three."), "b.wav": ("Two.",)} and not found.problems and not found.empty_captions
    head = ["file_name", *(f"caption_{i}" for i in range(1, 4))]
    assert read("clotho_v2", write_csv(tmp_path / "d.csv", [head, ["a.wav", "One.", "", " "]])).empty_captions == 2


def test_audiocaps_gathers_the_captions_of_a_clip(tmp_path: Path) -> None:
    head = ["audiocap_id", "youtube_id", "start_time", "caption"]
    rows = [["7", "abcdefghijk", "30", "A dog."], ["8", "bbbbbbbbbbb", "0", "Rain."], ["9", "abcdefghijk", "30", "A dog barks."]]
    found = read("audiocaps", write_csv(tmp_path / "t.csv", [head, *rows, ["10", "c", "soon", "x"]]))
    first, second = found.items
    assert first.id == "abcdefghijk_30_40" and first.captions == ("A dog.", "A dog barks.") and second.interval == (0, 10)
    assert first.interval == (30, 40) and first.sources == ("abcdefghijk",) and first.url == "https://www.youtube.com/watch?v=abcdefghijk"
    assert "line 5" in found.problems[0] and "'soon'" in found.problems[0]
    for name, whole in (("9.wav", False), ("Yabcdefghijk.flac", False), ("abcdefghijk_30000_40000.wav", False), ("abcdefghijk.m4a", True)):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_bytes(b"x")
        assert [(item.id, cut) for item, _, cut in match_media(found.items, folder, ("audio",)).found] == [(first.id, whole)]


def test_audiocaps_names_late_clips_in_whole_milliseconds(tmp_path: Path) -> None:
    rows = [["youtube_id", "start_time", "caption"], ["abcdefghijk", "995.5", "A dog."]]
    (item,) = read("audiocaps", write_csv(tmp_path / "t.csv", rows)).items
    assert item.files[1] == "abcdefghijk_995500_1005500"


@pytest.mark.parametrize("name", ["abc", "abc.mp4"])
def test_an_id_equal_to_its_source_keeps_the_interval(tmp_path: Path, name: str) -> None:
    rows = [["id", "url", "start", "end", "caption"], [name, "https://e.org/abc.mp4", "1", "3", "A dog."]]
    (item,) = read("omniretriever", write_csv(tmp_path / "b.csv", rows)).items
    (tmp_path / "abc.mp4").write_bytes(b"x")
    clips, _ = manifest_rows(match_media([item], tmp_path, ("video",)), ("video",), tmp_path)
    assert clips == [{"id": name, "text": "A dog.", "video": "abc.mp4", "timestamps": [1.0, 3.0]}]


def test_two_different_files_of_one_name_are_nobodys(tmp_path: Path) -> None:
    for name, data in (("one/a.mp4", b"x"), ("two/a.mp4", b"y"), ("one/b.mp4", b"x"), ("two/b.mp4", b"x")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    got = match_media([clip("a"), clip("b"), clip("c")], tmp_path, ("video",))
    assert [item.id for item, _, _ in got.found] == ["b"] and got.doubtful == ("b",)
    assert "2 different files are called 'a': " in got.reasons["a"] and str(tmp_path / "two" / "a.mp4") in got.reasons["a"]
    assert got.reasons["c"] == f"no file called 'c' in {tmp_path}"


def clip(name: str, captions: int = 1, **options) -> Item:
    return Item(name, tuple(f"{name} {i}" for i in range(captions)), (name,), **options)


def test_coverage_finds_clips_by_name_stem_and_source(tmp_path: Path) -> None:
    for name in ("a.wav", "deep/b.mp4", "src.mp4", "empty.mp4", "c.mp4", "deep/c.webm", "note.txt", "other.mp4"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"" if "empty" in name else b"x")
    cut = clip("k", sources=("src",), interval=(1.0, 2.0))
    items = [clip("a.wav"), clip("b"), cut, clip("empty"), clip("c"), clip("gone", url="https://e.org/g")]
    got = match_media(items, tmp_path, ("audio",))
    assert [(i.id, p.name, whole) for i, p, whole in got.found] == [
        ("a.wav", "a.wav", False),
        ("b", "b.mp4", False),
        ("k", "src.mp4", True),
        ("c", "c.mp4", False),
    ]
    assert [i.id for i in got.missing] == ["empty", "gone"] and [p.name for p in got.empty] == ["empty.mp4"]
    assert got.doubtful == ("c",) and got.unused == 2 and got.whole == 1
    assert "a.wav" not in {i.id for i, _, _ in match_media(items, tmp_path, ("video", "audio")).found}
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nowhere")
    reasons = match_media(items, tmp_path, ("audio",)).reasons
    assert reasons == {
        "empty": f"{tmp_path / 'empty.mp4'} is empty",
        "gone": f"{tmp_path / 'gone.mp4'} is a link to a file that is not there",
    }
    with pytest.raises(InputError, match="no such folder"):
        match_media(items, tmp_path / "none", ("audio",))


@pytest.mark.parametrize("captions", [1, 3])
def test_manifests_are_those_embed_reads(tmp_path: Path, captions: int) -> None:
    (tmp_path / "media").mkdir()
    for name in ("a", "b"):
        (tmp_path / "media" / f"{name}.mp4").write_bytes(b"x")
    items = [clip("a", captions), clip("k#1", captions, sources=("b",), interval=(1.0, 2.5))]
    clips, texts = manifest_rows(match_media(items, tmp_path / "media", ("video", "audio")), ("video", "audio"), tmp_path)
    write_jsonl_atomic(tmp_path / "c.jsonl", clips)
    first, second = read_manifest(tmp_path / "c.jsonl").records
    assert first.video == first.audio == tmp_path / "media" / "a.mp4" and first.timestamps is None
    assert second.timestamps == (1.0, 2.5)
    if captions == 1:
        assert (first.text, second.text) == ("a 0", "k#1 0") and texts == []
    else:
        assert first.text is None and [t["id"] for t in texts] == ["a#0", "a#1", "a#2", "k#1#0", "k#1#1", "k#1#2"]
        write_jsonl_atomic(tmp_path / "t.jsonl", texts)
        assert [r.text for r in read_manifest(tmp_path / "t.jsonl").records] == [t["text"] for t in texts]
