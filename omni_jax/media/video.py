"""From a video file to sampled frames (SPEC section 2).

Letters: F frames sampled, n frames in the stream.
"""

from __future__ import annotations

import array
import dataclasses
import os
from collections.abc import Generator

import av.container
import av.video.frame
import av.video.stream
import numpy as np

from omni_jax.media.sampling import FrameRule, sample_indices
from omni_jax.media.source import AvError, is_incomplete, moving_picture, open_container, reason
from omni_jax.types import ClipError, VideoFrames

SEEK_GAIN = 64  # frames: a seek restarts the decoder, so it must save more decoding than this
LARGEST_SAMPLE = 1 << 30  # bytes of all sampled frames: 8 frames of 8k are 0.8 GB, and a file of 100 kB can claim a picture of 2.7 GB
LONGEST_REREAD = 20_000  # frames: a stream whose seeks go wrong is decoded from its start up to this length


def read_frames(path: os.PathLike[str] | str, frames: int | FrameRule, timestamps: tuple[float, float] | None = None) -> VideoFrames:
    """Returns frames spread over a clip, in its upright orientation.

    Only the frames sampled are held, and long files are entered at the key frame before each of them, so that time and memory are bounded
    by the stream's packet count and key frame distance and not by its decoded size.

    Args:
      path: a video file of any container FFmpeg knows.
      frames: F, how many to sample, a clip with fewer repeats some; or a rule that says how many and which.
      timestamps: (start, end) seconds of the part to sample; None for the whole stream.

    Raises:
      ClipError: when the file is missing, empty, a directory, not a video, truncated (fewer frames decode than the container declares) or
        ends before the interval starts.
    """
    with open_container(path) as container:
        stream = _stream(container, path)
        index = _read_index(container, stream, path)
        fps = _frames_per_second(stream, index)
        indices, seconds = sample_indices(len(index.pts), fps, frames, timestamps, path)
        _check_size(stream.width, stream.height, len(indices), path)
    wanted = np.unique(indices)
    pictures = None
    if _seeks(index, wanted):
        with open_container(path) as container:
            pictures = _decode_seeking(container, _stream(container, path), index, wanted, path)
    if pictures is None:
        with open_container(path) as container:
            pictures = _decode_in_order(container, _stream(container, path), index, wanted, path)
    shapes = {picture.shape[:2] for picture in pictures.values()}
    if len(shapes) > 1:
        raise ClipError(f"{path}: the frame size changes within the clip ({_sizes(shapes)}); re-encode it to one size")
    ((height, width),) = shapes
    _check_size(width, height, len(indices), path)  # repeated frames may be many more than those decoded
    stacked = np.stack([pictures[i] for i in indices.tolist()])
    return VideoFrames(frames=stacked, frame_index=indices, fps=fps, num_frames=len(index.pts), seconds=seconds)


@dataclasses.dataclass(frozen=True)
class _Index:
    """Presentation times of a stream, from its packets alone.

    Attributes:
      pts: (n,) int64, ascending, one per frame, in the stream's time base.
      keys: (K,) int64, ascending positions in `pts` of the key frames.
      exact: whether every frame has a time of its own, so that a frame is known by its time.
    """

    pts: np.ndarray
    keys: np.ndarray
    exact: bool


def _stream(container: av.container.InputContainer, path: os.PathLike[str] | str) -> av.video.stream.VideoStream:
    stream = moving_picture(container)
    if stream is None:
        raise ClipError(f"{path}: has no video stream; remove the record's video field or give a video file")
    if stream.codec_context is None:
        raise ClipError(f"{path}: the video's codec is unknown; re-encode it, to H.264 for example")
    stream.thread_type = "NONE"  # decoder threads would compete with the other workers, and outlive a hang
    return stream


def _check_size(width: int, height: int, frames: int, path: os.PathLike[str] | str) -> None:
    needed = 3 * width * height * frames
    if needed > LARGEST_SAMPLE:
        raise ClipError(
            f"{path}: {frames} frames of {width}x{height} pixels take {needed / 1e9:.1f} GB; scale it down, or sample fewer frames"
        )


def _read_index(container: av.container.InputContainer, stream: av.video.stream.VideoStream, path: os.PathLike[str] | str) -> _Index:
    """Walks the packets without decoding them, and compares their number with what the container declares."""
    declared = _declared_frames(container, stream)
    times, keys = array.array("q"), array.array("q")
    exact, hidden_possible = True, stream.codec_context.name in ("vp8", "libvpx")
    try:
        for packet in container.demux(stream):
            if not packet.size or packet.is_corrupt:  # a packet is corrupt when the file ends within it
                continue
            time = packet.pts if packet.pts is not None else packet.dts
            if packet.is_discard or (not keys and not packet.is_keyframe) or (hidden_possible and not bytes(packet)[0] >> 4 & 1):
                declared -= 1  # lies outside the edit list, cannot be decoded without its key frame, or is never shown
                continue
            exact &= packet.pts is not None
            time = time if time is not None else len(times)
            times.append(time)
            if packet.is_keyframe:
                keys.append(time)
    except AvError as error:
        raise ClipError(f"{path}: damaged after {len(times)} frames ({reason(error)}); fetch it again or re-encode it") from None
    if len(times) < declared:
        raise ClipError(f"{path}: truncated: {len(times)} of the {declared} frames that the container declares are there; fetch it again")
    if not times:
        raise ClipError(f"{path}: the video stream holds no frames; fetch it again or remove the record's video field")
    if declared <= 0 and is_incomplete(path):
        raise ClipError(f"{path}: truncated: the file ends before the container does, after {len(times)} frames; fetch it again")
    pts = np.sort(np.frombuffer(times, np.int64))
    exact = bool(exact and np.all(np.diff(pts) > 0))
    return _Index(pts=pts, keys=np.searchsorted(pts, np.sort(np.frombuffer(keys, np.int64))), exact=exact)


