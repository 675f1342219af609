"""Pictures in the colours and the position that FFmpeg's command line shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from omni_jax.media import video
from omni_jax.media.video import read_frames
from tests.media.containers import write_video
from tests.media_samples import picture, write_clip

X264 = {"preset": "ultrafast", "bf": "2"}


def test_colours_of_ten_bits_lie_between_their_pixels(tmp_path: Path) -> None:
    """As FFmpeg's command line and decord place them: an edge between two colours is the same from both sides."""
    frame = av.VideoFrame(32, 16, "yuv420p10le")
    edge = np.where(np.arange(16) < 8, 448, 576)
    for plane, row in zip(frame.planes, (np.full(32, 512), edge, np.full(16, 512)), strict=True):
        rows = np.zeros((plane.height, plane.line_size // 2), "<u2")
        rows[:, : len(row)] = row
        plane.update(rows.tobytes())
    with av.open(tmp_path / "edge.mkv", "w") as out:
        stream: Any = out.add_stream("libx264", rate=25, options={"preset": "ultrafast", "qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p10le"
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    blue = read_frames(tmp_path / "edge.mkv", 1).frames[0, 8, :, 2].astype(int)
    assert np.abs(blue[[2, 29]] - (98.1, 162.7)).max() < 2  # Y is (128 - 16) / 219 of 255, U adds 1.772 * 16 / 224 of 255
    assert np.abs(blue + blue[::-1] - blue[2] - blue[29]).max() <= 1


@pytest.mark.parametrize("matrix", ["bt709", "smpte170m", "bt2020nc"])
@pytest.mark.parametrize("shown_range", ["tv", "pc"])
def test_colours_of_eight_bits_are_those_of_the_command_line(tmp_path: Path, matrix: str, shown_range: str) -> None:
    clip = write_video(tmp_path / "a.mp4", "libx264", 4, options=X264 | {"colorspace": matrix, "color_range": shown_range})
    got = read_frames(clip, 4)
    with av.open(clip) as container:
        for frame, shown in zip(container.decode(video=0), got.frames, strict=True):
            scale = ("scale", f"{frame.width}:{frame.height}:interl=0")
            assert np.array_equal(shown, video._filtered(frame, scale, ("format", "rgb24")).to_ndarray())


@pytest.mark.parametrize("tag", [{"colorspace": "ycgco"}, {"colorspace": "chroma-derived-c"}, {"color_trc": "log100"}])
def test_colours_of_a_kind_that_ffmpeg_8_cannot_convert(tmp_path: Path, tag: dict[str, str]) -> None:
    plain = read_frames(write_video(tmp_path / "plain.mp4", "libx264", 4, options=X264), 4)
    assert np.array_equal(read_frames(write_video(tmp_path / "tagged.mp4", "libx264", 4, options=X264 | tag), 4).frames, plain.frames)


def test_an_interlaced_picture_is_converted_as_one(tmp_path: Path) -> None:
    """FFmpeg 8 would convert the colours of its two fields apart."""
    options = {"preset": "ultrafast", "flags": "+ildct+ilme", "x264-params": "tff=1:qp=0"}
    plain = write_video(tmp_path / "plain.ts", "libx264", 6, options={"preset": "ultrafast", "qp": "0"})
    fields = write_video(tmp_path / "fields.ts", "libx264", 6, options=options)
    with av.open(fields) as container:
        assert next(container.decode(video=0)).interlaced_frame
    got = read_frames(fields, 6)
    assert got.num_frames == 6
    assert np.abs(got.frames.astype(int) - read_frames(plain, 6).frames).mean() < 0.5


@pytest.mark.parametrize("suffix", [".mp4", ".flv"])  # entered at key frames, read through
def test_a_turn_that_is_noted_at_key_frames_alone(tmp_path: Path, suffix: str) -> None:
    plain = write_video(tmp_path / "plain.mp4", "libx264", 48, options=X264)
    turned = tmp_path / f"turned{suffix}"
    with av.open(plain) as source, av.open(turned, "w") as out:
        stream: Any = out.add_stream_from_template(source.streams.video[0])
        note = av.BitStreamFilterContext("h264_metadata=display_orientation=insert:rotate=90", source.streams.video[0])
        for packet in source.demux(video=0):
            for noted in note.filter(packet) if packet.size else ():
                noted.stream = stream
                out.mux(noted)
    got = read_frames(turned, 6).frames
    assert np.array_equal(got, np.rot90(read_frames(plain, 6).frames, 1, axes=(1, 2)))


@pytest.mark.parametrize(
    ("matrix", "turned"),
    [
        ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
        ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
        ((0, -1, 1, 0), lambda x: np.rot90(x, 1)),
        ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
        ((1, 0, 0, -1), lambda x: x[::-1]),
        ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
    ],
)
def test_turned_and_mirrored_pictures(tmp_path: Path, matrix: tuple[int, ...], turned: Any) -> None:
    """As phones record them: the point (x, y) is shown at (a x + c y, b x + d y)."""
    clip = write_clip(tmp_path / "phone.mp4", 0.3, audio=False)
    data, one = clip.read_bytes(), 0x10000
    values = [(one, 0, 0, 0, one), tuple(one * matrix[i] if i >= 0 else 0 for i in (0, 1, -1, 2, 3))]
    old, new = (b"".join(value.to_bytes(4, "big", signed=True) for value in row) for row in values)
    at = data.index(old, data.index(b"tkhd"))
    (tmp_path / "turned.mp4").write_bytes(data[:at] + new + data[at + len(new) :])
    plain = read_frames(clip, 2).frames
    assert np.array_equal(read_frames(tmp_path / "turned.mp4", 2).frames, np.stack([turned(frame) for frame in plain]))


@pytest.mark.parametrize("orientation", [1, 5, 6])
def test_photos_with_exif(tmp_path: Path, orientation: int) -> None:
    """FFmpeg 8 gives EXIF beside the picture, which PyAV 18 has no name for, and turns it into a display matrix."""
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(picture(5, 96, 64)).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "photo.jpg") as photo:
        want = np.asarray(ImageOps.exif_transpose(photo))
    got = read_frames(tmp_path / "photo.jpg", 1).frames[0]
    assert got.shape == want.shape
    assert np.abs(got.astype(int) - want).mean() < 1.5


def test_pillow_prints_nothing(tmp_path: Path) -> None:
    """Its warnings of a large picture and of a damaged note would go to the terminal."""
    Image.new("L", (400, 300)).save(tmp_path / "a.png")
    read = f"Image.MAX_IMAGE_PIXELS = 100_000; print(read_picture({str(tmp_path / 'a.png')!r}).size)"
    code = f"from omni_jax.media.arrays import read_picture; from PIL import Image; {read}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("(400, 300)\n", "")
