"""Frames of every container, of part of a clip, of long and of broken files."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import av
import av.stream
import numpy as np
import pytest
from PIL import Image

from omni_jax.media import index, video
from omni_jax.media.video import read_frames, sample_indices
from omni_jax.types import ClipError
from tests import media_samples
from tests.golden_set import GoldenSet
from tests.media_samples import cut_file, frame_number, write_clip
from tests.tolerances import assert_close


def numbers(frames: np.ndarray) -> list[int]:
    return [frame_number(frame) for frame in frames]


def test_golden_frames(golden: GoldenSet) -> None:
    for i, record in enumerate(golden.records[: golden.clips]):
        assert record.video is not None
        got = read_frames(record.video, golden.preset.frames, record.timestamps)
        assert_close(got.frame_index, golden.inputs[f"{i}/frame_index"], "frame_index")
        assert_close(got.frames, golden.inputs[f"{i}/frames"], "frames")
        assert got.num_frames == golden.inputs[f"{i}/num_frames"]
        assert got.fps == golden.inputs[f"{i}/fps"]
        assert 2 / (golden.preset.frames / got.seconds) == pytest.approx(float(golden.inputs[f"{i}/second_per_grid"]), rel=1e-12)


def test_golden_nemotron_frame_index(golden_nemotron: GoldenSet) -> None:
    for i, record in enumerate(golden_nemotron.records[: golden_nemotron.clips]):
        assert record.video is not None
        got = read_frames(record.video, golden_nemotron.preset.frames, record.timestamps)
        assert_close(got.frame_index, golden_nemotron.inputs[f"{i}/frame_index"], "frame_index")


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm", ".avi"])
def test_every_container_gives_the_frames_sampled(tmp_path: Path, suffix: str) -> None:
    got = read_frames(write_clip(tmp_path / f"clip{suffix}", 2.3, fps=10), 8)
    assert got.frame_index.tolist() == [0, 3, 6, 9, 12, 15, 18, 22]
    assert got.frame_index.dtype == np.int64
    assert numbers(got.frames) == got.frame_index.tolist()
    assert (got.num_frames, got.fps, got.frames.shape, got.frames.dtype) == (23, 10.0, (8, 64, 96, 3), np.uint8)
    assert got.seconds == pytest.approx(2.3)


def test_hidden_frames_of_vp8_are_not_counted(tmp_path: Path) -> None:
    shown = write_clip(tmp_path / "shown.webm", 2.0, fps=10, audio=False, video_codec="libvpx", gop=1)
    hidden = tmp_path / "hidden.webm"
    with av.open(shown) as source, av.open(hidden, "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if not packet.size or packet.pts is None:
                continue
            data = bytearray(bytes(packet))
            data[0] &= 0xEF  # the bit that says whether a frame is shown: encoders hide those that only serve prediction
            copy = av.Packet(bytes(data))
            copy.pts, copy.dts, copy.time_base, copy.stream, copy.is_keyframe = (
                packet.pts - 20,
                packet.pts - 20,
                packet.time_base,
                stream,
                True,
            )
            packet.stream = stream
            if packet.pts:
                target.mux(copy)
            target.mux(packet)
    with av.open(hidden) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) == 39
    got = read_frames(hidden, 4)
    assert got.num_frames == 20
    assert numbers(got.frames) == got.frame_index.tolist() == [0, 6, 12, 19]


def test_whole_five_frame_clip_repeats_frames(tmp_path: Path) -> None:
    got = read_frames(write_clip(tmp_path / "five.mp4", 0.5, fps=10), 8)
    assert got.frame_index.tolist() == [0, 0, 1, 1, 2, 2, 3, 4]
    assert numbers(got.frames) == got.frame_index.tolist()


@pytest.mark.parametrize("size", [(32, 16), (65_535, 65_535)])
def test_a_header_that_states_another_size_than_the_pictures_have(tmp_path: Path, size: tuple[int, int]) -> None:
    plain = write_clip(tmp_path / "plain.mp4", video_codec="libx264")
    data = bytearray(plain.read_bytes())
    at = data.index(b"avc1", data.index(b"stsd")) + 28  # of the sample entry: width and height
    data[at : at + 4] = b"".join(side.to_bytes(2, "big") for side in size)
    (tmp_path / "other.mp4").write_bytes(data)
    assert np.array_equal(read_frames(tmp_path / "other.mp4", 8).frames, read_frames(plain, 8).frames)


def test_pictures_are_not_kept_until_garbage_is_collected(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4")
    gc.collect()
    read_frames(clip, 8)
    assert sum(isinstance(thing, av.VideoFrame) for thing in gc.get_objects()) <= 1


def test_a_group_of_pictures_is_read_without_the_one_before_it(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", 6.0, video_codec="libx264", video_options={"bf": "2"})
    with av.open(clip) as container:
        stream = container.streams.video[0]
        found = index.read_index(container, stream, clip)
        assert len(found.entries) > 3
        for entry, (time, _) in zip(found.entries.tolist(), found.seek_times.tolist(), strict=True):
            container.seek(time, stream=stream)
            assert next(container.demux(stream)).pts == entry


def test_single_frame_clip(tmp_path: Path) -> None:
    got = read_frames(write_clip(tmp_path / "one.mp4", 0.1, fps=10, audio=False), 4)
    assert numbers(got.frames) == [0, 0, 0, 0]


@pytest.mark.parametrize("frames", [2, 6, 64])
def test_frame_counts(tmp_path: Path, frames: int) -> None:
    got = read_frames(write_clip(tmp_path / "clip.mp4", 3.0, fps=10), frames)
    assert numbers(got.frames) == np.linspace(0, 29, frames, dtype=int).tolist()


def test_timestamps_take_frames_of_the_interval(tmp_path: Path) -> None:
    got = read_frames(write_clip(tmp_path / "clip.mkv", 4.0, fps=10), 4, (1.2, 2.1))
    assert numbers(got.frames) == got.frame_index.tolist() == [12, 15, 18, 21]
    assert got.seconds == pytest.approx(0.9)
    assert got.num_frames == 40


def test_timestamps_past_the_end_stop_at_the_last_frame(tmp_path: Path) -> None:
    got = read_frames(write_clip(tmp_path / "clip.mp4", 2.0, fps=10), 4, (1.0, 60.0))
    assert got.frame_index.tolist() == [10, 13, 16, 19]
    assert got.seconds == pytest.approx(1.0)


def test_timestamps_that_start_after_the_clip_are_refused(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 2.0, fps=10)
    with pytest.raises(ClipError, match=r"clip\.mp4: timestamps start at 2 s, but the video is 2 s long"):
        read_frames(clip, 4, (2.0, 3.0))


def test_interval_in_the_last_frame_stays_inside() -> None:
    indices, seconds = sample_indices(20, 10.0, 4, (1.96, 5.0))
    assert indices.tolist() == [19, 19, 19, 19]
    assert seconds == pytest.approx(0.04)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".avi"])
def test_seeking_gives_the_same_frames_as_reading_through(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = write_clip(tmp_path / f"long{suffix}", 120, fps=10, width=48, height=32, audio=False, gop=25)
    seeking = read_frames(clip, 6)
    monkeypatch.setattr(video, "_enter", lambda *_: None)
    through = read_frames(clip, 6)
    assert seeking.frame_index.tolist() == [0, 239, 479, 719, 959, 1199]
    assert numbers(through.frames) == through.frame_index.tolist()
    assert np.array_equal(seeking.frames, through.frames)


@pytest.mark.jit
def test_three_hours_decode_a_few_key_frame_distances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = write_clip(tmp_path / "long.mp4", 3 * 3600, fps=1, width=48, height=32, audio=False, gop=60)
    decoded = 0
    frames_of = index.decode_from

    def counted(container, stream, found, entry, times):
        nonlocal decoded
        decoded += int(np.searchsorted(found.pts, max(times)) - np.searchsorted(found.pts, found.entries[entry])) + 1
        return frames_of(container, stream, found, entry, times)

    monkeypatch.setattr(video, "decode_from", counted)
    got = read_frames(clip, 8)
    assert got.num_frames == 10_800
    assert got.seconds == pytest.approx(10_800)
    assert [n % 4096 for n in got.frame_index.tolist()] == numbers(got.frames)
    assert decoded < 8 * 62  # at most one key frame distance for each frame


def test_a_turned_picture_is_set_upright(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "phone.mp4", 0.5, fps=10, audio=False)
    plain = read_frames(clip, 2).frames
    data = clip.read_bytes()
    fixed = [0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000]
    # (x, y) -> (-y, x): shown turned by 90 degrees clockwise, as a phone held upright records.
    clockwise = [0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000]
    packed = [b"".join(value.to_bytes(4, "big", signed=True) for value in matrix) for matrix in (fixed, clockwise)]
    at = data.index(packed[0], data.index(b"tkhd"))
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(data[:at] + packed[1] + data[at + len(packed[1]) :])
    got = read_frames(turned, 2).frames
    assert got.shape == (2, 96, 64, 3)
    assert np.array_equal(got, np.rot90(plain, -1, axes=(1, 2)))


def test_a_clip_trimmed_by_its_edit_list_is_whole(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 2.0, fps=10, audio=False, gop=5, video_options={"bf": "0"})
    data = bytearray(clip.read_bytes())
    with av.open(clip) as container:
        base = container.streams.video[0].time_base
    assert base is not None
    at = data.index(b"elst")
    # Version and flags, entry count, duration, then the media time: start one second in.
    media_time = int.from_bytes(data[at + 16 : at + 20], "big") + int(1 / base)
    data[at + 16 : at + 20] = media_time.to_bytes(4, "big")
    trimmed = tmp_path / "trimmed.mp4"
    trimmed.write_bytes(data)
    got = read_frames(trimmed, 5)
    assert got.num_frames == 10
    assert numbers(got.frames) == [10, 12, 14, 16, 19]


@pytest.mark.parametrize("share", [0.4, 0.7, 0.85])
def test_truncated_mp4_with_its_index_first(tmp_path: Path, share: float) -> None:
    whole = write_clip(tmp_path / "whole.mp4", 3.0, fps=10, faststart=True)
    with pytest.raises(ClipError, match=r"cut\.mp4: truncated: \d+ of the 30 frames that the container declares are there"):
        read_frames(cut_file(whole, tmp_path / "cut.mp4", share), 8)


def test_truncated_mp4_with_its_index_last(tmp_path: Path) -> None:
    with pytest.raises(ClipError, match=r"cut\.mp4: not a media file, or a damaged one"):
        read_frames(cut_file(write_clip(tmp_path / "whole.mp4"), tmp_path / "cut.mp4", 0.7), 8)


@pytest.mark.parametrize("suffix", [".mkv", ".webm", ".avi"])
@pytest.mark.parametrize("share", [0.6, 0.9])
def test_truncated_without_a_frame_count(tmp_path: Path, suffix: str, share: float) -> None:
    whole = write_clip(tmp_path / f"whole{suffix}", 3.0, fps=10)
    with pytest.raises(ClipError, match=r"cut\.\w+: truncated"):
        read_frames(cut_file(whole, tmp_path / f"cut{suffix}", share), 8)


def test_truncated_fragmented_mp4(tmp_path: Path) -> None:
    flags = {"movflags": "frag_keyframe+empty_moov"}
    whole = write_clip(tmp_path / "whole.mp4", 3.0, fps=10, container_options=flags)
    assert numbers(read_frames(whole, 3).frames) == [0, 14, 29]
    with pytest.raises(ClipError, match="truncated"):
        read_frames(cut_file(whole, tmp_path / "cut.mp4", 0.6), 8)


def test_frames_wiped_inside_the_file_are_noticed(tmp_path: Path) -> None:
    whole = write_clip(tmp_path / "whole.mp4", 3.0, fps=10, audio=False, faststart=True)
    data = bytearray(whole.read_bytes())
    middle = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2
    data[middle:] = bytes(len(data) - middle)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(data)
    with pytest.raises(ClipError, match=r"broken\.mp4: damaged: \d+ of 30 packets of the video do not decode"):
        read_frames(broken, 8)


def test_bad_files_get_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(4000))
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    media_samples.write_sound(tmp_path / "sound.wav")
    write_clip(tmp_path / "sound.m4a")
    for name, words in {
        "missing.mp4": "file not found; check",
        "missing/clip.mp4": "file not found; check",
        "empty.mp4": "file is empty; fetch",
        "noise.mp4": "not a media file, or a damaged one",
        "folder.mp4": "is a directory; name",
        "pipe.mp4": "is not a regular file",
        "sound.wav": "has no video stream; remove",
        "sound.m4a": "has no video stream; remove",
        "nul\0.mp4": "cannot be looked at",
    }.items():
        with pytest.raises(ClipError) as error:
            read_frames(tmp_path / name, 8)
        message = str(error.value)
        assert message.startswith(f"{tmp_path / name}: {words}"), message
        assert "\n" not in message


def test_a_cover_picture_is_not_a_video(tmp_path: Path) -> None:
    path = tmp_path / "song.mp4"
    with av.open(path, "w") as container:
        cover = container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        sound = container.add_stream("aac", rate=16_000, layout="mono")
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(sound.encode(frame))
        container.mux(cover.encode(None))
        container.mux(sound.encode(None))
    with pytest.raises(ClipError, match="has no video stream"):
        read_frames(path, 8)


@pytest.mark.parametrize("name", ["take:2.mp4", "http:clip.mp4", "file:clip.mp4", "caf\udce9.mp4", "50%.mp4", "a|b?#.mp4", "%d.png"])
def test_names_are_names_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """To FFmpeg some are protocols or patterns."""
    monkeypatch.chdir(tmp_path)
    if name.endswith(".png"):
        Image.new("RGB", (64, 48), (200, 0, 0)).save(name)
        Image.new("RGB", (32, 48)).save("1.png")
    else:
        write_clip(Path("clip.mp4"), 0.5, fps=10, audio=False).rename(name)
    assert read_frames(name, 2).frames.shape[2] > 32
    assert read_frames(tmp_path / name, 2).frames.shape[2] > 32


def test_a_playlist_is_refused(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", seconds=0.5, fps=8, width=32, height=32, audio=False)
    (tmp_path / "list.ffconcat").write_text("ffconcat version 1.0\nfile clip.mp4\n")
    with pytest.raises(ClipError, match=r"a playlist .*, which names other files"):
        read_frames(tmp_path / "list.ffconcat", 2)


def test_frames_that_memory_would_not_hold_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clip(tmp_path / "clip.mp4", seconds=0.5, fps=8, width=32, height=32, audio=False)
    monkeypatch.setattr(video, "LARGEST_SAMPLE", 3 * 32 * 32 * 4)
    assert len(read_frames(tmp_path / "clip.mp4", 4).frames) == 4
    with pytest.raises(ClipError, match="6 frames of 32x32 pixels take"):
        read_frames(tmp_path / "clip.mp4", 6)


def test_a_header_that_states_too_large_a_picture_does_not_decide(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", seconds=0.5, fps=8, width=32, height=32, audio=False)
    data = bytearray(path.read_bytes())
    at = data.index(b"avc1", data.index(b"stsd")) + 28
    assert data[at : at + 4] == bytes([0, 32, 0, 32])
    expected = read_frames(path, 4).frames
    data[at : at + 4] = bytes([0x3F, 0, 0x3F, 0])
    path.write_bytes(data)
    assert np.array_equal(read_frames(path, 4).frames, expected)