def _declared_frames(container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> int:
    """Frames the container says the stream has; 0 where it says nothing that could be relied on."""
    if container.format.name == "avi":
        return 0  # counts frames that repeat the one before and hold no data, and one too many where FFmpeg wrote it with B-frames
    if stream.frames and "mp4" in container.format.name:
        # The sample table after the edit list was applied: a clip trimmed by its edit list shows fewer frames than it stores.
        return len(stream.index_entries)
    return stream.frames


def _frames_per_second(stream: av.video.stream.VideoStream, index: _Index) -> float:
    rate = stream.average_rate or stream.guessed_rate
    if rate:
        return float(rate)
    span = float((index.pts[-1] - index.pts[0]) * stream.time_base) if stream.time_base else 0.0
    return (len(index.pts) - 1) / span if span > 0 else 1.0  # a single picture: any rate will do


def _entry(index: _Index, frame: int) -> int:
    """Position of the key frame that decoding must start from to reach a frame."""
    return int(index.keys[max(0, np.searchsorted(index.keys, frame, side="right") - 1)])


def _seeks(index: _Index, wanted: np.ndarray) -> bool:
    """Whether seeking saves decoding: some wanted frame lies well past the frame before it, beyond a key frame."""
    before = np.concatenate([[0], wanted[:-1]])
    return any(_entry(index, int(frame)) - int(earlier) > SEEK_GAIN for frame, earlier in zip(wanted, before, strict=True))


def _decode_in_order(
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
    index: _Index,
    wanted: np.ndarray,
    path: os.PathLike[str] | str,
) -> dict[int, np.ndarray]:
    """Decodes from the start up to the last wanted frame; frames are known by their number."""
    last, kept = int(wanted[-1]), set(wanted.tolist())
    pictures: dict[int, np.ndarray] = {}
    decoded = 0
    for frame in _frames(container, stream, path, index):
        if decoded in kept:
            pictures[decoded] = _picture(frame, len(wanted), path)
        decoded += 1
        if decoded > last:
            return pictures
    raise _too_few(path, decoded, index)


def _decode_seeking(
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
    index: _Index,
    wanted: np.ndarray,
    path: os.PathLike[str] | str,
) -> dict[int, np.ndarray] | None:
    """Decodes each wanted frame from the key frame before it; frames are known by their times.

    None where a seek does not lead to the frame and the stream is short enough to be decoded from its start instead.
    """
    pictures: dict[int, np.ndarray] = {}
    reached = 0
    frames = _frames(container, stream, path, index)
    for number in wanted.tolist():
        entry, time = _entry(index, number), int(index.pts[number])
        if entry - reached > SEEK_GAIN:
            frames.close()
            try:
                container.seek(int(index.pts[entry]), stream=stream, backward=True)
            except AvError as error:
                raise ClipError(f"{path}: cannot be entered at frame {entry} ({reason(error)}); re-encode it") from None
            frames = _frames(container, stream, path, index)
        found = next((frame for frame in frames if frame.pts is not None and frame.pts >= time), None)
        if found is None or (index.exact and found.pts != time):
            if len(index.pts) <= LONGEST_REREAD:
                return None
            raise ClipError(f"{path}: frame {number} of {len(index.pts)} does not decode; fetch the file again or re-encode it")
        pictures[number] = _picture(found, len(wanted), path)
        reached = number
    return pictures


def _frames(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, path: os.PathLike[str] | str, index: _Index
) -> Generator[av.video.frame.VideoFrame]:
    decoded = 0
    try:
        for frame in container.decode(stream):
            yield frame
            decoded += 1
    except AvError as error:
        raise _too_few(path, decoded, index, reason(error)) from None


def _too_few(path: os.PathLike[str] | str, decoded: int, index: _Index, why: str = "") -> ClipError:
    detail = f" ({why})" if why else ""
    return ClipError(f"{path}: truncated or damaged: {decoded} of {len(index.pts)} frames decode{detail}; fetch it again or re-encode it")


def _picture(frame: av.video.frame.VideoFrame, frames: int, path: os.PathLike[str] | str) -> np.ndarray:
    """(height, width, 3) uint8 RGB, upright: phones store a turned picture and a note of the turn."""
    _check_size(frame.width, frame.height, frames, path)  # before it is made: a stream may change its size
    turns = round(frame.rotation / 90) % 4
    return np.rot90(frame.to_ndarray(format="rgb24"), turns)


def _sizes(shapes: set[tuple[int, ...]]) -> str:
    return ", ".join(f"{width}x{height}" for height, width in sorted(shapes))
