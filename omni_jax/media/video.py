"""From a video file to sampled frames (SPEC section 2).

The frames of a clip are those that the decoder shows, inside the edit list and in display order. A stream whose packets prove to be its
frames is entered at the key frame before each sample; every other one is decoded from its start.

Letters: F frames sampled, n frames in the stream.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import av.filter
import numpy as np
from av.sidedata.sidedata import SideDataContainer
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import VideoReformatter

from omni_jax.config import Preset
from omni_jax.media.index import PacketIndex, decode_from, read_index, shows_all, without_leading
from omni_jax.media.parts import PathLike
from omni_jax.media.sampling import sample_indices
from omni_jax.media.source import Decoding, check_complete, choose_track, open_container, other_codec
from omni_jax.types import ClipError, VideoFrames

Fit = Callable[[np.ndarray], np.ndarray]
LARGEST_SAMPLE = 1 << 30  # bytes of all sampled frames: 8 frames of 8k are 0.8 GB, and a file of 100 kB can claim a picture of 2.7 GB
_KNOWN_SIDE_DATA = frozenset(kind.value for kind in SideData)
_MATRICES = frozenset({0, 1, 2, 4, 5, 6, 7, 9})  # of colours that FFmpeg 8 converts; pictures with others it refuses, FFmpeg 5 takes BT.601
_RATE_TOLERANCE = 0.1  # a container's average rate that differs more from the times of the frames is not believed


def read_frames(
    path: PathLike, frames: int | Preset, timestamps: tuple[float, float] | None = None, track: int = -1, fit: Fit = np.asarray
) -> VideoFrames:
    """Returns frames spread over a clip, upright and all of the first one's size.

    Only the frames sampled are held. Packets that do not decode are left out, as FFmpeg leaves them out.

    Args:
      path: a video file of any container FFmpeg knows.
      frames: F, how many to sample, a clip with fewer repeats some; or a preset, which says how many and which.
      timestamps: (start, end) seconds of the part to sample; None for the whole stream.
      track: its number among the video tracks, from 0; -1 as `choose_track` chooses.
      fit: crops or resizes a picture (height, width, 3) uint8 as soon as it is decoded, so that large ones are never held together.

    Raises:
      ClipError: when the file is missing, empty, a directory, not a video, truncated (fewer packets than the container declares), damaged
        (more than LARGEST_LOSS of the packets do not decode) or ends before the interval starts.
    """
    with open_container(path, by_header=True) as container:
        stream = _stream(container, path, track)
        index = read_index(container, stream, path)
        fps = _frames_per_second(stream, index.pts)
        check_complete(container, stream, path, index.packets, f"{len(index.pts)} frames")
        shown = index if index.exact and shows_all(container, stream, index) else None
        if shown is not None and index.leading:
            with open_container(path) as start:  # seeking to the first packet of a transport stream may miss it
                shown = without_leading(index, Decoding(start, _stream(start, path, track), path))
        sample = functools.partial(sample_indices, fps=fps, rule=frames, timestamps=timestamps, path=path)
        pictures, count, warnings = None, len((shown or index).pts), ()
        if shown is not None:
            wanted = sample(count)[0]
            if 3 * stream.width * stream.height * len(wanted) <= LARGEST_SAMPLE:  # by the header; its pictures may be smaller
                pictures = _enter(container, stream, shown, np.unique(wanted), fit)
    if pictures is None:
        pictures, count, warnings = _decode_in_order(path, track, count, sample, fit)
    indices, seconds = sample(count)
    stacked = np.stack([pictures[i] for i in indices.tolist()])
    return VideoFrames(frames=stacked, frame_index=indices, fps=fps, num_frames=count, seconds=seconds, warnings=warnings)


def _stream(container: Any, path: PathLike, track: int) -> Any:
    stream = choose_track(container, "video", track, path)
    if stream is None:
        raise ClipError(f"{path}: has no video stream; remove the record's video field or give a video file")
    if stream.codec_context is None:
        raise ClipError(f"{path}: the video's codec is unknown; re-encode it, to H.264 for example")
    if change := other_codec(container, stream, path):
        raise ClipError(f"{path}: {change}; re-encode it, or split it there")
    stream.thread_type = "NONE"  # decoder threads would compete with the other workers, and outlive a hang
    return stream


def _check_size(width: int, height: int, frames: int, path: PathLike) -> None:
    if (needed := 3 * width * height * frames) > LARGEST_SAMPLE:
        size = f"{frames} frames of {width}x{height} pixels take {needed / 1e9:.1f} GB"
        raise ClipError(f"{path}: {size}; scale it down, or sample fewer frames")


def _frames_per_second(stream: Any, pts: np.ndarray) -> float:
    """Average rate of the stream, as the container has it unless the times of its frames contradict."""
    rate = stream.average_rate or stream.guessed_rate
    steps = np.diff(pts)
    if (len(steps) < 3 and rate) or not (steps > 0).all() or not len(steps):
        return float(rate) if rate else 1.0  # a single picture: any rate will do
    # Both, since one jump of the clock changes the mean, and a varying rate the median.
    measured = [float(1 / (step * stream.time_base)) for step in (steps.mean(), np.median(steps))]
    if rate and any(abs(value / float(rate) - 1) <= _RATE_TOLERANCE for value in measured):
        return float(rate)
    return measured[0]


def _enter(container: Any, stream: Any, index: PacketIndex, wanted: np.ndarray, fit: Fit) -> dict[int, np.ndarray] | None:
    """Decodes the wanted frames from the key frames before them; None where one of them does not come out."""
    size = (stream.width, stream.height)
    pictures: dict[int, np.ndarray] = {}
    numbers = wanted.tolist()
    while numbers:
        entry = index.entry(numbers[0])
        together = 1  # those reached from the same entry without a better one in between
        while together < len(numbers) and not index.saves(index.entry(numbers[together]), numbers[together - 1]):
            together += 1
        by_time = {int(index.pts[number]): number for number in numbers[:together]}
        matrix = None
        for frame in decode_from(container, stream, index, entry, set(by_time)):
            if (frame.width, frame.height) != size:
                return None
            matrix = _matrix(frame) or matrix
            if frame.pts in by_time:
                pictures[by_time[frame.pts]] = fit(_picture(frame, size, matrix))
        if len(pictures) < len(wanted) - len(numbers) + together:
            return None
        del numbers[:together]
    return pictures


def _decode_in_order(
    path: PathLike, track: int, guess: int, sample: Callable[[int], tuple[np.ndarray, float]], fit: Fit
) -> tuple[dict[int, np.ndarray], int, tuple[str, ...]]:
    """Returns the wanted frames by number, the number of all frames and warnings; decodes once where `guess` is that number, else twice."""
    while True:
        indices: list[int] = []
        with contextlib.suppress(ClipError):  # where so short a clip would end before the interval
            indices = sample(guess)[0].tolist() if guess else []
        wanted = set(indices)
        pictures: dict[int, np.ndarray] = {}
        count, size, matrix = 0, (0, 0), None
        with open_container(path) as container:
            stream = _stream(container, path, track)
            _check_size(stream.width, stream.height, len(indices), path)
            decoding = Decoding(container, stream, path)
            for frame in decoding:
                if not count:
                    size = (frame.width, frame.height)
                    _check_size(*size, len(indices), path)
                if frame.key_frame or count in wanted:
                    matrix = _matrix(frame) or matrix
                if count in wanted:
                    pictures[count] = fit(_picture(frame, size, matrix))
                count += 1
        refusal = decoding.refusal("video") or ("" if count else f"the video stream holds no frames ({decoding.error or 'no packets'})")
        if refusal:
            raise ClipError(f"{path}: {refusal}; re-encode it or leave it out")
        if wanted.issuperset(sample(count)[0].tolist()):
            lost = decoding.said("video")
            return pictures, count, (f"{path}: {lost}; the others are used",) if lost else ()
        guess = count


def _picture(frame: Any, size: tuple[int, int], matrix: bytes | None) -> np.ndarray:
    """(height, width, 3) uint8 RGB, upright."""
    width, height = size
    known = frame.colorspace in _MATRICES and not frame.interlaced_frame
    if known and frame.format.name in ("yuv420p", "yuvj420p") and (frame.width, frame.height) == size and not height % 2:
        # The same bits as below in a third of the time. More threads take more of it.
        converted: Any = VideoReformatter().reformat(frame, format="rgb24", threads=1)
    else:
        # FFmpeg's filter, as its command line and decord do: PyAV's own conversion places the colours of 10-bit pictures elsewhere. An
        # interlaced one is converted as one picture; FFmpeg 8 alone would convert the colours of its two fields apart.
        colours = "color_primaries=unknown:color_trc=unknown" + ":colorspace=unknown" * (frame.colorspace not in _MATRICES)
        converted = _filtered(frame, ("setparams", colours), ("scale", f"{width}:{height}:interl=0"), ("format", "rgb24"))
    plane = converted.planes[0]
    picture = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)[:, : 3 * width].reshape(height, width, 3)
    if matrix is None:
        return picture
    # The point (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(b) > abs(a):
        picture, a, d = picture.swapaxes(0, 1), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _matrix(frame: Any) -> bytes | None:
    """How a picture is shown: phones store a turned or mirrored one and a note of it. Streams may have the note at their key frames alone,
    where it holds until the next."""
    # `frame.side_data` would be a reference cycle, which keeps pictures by the hundred until garbage is collected.
    side_data: Any = SideDataContainer
    try:
        matrix = side_data(frame).get("DISPLAYMATRIX")
    except ValueError:  # some of it is of a kind that PyAV does not know, as EXIF or the number of a view
        deletions = [("sidedata", f"mode=delete:type={number}") for number in range(64) if number not in _KNOWN_SIDE_DATA]
        matrix = side_data(_filtered(frame, *deletions)).get("DISPLAYMATRIX")
    return None if matrix is None else bytes(matrix)


def _filtered(frame: Any, *filters: tuple[str, str]) -> Any:
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000))
    graph.link_nodes(source, *(graph.add(name, options) for name, options in filters), graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull()
