"""Prepared shards: the features of the media file bit for bit, the same folder for TFDS, resumed, damaged and foreign ones."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from omni_jax.api.training import clips_digest
from omni_jax.cli.main import main
from omni_jax.config import preset
from omni_jax.data.clip_index import ClipIndex, write_json
from omni_jax.data.loading import load_training_clip, record_features, training_features
from omni_jax.data.manifest import read_manifest
from omni_jax.data.prepare import Preparation
from omni_jax.data.shards import ShardSource, decode_clip, open_shard, shard_name
from omni_jax.data.sources import MediaSource, open_source
from omni_jax.types import Features, InputError
from tests.full_disk import files_of_at_most
from tests.media_samples import write_clip

SETTINGS = ("frames=4", "pixels=5000", "audio_seconds=1")
PRESET = preset("training").override(list(SETTINGS))


def _arguments(manifest: Path, out: Path, *more: str) -> list[str]:
    return ["prepare", "--manifest", str(manifest), "--out", str(out), *(a for s in SETTINGS for a in ("--set", s)), *more]


def _manifest(folder: Path, count: int) -> Path:
    rows = []
    for i in range(count):
        write_clip(folder / f"{i}.mp4", 1.0, fps=5, width=96 + 16 * (i % 2), height=64, audio=i != 1, seed=i)
        rows.append({"id": f"clip-{i}", "text": f"caption {i}", "video": f"{i}.mp4", "audio": f"{i}.mp4"})
    path = folder / "clips.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips, the second without a track; then one without an audio field, one broken, one without text."""
    path = _manifest(tmp_path_factory.mktemp("clips"), 5)
    (path.parent / "broken.mp4").write_bytes(b"no film")
    more = [
        {"id": "mute", "text": "no sound", "video": "0.mp4"},
        {"id": "broken", "text": "x", "video": "broken.mp4", "audio": "0.mp4"},
        {"id": "wordless", "video": "0.mp4", "audio": "0.mp4"},
    ]
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in more)
    return path


