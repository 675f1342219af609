"""Video files as other people make them: every picture that FFmpeg's decoder shows, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from omni_jax.media import video
from omni_jax.media.audio import read_waveform
from omni_jax.media.video import read_frames
from omni_jax.types import ClipError
from tests.media.containers import copy_tracks, edit_list, write_audio, write_video
from tests.media_samples import frame_number

X264 = {"preset": "ultrafast", "bf": "2"}
HERE = Path(__file__).parent


def numbers(frames: np.ndarray) -> list[int]:
    return [frame_number(frame) for frame in frames]


def shown(path: Path, count: int = 8, **options: Any) -> list[int]:
    return numbers(read_frames(path, count, **options).frames)


def spread(first: int, last: int, count: int = 8) -> list[int]:
    return np.linspace(first, last, count, dtype=int).tolist()


# ------------------------------------------------------------------------------------------------------------ cut and joined


@pytest.mark.parametrize(("seconds", "last"), [(None, 95), (1.5, 59), (0.5, 35)])
def test_a_trim_between_key_frames(tmp_path: Path, seconds: float | None, last: int) -> None:
    whole = write_video(tmp_path / "whole.mp4", "libx264", 96, gop=48, options={"preset": "ultrafast", "bf": "0"})
    got = read_frames(edit_list(whole, tmp_path / "cut.mp4", 1.0, seconds), 8)
    assert (got.num_frames, got.fps) == (last - 23, 24.0)
    assert numbers(got.frames) == spread(24, last)


def test_a_trim_without_a_key_frame_inside(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", "libx264", 72, gop=250, options=X264)
    got = read_frames(edit_list(whole, tmp_path / "cut.mp4", 1.0), 6)
    assert got.num_frames == 48
    assert numbers(got.frames) == spread(24, 71, 6)


def cut_at_key(source: Path, target: Path, key: int) -> Path:
    """Copies packets from the so-many-th key frame on, as `ffmpeg -ss -c copy` does."""
    with av.open(source) as container:
        keys = [i for i, p in enumerate(p for p in container.demux(video=0) if p.size) if p.is_keyframe]
    return copy_tracks(target, (source, 0), keep=lambda packet, number: number >= keys[key])


@pytest.mark.parametrize(
    ("codec", "options", "suffix"),
    [
        ("libx265", {"x265-params": "log-level=none:open-gop=1:keyint=12:min-keyint=12:bframes=3:scenecut=0"}, ".mkv"),
        ("libx265", {"x265-params": "log-level=none:open-gop=1:keyint=12:min-keyint=12:bframes=3:scenecut=0"}, ".ts"),
        ("mpeg2video", {}, ".ts"),
        ("mpeg2video", {}, ".mpg"),
    ],
)
def test_an_open_group_at_the_start(tmp_path: Path, codec: str, options: dict[str, str], suffix: str) -> None:
    whole = write_video(tmp_path / "whole.ts", codec, 60, options=options, b_frames=2)
    got = read_frames(cut_at_key(whole, tmp_path / f"cut{suffix}", 2), 6)
    first = frame_number(got.frames[0])
    assert first in (23, 24, 25)  # the key frame: the pictures before it that need the group before are not shown
    assert got.num_frames == 60 - first
    assert numbers(got.frames) == spread(first, 59, 6)


def assert_as_decoded(path: Path, *intervals: tuple[float, float]) -> int:
    """The frames are those that FFmpeg gives one after the other. Returns their number."""
    with av.open(path) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for interval in (None, *intervals):
        got = read_frames(path, 5, interval)
        assert got.num_frames == len(pictures)
        assert np.array_equal(got.frames, np.stack([pictures[number] for number in got.frame_index]))
    return len(pictures)


@pytest.mark.parametrize("suffix", [".mkv", ".ts"])
def test_open_groups_that_begin_a_sequence(tmp_path: Path, suffix: str) -> None:
    """HEVC behind an end of sequence: the pictures before a key frame that need the group before are not shown."""
    options = {"x265-params": "log-level=none:open-gop=1:keyint=12:min-keyint=12:bframes=3:b-adapt=0:scenecut=0"}
    whole = write_video(tmp_path / f"whole{suffix}", "libx265", 60, options=options)
    with av.open(whole) as container:
        before = {i - 1 for i, p in enumerate(p for p in container.demux(video=0) if p.size) if p.is_keyframe}
    end = (b"\0\0\0\2" if suffix == ".mkv" else b"\0\0\0\1") + b"\x48\1"

    def ended(packet: av.Packet, number: int) -> av.Packet:
        made = av.Packet(bytes(packet) + end * (number in before))
        made.pts, made.dts, made.time_base, made.is_keyframe = packet.pts, packet.dts, packet.time_base, packet.is_keyframe
        return made

    assert 30 < assert_as_decoded(copy_tracks(tmp_path / f"ended{suffix}", (whole, 0), change=ended), (0.9, 1.9)) < 60


def test_an_open_group_at_the_start_with_times_of_a_copy(tmp_path: Path) -> None:
    """`ffmpeg -ss -c copy` moves times before the start behind it: the pictures that are not shown seem to follow the first one. The search
    for the first packet misses it in such a file."""
    whole = write_video(tmp_path / "whole.ts", "mpeg2video", 60, fps=25, b_frames=2)
    with av.open(whole) as container:
        first, key = [(i, p) for i, p in enumerate(p for p in container.demux(video=0) if p.size) if p.is_keyframe][2]
    start = key.pts
    assert start is not None

    def moved(packet: av.Packet, number: int) -> av.Packet:
        assert packet.pts is not None and packet.dts is not None
        packet.pts = max(packet.pts, start + number - first)
        packet.dts = packet.dts if number == first else max(packet.dts, start + number - first)
        return packet

    cut = copy_tracks(tmp_path / "cut.ts", (whole, 0), keep=lambda packet, number: number >= first, change=moved)
    assert assert_as_decoded(cut, (0.5, 1.2)) == 36


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_a_transport_stream_cut_inside_a_group(tmp_path: Path, share: float) -> None:
    data = write_video(tmp_path / "whole.ts", "libx264", 96, gop=24, options=X264).read_bytes()
    (tmp_path / "cut.ts").write_bytes(data[int(len(data) // 188 * share) * 188 :])
    got = read_frames(tmp_path / "cut.ts", 4)
    first = frame_number(got.frames[0])
    assert first % 24 == 0
    assert got.num_frames == 96 - first
    assert numbers(got.frames) == spread(first, 95, 4)


@pytest.mark.parametrize(("codec", "suffix"), [("libx264", ".mp4"), ("libx265", ".mp4"), ("mpeg2video", ".ts")])
@pytest.mark.parametrize("left_out", [range(26, 46), range(30, 31)])
def test_packets_that_were_left_out(tmp_path: Path, left_out: range, codec: str, suffix: str) -> None:
    """Pictures behind a splice miss those that they depend on: the decoder leaves some out, or shows them in another order."""
    options = {"bf": "2"} if codec == "mpeg2video" else {"preset": "ultrafast", "bf": "2"}
    options |= {"x265-params": "log-level=error:keyint=24:bframes=2"} if codec == "libx265" else {}
    whole = write_video(tmp_path / f"whole{suffix}", codec, 96, fps=25, gop=24, options=options)
    cut = copy_tracks(tmp_path / f"cut{suffix}", (whole, 0), keep=lambda packet, number: number not in left_out)
    assert_as_decoded(cut)


def test_an_edit_list_behind_the_end(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", "libx264", 24, options=X264)
    with pytest.raises(ClipError, match=r"cut\.mp4: "):
        read_frames(edit_list(whole, tmp_path / "cut.mp4", 60.0), 4)


def test_joined_transport_streams(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.ts", "libx264", 48, options=X264)
    joined = tmp_path / "joined.ts"
    joined.write_bytes(whole.read_bytes() * 2)
    got = read_frames(joined, 8)
    assert got.num_frames == 96
    assert numbers(got.frames) == [number % 48 for number in spread(0, 95)]


@pytest.mark.parametrize("suffix", [".mpg", ".vob"])
@pytest.mark.parametrize("timestamps", [None, (2.0, 3.0)])
def test_program_streams(tmp_path: Path, suffix: str, timestamps: tuple[float, float] | None) -> None:
    path = write_video(tmp_path / f"clip{suffix}", "mpeg2video", 96, b_frames=2)
    got = read_frames(path, 5, timestamps)
    assert got.num_frames == 96
    assert numbers(got.frames) == (spread(48, 72, 5) if timestamps else spread(0, 95, 5))


@pytest.mark.parametrize("b_frames", [0, 2])
def test_a_transport_stream_of_many_groups(tmp_path: Path, b_frames: int) -> None:
    path = write_video(tmp_path / "long.ts", "libx264", 600, gop=6, size=(48, 32), options={"preset": "ultrafast", "bf": str(b_frames)})
    assert read_frames(path, 30).num_frames == 600
    assert shown(path, 30) == spread(0, 599, 30)


def test_tracks_that_begin_on_the_way(tmp_path: Path) -> None:
    """PyAV 18 looks for the new ones where it has no place for them, and ends with an IndexError."""
    parts = []
    for pid in range(256, 272):  # the first lasts longer than FFmpeg looks for tracks
        options, rate = {"mpegts_start_pid": str(pid)}, 24 if parts else 1
        parts.append(
            write_video(
                tmp_path / f"{pid}.ts", "libx264", 8 if parts else 40, fps=rate, options=X264, container_options=options
            ).read_bytes()
        )
    nothing = (b"\x47\x1f\xff\x10" + bytes(184)) * 2_000  # and comes again at the end, where it looks as well
    (tmp_path / "clip.ts").write_bytes(b"".join(parts) + nothing + parts[0])
    got = read_frames(tmp_path / "clip.ts", 8)
    assert (got.num_frames, numbers(got.frames), got.warnings) == (80, [number % 40 for number in spread(0, 79)], ())


def test_a_damaged_key_frame(tmp_path: Path) -> None:
    """A decoder that is entered there has no picture before to make up what is missing."""
    whole = write_video(tmp_path / "whole.ts", "libx264", 48, gop=24, options={"preset": "ultrafast", "bf": "0"})
    data = bytearray(whole.read_bytes())
    with av.open(whole) as container:
        packet = [p for p in container.demux(video=0) if p.size][24]
        assert packet.is_keyframe and packet.pos is not None
    data[packet.pos + 188 * 2 + 90 : packet.pos + 188 * 2 + 120] = bytes(30)
    (tmp_path / "damaged.ts").write_bytes(data)
    with av.open(tmp_path / "damaged.ts") as container:
        container.streams.video[0].thread_type = "NONE"
        want = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    got = read_frames(tmp_path / "damaged.ts", 4)
    assert np.array_equal(got.frames, [want[number] for number in got.frame_index])


def test_the_frame_size_changes(tmp_path: Path) -> None:
    """Later pictures are scaled to the size of the first, as decord scales them."""
    large = write_video(tmp_path / "large.ts", "libx264", 24, options=X264)
    small = write_video(tmp_path / "small.ts", "libx264", 24, size=(48, 32), options=X264)
    joined = tmp_path / "joined.ts"
    joined.write_bytes(large.read_bytes() + small.read_bytes())
    got = read_frames(joined, 4)
    assert got.frames.shape == (4, 64, 96, 3)
    assert numbers(got.frames) == [0, 15, 7, 23]


@pytest.mark.parametrize(("first", "then"), [("mpeg2video", "libx264"), ("libx264", "mpeg2video"), ("mpeg1video", "mpeg2video")])
def test_the_codec_changes(tmp_path: Path, first: str, then: str) -> None:
    """FFmpeg goes on with the first decoder: that of MPEG-2 passes over H.264 without an error."""
    parts = [write_video(tmp_path / f"{codec}.ts", codec, 24, fps=25).read_bytes() for codec in (first, then)]
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(parts))
    if first == "mpeg1video":  # one decoder for both
        assert read_frames(joined, 2).num_frames == 48
        return
    with pytest.raises(ClipError, match=r"joined\.ts: the codec of the video changes from \w+ to \w+; re-encode it, or split it there"):
        read_frames(joined, 2)


# ---------------------------------------------------------------------------------------------------- pictures and their times


def test_a_codec_that_repeats_pictures() -> None:
    """Theora's empty packets repeat the picture before; the 4 others are its frames, half a second long together.

    The file: `ffmpeg -f lavfi -i testsrc2=s=64x48:r=24 -frames:v 8 -c:v libtheora -q:v 2 -g 1 th.ogv`, each second packet then emptied.
    """
    got = read_frames(HERE / "repeats.ogv", 4)
    assert (got.num_frames, got.fps) == (4, 12.0)
    assert not np.array_equal(got.frames[0], got.frames[3])


def test_raw_dv(tmp_path: Path) -> None:
    got = read_frames(write_video(tmp_path / "clip.dv", "dvvideo", 5, size=(720, 576), fps=25), 5)
    assert (got.num_frames, got.fps, numbers(got.frames)) == (5, 25.0, [0, 1, 2, 3, 4])


def test_a_bare_stream_has_no_times(tmp_path: Path) -> None:
    got = read_frames(write_video(tmp_path / "clip.h264", "libx264", 12), 12)
    assert (got.num_frames, numbers(got.frames)) == (12, list(range(12)))
    assert got.fps in (24.0, 25.0)  # its own rate, or the one that FFmpeg takes for such streams


def test_a_varying_frame_rate(tmp_path: Path) -> None:
    times = np.cumsum([0, 40, 40, 200, 40, 500, 40, 40, 1000, 40]).tolist()
    got = read_frames(write_video(tmp_path / "clip.mkv", "libx264", 10, options=X264, times=times), 10)
    assert numbers(got.frames) == list(range(10))


@pytest.mark.parametrize("flags", ["frag_keyframe+empty_moov", "frag_keyframe+empty_moov+negative_cts_offsets", "faststart"])
def test_editions_of_mp4(tmp_path: Path, flags: str) -> None:
    path = write_video(tmp_path / "clip.mp4", "libx264", 50, options=X264, container_options={"movflags": flags})
    got = read_frames(path, 8)
    assert (got.num_frames, numbers(got.frames)) == (50, spread(0, 49))


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("clip.avi", "mpeg4", {"bf": "2"}),
        ("clip.mp4", "mpeg4", {"bf": "2"}),
        ("clip.flv", "flv1", {}),
        ("clip.wmv", "wmv2", {}),
        ("clip.mxf", "mpeg2video", {}),
        ("clip.mkv", "libx264", {"preset": "ultrafast", "x264-params": "open-gop=1:bframes=2:keyint=12:scenecut=0"}),
        ("clip.ts", "libx264", {"preset": "ultrafast", "x264-params": "open-gop=1:bframes=2:keyint=12:scenecut=0"}),
        ("clip.mov", "libx264", {"preset": "ultrafast", "x264-params": "intra-refresh=1:keyint=12"}),
        ("clip.ts", "libx264", {"preset": "ultrafast", "x264-params": "intra-refresh=1:keyint=12"}),
        ("clip.mp4", "libx265", {"x265-params": "log-level=none:temporal-layers=3:bframes=3:keyint=12"}),
        ("clip.mp4", "libx265", {"x265-params": "log-level=none:bframes=3:keyint=12"}),
        ("clip.webm", "libvpx", {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "8"}),
        ("clip.webm", "libvpx-vp9", {"deadline": "good", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "8"}),
        ("clip.mp4", "libsvtav1", {"preset": "12", "svtav1-params": "keyint=12"}),
        ("clip.mov", "mjpeg", {}),
        ("clip.mkv", "ffv1", {}),
    ],
)
def test_every_codec_gives_the_pictures_of_reading_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, codec: str, options: dict[str, str]
) -> None:
    path = write_video(
        tmp_path / name, codec, 50, options=options, fps=25, pix_fmt="yuvj420p" if codec == "mjpeg" else "yuv420p", size=(128, 64)
    )
    got = read_frames(path, 9)
    assert (got.num_frames, numbers(got.frames)) == (50, spread(0, 49, 9))
    monkeypatch.setattr(video, "_enter", lambda *_: None)
    assert np.array_equal(read_frames(path, 9).frames, got.frames)


@pytest.mark.parametrize(("name", "codec"), [("clip.gif", "gif"), ("clip.apng", "apng"), ("one.png", "png"), ("one.jpg", "mjpeg")])
def test_pictures_as_clips(tmp_path: Path, name: str, codec: str) -> None:
    count = 6 if name.startswith("clip") else 1
    with av.open(tmp_path / name, "w") as out:
        stream: Any = out.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "rgb24")
        for i in range(count):
            frame = np.full((64, 96, 3), 20, np.uint8)
            frame[:8, 8 * i : 8 * i + 8] = 235
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))
    got = read_frames(tmp_path / name, 6)
    assert got.num_frames == count
    assert [int(np.argmax(frame[4, 4::8].mean(-1))) for frame in got.frames] == (list(range(6)) if count == 6 else [0] * 6)


def test_messages_in_packets_of_their_own_are_no_lost_pictures(tmp_path: Path) -> None:
    """H.264 as MP4 has it, interlaced, copied into ASF: FFmpeg splits off what precedes each picture and cannot decode it."""
    options = {"preset": "ultrafast", "flags": "+ildct+ilme", "x264-params": "tff=1"}
    whole = write_video(tmp_path / "whole.mp4", "libx264", 24, options=options)
    copied = copy_tracks(tmp_path / "copied.asf", (whole, 0))
    with av.open(copied) as container:
        assert len([packet for packet in container.demux(video=0) if packet.size]) > 40
    got = read_frames(copied, 4)
    assert (got.num_frames, got.warnings) == (24, ())
    assert numbers(got.frames) == spread(0, 23, 4)


def test_one_broken_frame_of_a_gif(tmp_path: Path) -> None:
    with av.open(tmp_path / "clip.gif", "w") as out:
        stream: Any = out.add_stream("gif", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "rgb8"
        for i in range(20):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 96, 3), 12 * i, np.uint8), format="rgb24")))
        out.mux(stream.encode(None))
    data = bytearray((tmp_path / "clip.gif").read_bytes())
    with av.open(tmp_path / "clip.gif") as container:
        packet = [p for p in container.demux(video=0) if p.size][7]
        at = data.index(bytes(packet)) + bytes(packet).index(b"\x2c")  # the picture's descriptor
    palette = 3 << (data[at + 9] % 8 + 1) if data[at + 9] & 0x80 else 0
    data[at + 10 + palette] = 0xFF  # an impossible width of codes
    (tmp_path / "broken.gif").write_bytes(data)
    got = read_frames(tmp_path / "broken.gif", 4)
    assert got.num_frames == 19
    assert got.warnings == (f"{tmp_path / 'broken.gif'}: 1 of 20 packets of the video do not decode; the others are used",)


# ------------------------------------------------------------------------------------------------------------ several tracks


def two_videos(tmp_path: Path, name: str, default: tuple[int, ...]) -> Path:
    small = write_video(tmp_path / "small.mp4", "libx264", 12, size=(48, 32), options=X264)
    large = write_video(tmp_path / "large.mp4", "libx264", 12, options=X264)
    return copy_tracks(tmp_path / name, (small, 0), (large, 0), default=default)


@pytest.mark.parametrize(
    ("name", "default", "width"),
    [
        ("clip.mkv", (1,), 96),
        ("clip.mkv", (0,), 48),
        ("clip.mkv", (), 96),
        ("clip.mkv", (0, 1), 96),
        ("clip.mp4", (0,), 96),  # whoever writes mp4 marks the first: it says nothing
        ("clip.mp4", (1,), 96),
    ],
)
def test_the_usual_track(tmp_path: Path, name: str, default: tuple[int, ...], width: int) -> None:
    path = two_videos(tmp_path, name, default)
    assert read_frames(path, 2).frames.shape[2] == width
    assert [read_frames(path, 2, track=number).frames.shape[2] for number in (0, 1)] == [48, 96]
    with pytest.raises(ClipError, match=rf"{name}: video track 2 is not there; the last is 1"):
        read_frames(path, 2, track=2)


def test_a_track_without_pictures_beside_one(tmp_path: Path) -> None:
    sound = write_audio(tmp_path / "sound.mp4", "aac", 1.0)
    with pytest.raises(ClipError, match="has no video stream"):
        read_frames(sound, 8)


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_encrypted_tracks_are_refused(tmp_path: Path, kind: str) -> None:
    """FFmpeg decodes their noise, in part without an error."""
    key = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "76a6c65c5ea762046bd749a2e632ccbb", "encryption_kid": "a7" * 16}
    if kind == "video":
        path = write_video(tmp_path / "a.mp4", "libx264", 12, container_options=key)
        with pytest.raises(ClipError, match="its video is encrypted"):
            read_frames(path, 4)
    else:
        path = write_audio(tmp_path / "a.m4a", "aac", 1.0, container_options=key)
        with pytest.raises(ClipError, match="its audio is encrypted"):
            read_waveform(path)