@pytest.fixture(scope="module")
def shards(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "shards"
    assert main(_arguments(manifest, out, "--shards", "3", "--workers", "1")) == 1
    return out


def _equal(one: Features, other: Features) -> None:
    assert one.vision is not None
    assert other.vision is not None
    assert one.audio is not None
    assert other.audio is not None
    assert np.array_equal(one.vision.patches, other.vision.patches)
    assert one.vision.grid == other.vision.grid
    for a, b in zip(one.audio, other.audio, strict=True):
        assert np.array_equal(a.log_mel, b.log_mel)
        assert np.array_equal(a.fbank, b.fbank)
        assert a.tokens == b.tokens


@pytest.mark.jit
def test_features_of_a_shard_are_those_of_the_file_bit_for_bit(manifest: Path, shards: Path):
    records = {r.id: r for r in read_manifest(manifest).records}
    source = ShardSource(shards, PRESET)
    assert list(source.ids) == [*(f"clip-{i}" for i in range(5)), "mute"]
    for i, name in enumerate(source.ids[:5]):
        expected = record_features(records[name], PRESET, frozenset("va"))
        _equal(training_features(source.load(i), PRESET), expected)
        known = source.record(i)
        assert expected.vision is not None
        assert known.grid == expected.vision.grid
        assert known.caption == records[name].text
        assert known.silent == (name == "clip-1")


@pytest.mark.costly
def test_streamed_clips_equal_prepared_ones(manifest: Path, shards: Path):
    prepared, streamed = open_source(shards, PRESET), open_source(manifest, PRESET)
    assert isinstance(streamed, MediaSource)
    assert {p.id for p in streamed.problems} == {"wordless"}
    for name in ("clip-0", "clip-1", "mute"):
        one, other = (s.load(list(s.ids).index(name)) for s in (prepared, streamed))
        _equal(training_features(one, PRESET), training_features(other, PRESET))
        assert prepared.record(list(prepared.ids).index(name)).silent == (name != "clip-0")


def test_what_was_set_aside_is_listed_and_silence_is_counted(manifest: Path, shards: Path, capsys: pytest.CaptureFixture[str]):
    rows = [json.loads(line) for line in (shards / "errors.jsonl").read_text().splitlines()]
    assert [(row["id"], row["line"]) for row in rows] == [("broken", 7), ("wordless", 8)]
    assert main(_arguments(manifest, shards, "--shards", "3", "--workers", "0")) == 1  # all is there: nothing is decoded again
    said = capsys.readouterr()
    assert "6 clips, 2 of them with silence for a missing audio track" in said.out
    assert "skipped records: 2" in said.err


def test_tensorflow_datasets_reads_the_same_clips(shards: Path):
    import tensorflow_datasets as tfds

    source = ShardSource(shards, PRESET)
    data = tfds.builder_from_directory(str(shards)).as_data_source("train")
    assert len(data) == len(source) == 6
    for i in range(6):
        clip, row = source.load(i), data[i]
        assert clip.video is not None
        assert (row["id"].decode(), row["caption"].decode()) == (clip.record.id, clip.record.text)
        assert np.array_equal(row["frames"], clip.video.frames)
        assert np.array_equal(row["waveform"], clip.waveform)
        assert row["seconds"][0] == clip.video.seconds
    assert "tensorflow" not in sys.modules


def test_a_pickled_source_opens_its_files_anew(shards: Path):
    source = pickle.loads(pickle.dumps(ShardSource(shards, PRESET)))
    assert source.load(2).record.id == "clip-2"


def test_another_preset_is_refused(shards: Path):
    with pytest.raises(InputError, match=r"prepared with pixels=5000, but training asks for pixels=50176"):
        ShardSource(shards, preset("training").override(["frames=4", "audio_seconds=1"]))
    assert (
        len(ShardSource(shards, PRESET.override(["filler=other", "max_text_tokens=9"]))) == 6
    )  # of text alone: shards do not depend on it


def test_a_damaged_shard_is_refused_and_made_again(manifest: Path, shards: Path, tmp_path: Path):
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    path = copy / shard_name(1, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"00001-of-00003: has \d+ bytes where the index has \d+; run 'omni-jax prepare' again"):
        ShardSource(copy, PRESET)
    path.unlink()
    with pytest.raises(InputError, match="shard not found"):
        ShardSource(copy, PRESET)
    assert main(_arguments(manifest, copy, "--shards", "3", "--workers", "0")) == 1
    assert [c.record.id for c in map(ShardSource(copy, PRESET).load, range(6))] == list(ShardSource(shards, PRESET).ids)


def test_an_interrupted_preparation_goes_on_without_losing_or_doubling(manifest: Path, tmp_path: Path):
    records = read_manifest(manifest).records
    out = tmp_path / "shards"
    work = Preparation(out, records, (), PRESET, 3).run(0, 60)
    for _ in range(4):  # within the second shard
        next(work)
    work.close()  # type: ignore[attr-defined] (a generator)
    for killed in (".clips.array_record.0123abcd.unfinished", "parts/.00001.json.89abcdef.unfinished"):
        (out / killed).touch()
    with pytest.raises(InputError, match="preparation was interrupted"):
        ClipIndex(out)
    again = Preparation(out, records, (), PRESET, 3)
    assert again.done == 2
    assert sum(again.run(0, 60)) == again.total - 2
    assert again.finish().clips == 6
    assert list(ShardSource(out, PRESET).ids) == [*(f"clip-{i}" for i in range(5)), "mute"]
    assert not list(out.rglob(".*"))


def test_a_clip_of_another_size_is_prepared_again_and_one_that_is_gone_is_not(manifest: Path, tmp_path: Path):
    for clip in manifest.parent.glob("*.mp4"):
        (tmp_path / clip.name).write_bytes(clip.read_bytes())
    (tmp_path / "clips.jsonl").write_text(manifest.read_text())
    records, out = read_manifest(tmp_path / "clips.jsonl").records, tmp_path / "shards"

    def prepared() -> tuple[int, np.ndarray]:
        work = Preparation(out, records, (), PRESET, 3)
        left = work.total - work.done
        assert sum(work.run(0, 60)) == left
        work.finish()
        film = ShardSource(out, PRESET).load(0).video
        assert film is not None
        return left, np.asarray(film.frames)

    first, before = prepared()
    video = records[0].video
    assert isinstance(video, Path)
    other = next(r.video for r in records[1:] if isinstance(r.video, Path) and r.video.stat().st_size != video.stat().st_size)
    video.write_bytes(other.read_bytes())
    again, after = prepared()
    assert 0 < again < first and not np.array_equal(before, after)
    video.unlink()
    left, kept = prepared()
    assert left == 0 and np.array_equal(kept, after)


def test_a_full_disk_ends_a_preparation_with_one_line_and_keeps_what_is_there(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "shards"
    work = Preparation(out, read_manifest(manifest).records, (), PRESET, 3).run(0, 60)
    for _ in range(3):  # the first shard and the first clip of the second
        next(work)
    work.close()  # type: ignore[attr-defined] (a generator)
    kept = (out / shard_name(0, 3)).read_bytes()
    for limit, name in ((4000, shard_name(1, 3)), (1, "")):
        capsys.readouterr()
        with files_of_at_most(limit):
            status = main(_arguments(manifest, out, "--shards", "3", "--workers", "0"))
        (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("omni-jax:")]
        assert status == 2 and name in said and "cannot be written (" in said and said.endswith("; check that the disk has space")
        assert (out / shard_name(0, 3)).read_bytes() == kept and not (out / "index.json").exists()
    assert main(_arguments(manifest, out, "--shards", "3", "--workers", "0")) == 1
    assert list(ShardSource(out, PRESET).ids) == [*(f"clip-{i}" for i in range(5)), "mute"] and not list(out.rglob(".*"))


def test_an_index_that_cannot_be_written_is_one_line(tmp_path: Path):
    (tmp_path / "index.json").mkdir()
    with pytest.raises(InputError, match=r"index.json: cannot be written \(Is a directory\); check that the disk has space"):
        write_json(tmp_path / "index.json", {})
    assert [p.name for p in tmp_path.iterdir()] == ["index.json"]


def test_other_settings_and_foreign_folders_are_refused(manifest: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*_arguments(manifest, shards, "--shards", "3"), "--set", "pixels=9000"]) == 2
    assert "was prepared with other preset" in capsys.readouterr().err
    (tmp_path / "note.txt").write_text("mine")
    assert main(_arguments(manifest, tmp_path)) == 2
    assert "was not made by 'omni-jax prepare'" in capsys.readouterr().err
    with pytest.raises(InputError, match="not a prepared folder"):
        ShardSource(tmp_path, PRESET)


def test_a_manifest_without_a_usable_record_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "m.jsonl"
    path.write_text('{"id": "a", "text": "words alone", "url": "x"}\n')
    assert main(_arguments(path, tmp_path / "out", "--set", "filler=x")) == 2
    said = capsys.readouterr().err
    assert "no record can be prepared: each needs text and video" in said and "out/errors.jsonl lists all" in said
    assert json.loads((tmp_path / "out" / "errors.jsonl").read_text())["id"] == "a"
    assert "not used: url (1 records)" in said and "--set filler=x: changes prompts alone" in said
    with pytest.raises(InputError, match="no record can be trained on"):
        open_source(path, PRESET)
    path.write_text('{"id": "a", "text": "x", "video": "gone.mp4"}\n')
    assert main(_arguments(path, tmp_path / "out", "--workers", "0")) == 2
    assert "no record could be prepared" in capsys.readouterr().err


def test_a_shard_may_be_empty(manifest: Path, tmp_path: Path):
    import tensorflow_datasets as tfds

    records = {r.id: r for r in read_manifest(manifest).records}
    work = Preparation(tmp_path / "shards", [records["broken"], records["clip-0"]], (), PRESET, 2)
    assert sum(work.run(0, 60)) == 2
    assert work.finish().clips == 1
    assert ShardSource(tmp_path / "shards", PRESET).load(0).record.id == "clip-0"
    assert len(tfds.builder_from_directory(str(tmp_path / "shards")).as_data_source("train")) == 1


def test_silence_has_the_presets_length(manifest: Path):
    record = next(r for r in read_manifest(manifest).records if r.id == "mute")
    clip = load_training_clip((record, PRESET))
    assert clip.waveform is not None
    assert clip.waveform.shape == (16_000,)
    assert not clip.waveform.any()
    assert clip.warnings == ("record 'mute': no audio; silence is used instead",) and clip.silent


def test_a_folder_of_an_earlier_version_holds_the_same_clips(shards: Path, tmp_path: Path):
    source, copy = ShardSource(shards, PRESET), tmp_path / "shards"
    shutil.copytree(shards, copy)
    (copy / "index.arrow").unlink()
    said = json.loads((copy / "index.json").read_text())
    infos, clips = [source.record(i) for i in range(6)], [source.load(i) for i in range(6)]
    columns = {
        "id": [info.id for info in infos],
        "caption": [info.caption for info in infos],
        "grid": [list(info.grid.thw) for info in infos if info.grid],
        "second_per_grid": [info.grid.second_per_grid for info in infos if info.grid],
        "seconds": [clip.video.seconds for clip in clips if clip.video],
        "frames": [len(clip.video.frames) for clip in clips if clip.video],
        "samples": [info.samples for info in infos],
        "silent": [info.silent for info in infos],
    }
    first = {"format": "omni_jax.clips/1", "preset": said["preset"], "shards": said["shards"], "records": columns}
    (copy / "index.json").write_text(json.dumps(first))
    earlier = ShardSource(copy, PRESET)
    assert [earlier.record(i) for i in range(6)] == infos and earlier.limits == source.limits and earlier.silent == source.silent == 2
    assert earlier.digest is None and clips_digest(earlier) == source.digest == clips_digest(source)
    assert [earlier.load(i).record.id for i in range(6)] == list(source.ids)
    assert list(earlier.numbers_of(["mute", "clip-1", "gone"])) == list(source.numbers_of(["mute", "clip-1", "gone"])) == [1, 5]


def test_the_index_says_where_each_clip_lies(shards: Path):
    """Each range of bytes holds its clip's frames and no other clip's; together they are all of a shard but its head and end."""
    index = ClipIndex(shards)
    source, number = ShardSource(shards, PRESET), 0
    for shard, length in enumerate(index.lengths):
        data = (shards / shard_name(shard, 3)).read_bytes()
        assert index.sizes is not None and len(data) == index.sizes[shard]
        ends = [extent for i in range(number, number + length) if (extent := index.extent(i))]
        assert len(ends) == length
        assert ends[0][0] == 64 and all(one[1] == other[0] for one, other in itertools.pairwise(ends))
        for i, (start, stop) in zip(range(number, number + length), ends, strict=True):
            damaged = bytearray(data)
            damaged[start + 60 : stop - 60] = bytes(stop - start - 120)
            (copy := shards.parent / "one.array_record").write_bytes(damaged)
            reader = open_shard(copy, length)
            for other in range(length):
                if other + number == i:
                    with pytest.raises(Exception, match=r"(?i)hash|corrupt|invalid"):
                        reader.read([other])
                else:
                    assert decode_clip(reader.read([other])[0]).record.id == source.ids[number + other]
        number += length


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_killed_preparation_goes_on(tmp_path: Path, name: str):
    import signal

    path, out = _manifest(tmp_path, 24), tmp_path / "shards"
    command = [sys.executable, "-m", "omni_jax.cli.main", *_arguments(path, out, "--shards", "12", "--workers", "1")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list(out.glob("parts/*.json")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=120)
    assert process.returncode == (-9 if name == "SIGKILL" else 75), said
    assert not (out / "index.json").exists()
    assert subprocess.run(command, check=False, timeout=300).returncode == 0
    source = ShardSource(out, PRESET)
    assert [source.load(i).record.id for i in range(len(source))] == [f"clip-{i}" for i in range(24)]
    assert not list(out.rglob(".*"))
