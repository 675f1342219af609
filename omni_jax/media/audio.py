"""From an audio or video file to one 16 kHz waveform (SPEC section 2)."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import av.audio.frame
import av.container
import numpy as np
import soundfile
import soxr

from omni_jax.media.source import AvError, check_file, is_incomplete, moving_picture, open_container, opened, reason
from omni_jax.types import ClipError

SAMPLE_RATE = 16_000  # Hz
SHORTEST = SAMPLE_RATE  # samples: no waveform is shorter than one second
SILENCE_SECONDS = 8.0  # stands for a missing track where the preset names no length, as in training

_BLOCK = 65_536  # samples read at a time
_SOUNDFILE_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64", ".rf64"})
_CENTER_EXACT_SECONDS = 600.0  # a longer track is not decoded whole to find its centre: its declared length says where to enter
_SEEK_SECONDS = 30.0  # less than this is decoded and dropped
_SEEK_MARGIN_SECONDS = 1.0  # decoded before the first sample wanted, so that the decoder has settled


@dataclasses.dataclass(frozen=True)
class Waveform:
    """One clip's audio.

    Attributes:
      samples: (N,) float32 at 16 kHz, cropped and padded; N >= 16,000.
      warnings: one line each: what stands in for a track that is missing or unreadable.
    """

    samples: np.ndarray
    warnings: tuple[str, ...] = ()


def read_waveform(
    path: os.PathLike[str] | str,
    *,
    seconds: float = 8.0,
    pad: bool = True,
    crop: str = "first",
    channels: str = "first",
    timestamps: tuple[float, float] | None = None,
) -> Waveform:
    """Returns the audio of a file as 16 kHz mono, cropped and padded; silence and a warning for a video without a readable track.

    Channels are joined and `timestamps` cut at the track's own rate, samples [start * rate, end * rate); resampling follows (soxr HQ, the
    length rounded up, as librosa's `soxr_hq`), then the crop. Only the part wanted is decoded, block by block.

    Args:
      path: an audio file, or a video file whose first audio track is taken.
      seconds: length kept; 0 keeps the whole track.
      pad: whether a shorter track is filled with zeros up to `seconds`. One second is always filled.
      crop: "first" or "center".
      channels: "first" or "mean".
      timestamps: (start, end) seconds of the part to take; None for the whole track.

    Raises:
      ClipError: when the file is missing, empty, a directory, not a media file or truncated, and when a file that holds audio alone cannot
        be decoded, has no samples, has NaN or infinite samples, or ends before the interval starts.
    """
    check_file(path)
    wanted = round(seconds * SAMPLE_RATE) if seconds > 0 else None
    with contextlib.ExitStack() as stack:
        track, in_video, why = _open_track(path, channels, stack)
        try:
            if track is None:
                raise _Unreadable(why)
            samples = _cut(track, wanted, crop, timestamps)
        except _Unreadable as error:
            if not in_video:
                raise ClipError(f"{path}: {error}; fetch it again, re-encode it or remove the record's audio field") from None
            length = wanted if pad and wanted else round(SILENCE_SECONDS * SAMPLE_RATE)
            return Waveform(np.zeros(max(length, SHORTEST), np.float32), (f"{path}: {error}; silence is used instead",))
    shortest = max(SHORTEST, wanted if pad and wanted else 0)
    if len(samples) < shortest:
        samples = np.pad(samples, (0, shortest - len(samples)))
    return Waveform(samples)


class _Unreadable(Exception):
    """A track that cannot be used; the message completes "FILE: ..."."""


class _Track(abc.ABC):
    """Mono samples of one track at its own rate.

    Attributes:
      rate: samples per second.
      length: samples the container declares; None where it says nothing.
    """

    rate: int
    length: int | None

    @abc.abstractmethod
    def blocks(self, start: int) -> Iterator[np.ndarray]:
        """Yields (N,) float32 blocks from sample `start` on. Raises _Unreadable for what does not decode."""


def _open_track(path: os.PathLike[str] | str, channels: str, stack: contextlib.ExitStack) -> tuple[_Track | None, bool, str]:
    """Returns (track or None, whether the file also holds video, why there is no track)."""
    if PurePath(path).suffix.lower() in _SOUNDFILE_SUFFIXES:
        file: Any = stack.enter_context(opened(path))
        # libsndfile refuses some files that FFmpeg reads: another format under a wrong suffix, for one.
        with contextlib.suppress(soundfile.LibsndfileError):
            return _SoundTrack(stack.enter_context(soundfile.SoundFile(file)), path, channels), False, ""
    container = stack.enter_context(open_container(path))
    in_video = moving_picture(container) is not None
    if not container.streams.audio:
        return None, in_video, "no audio track"
    if container.streams.audio[0].codec_context is None:
        return None, in_video, "unreadable audio track (unknown codec)"
    try:
        return _ContainerTrack(container, path, channels), in_video, ""
    except _Unreadable as error:
        return None, in_video, str(error)


def _cut(track: _Track, wanted: int | None, crop: str, timestamps: tuple[float, float] | None) -> np.ndarray:
    """Returns the part of a track that is wanted, at 16 kHz: (N,) float32, N <= `wanted` where that is given."""
    start, stop = (round(t * track.rate) for t in timestamps) if timestamps else (0, None)
    if wanted is None or crop == "first":
        return _resample(track, start, stop, wanted)
    end = min(x for x in (stop, track.length, math.inf) if x is not None)
    if end - start <= _CENTER_EXACT_SECONDS * track.rate or end == math.inf:
        whole = _resample(track, start, stop, None)
        first = max(0, len(whole) - wanted) // 2
        return whole[first : first + wanted].copy()
    span = math.ceil(wanted * track.rate / SAMPLE_RATE)
    first = start + (int(end) - start - span) // 2
    return _resample(track, first, first + span, wanted)


def _resample(track: _Track, start: int, stop: int | None, wanted: int | None) -> np.ndarray:
    """Returns samples [start, stop) of a track at 16 kHz, at most `wanted` of them; decoding ends as soon as they are there."""
    stream = soxr.ResampleStream(track.rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ") if track.rate != SAMPLE_RATE else None
    parts: list[np.ndarray] = []
    position, done = start, 0
    for block in track.blocks(start):
        block = block if stop is None else block[: stop - position]
        if not np.isfinite(block).all():
            raise _Unreadable("unreadable audio track (NaN or infinite samples)")
        position += len(block)
        if len(block):
            parts.append(stream.resample_chunk(block) if stream else block)
            done += len(parts[-1])
        if (stop is not None and position >= stop) or (wanted is not None and done >= wanted):
            break
    if position == start:
        raise _Unreadable("the audio track has no samples" + (f" at {start / track.rate:g} s, where the timestamps start" if start else ""))
    if stream and (wanted is None or done < wanted):
        parts.append(stream.resample_chunk(np.zeros(0, np.float32), last=True))
    samples = np.concatenate(parts)
    length = math.ceil((position - start) * SAMPLE_RATE / track.rate)
    length = length if wanted is None else min(length, wanted)
    return np.pad(samples[:length], (0, max(0, length - len(samples))))


def _mono(samples: np.ndarray, channels: str) -> np.ndarray:
    """(N, channels) to (N,) float32."""
    if samples.shape[1] == 1 or channels == "first":
        return np.ascontiguousarray(samples[:, 0])
    return samples.mean(axis=1, dtype=np.float32)


class _SoundTrack(_Track):
    """A track libsndfile reads."""

    def __init__(self, file: soundfile.SoundFile, path: os.PathLike[str] | str, channels: str) -> None:
        self._file, self._path, self._channels = file, path, channels
        self.rate, self.length = file.samplerate, file.frames

    def blocks(self, start: int) -> Iterator[np.ndarray]:
        if start >= self._file.frames:
            return
        position = start
        try:
            self._file.seek(start)
            while len(block := self._file.read(_BLOCK, dtype="float32", always_2d=True)):
                position += len(block)
                yield _mono(block, self._channels)
        except (soundfile.SoundFileError, RuntimeError, OSError) as error:
            raise _Unreadable(f"unreadable audio track ({reason(error)})") from None
        if position < self._file.frames:
            raise _Unreadable(f"truncated: {position} of the {self._file.frames} samples that the file declares are there")
        if is_incomplete(self._path):
            raise _Unreadable(f"truncated: the file ends before its last chunk does, after {position / self.rate:.6g} s")


class _ContainerTrack(_Track):
    """The first audio track of a container FFmpeg reads."""

    def __init__(self, container: av.container.InputContainer, path: os.PathLike[str] | str, channels: str) -> None:
        self._container, self._path, self._channels = container, path, channels
        self._stream = container.streams.audio[0]
        self._stream.codec_context.thread_type = "NONE"
        self._declared = float(self._stream.duration * self._stream.time_base) if self._stream.duration and self._stream.time_base else None
        self._frames = self._decode()
        # The rate in the header may be half of what the decoder gives (HE-AAC), so the first frame is asked.
        self._first = next(self._frames, None)
        if self._first is None:
            raise _Unreadable("the audio track has no samples")
        self.rate = self._first.sample_rate
        seconds = self._declared or (container.duration / av.time_base if container.duration else None)
        self.length = round(seconds * self.rate) if seconds else None

    def blocks(self, start: int) -> Iterator[np.ndarray]:
        position = 0
        if start > _SEEK_SECONDS * self.rate:
            position = self._seek(start)
        frame = self._first
        while frame is not None:
            if frame.sample_rate != self.rate:
                raise _Unreadable(f"unreadable audio track (the sample rate changes from {self.rate} to {frame.sample_rate} Hz)")
            block = _mono(_floats(frame), self._channels)[max(0, start - position) :]
            position += frame.samples
            if len(block):
                yield block
            frame = next(self._frames, None)
        self._check_end(position)

    def _decode(self) -> Iterator[av.audio.frame.AudioFrame]:
        try:
            yield from self._container.decode(self._stream)
        except AvError as error:
            if is_incomplete(self._path):
                raise ClipError(f"{self._path}: truncated: the file ends before the container does; fetch it again") from None
            raise _Unreadable(f"unreadable audio track ({reason(error)})") from None

    def _seek(self, start: int) -> int:
        """Moves on to shortly before a sample; returns the number of the first sample that then comes."""
        base = self._stream.time_base
        target = start / self.rate - _SEEK_MARGIN_SECONDS
        try:
            if base is None:
                return 0
            origin = self._stream.start_time or 0
            self._container.seek(origin + int(target / base), stream=self._stream, backward=True)
        except AvError as error:
            raise _Unreadable(f"unreadable audio track (no way to {target:g} s: {reason(error)})") from None
        self._frames = self._decode()
        self._first = next(self._frames, None)
        if self._first is None or self._first.pts is None:
            return start
        return round(float((self._first.pts - origin) * base) * self.rate)

    def _check_end(self, position: int) -> None:
        """Refuses a track that ended early. A fraction of a second may be missing: encoders count their padding in different ways."""
        there = position / self.rate
        short = self._declared is not None and there < 0.99 * self._declared - 0.5
        if short or ("mp4" not in self._container.format.name and is_incomplete(self._path)):
            declared = f" of {self._declared:.6g} s" if self._declared else ""
            raise ClipError(f"{self._path}: truncated: the audio ends after {there:.6g} s{declared}; fetch it again")


_INTEGER_SCALE = {"u8": 2.0**7, "s16": 2.0**15, "s32": 2.0**31, "s64": 2.0**63}


def _floats(frame: Any) -> np.ndarray:
    """(samples, channels) float32 in [-1, 1] of a decoded frame in any sample format."""
    data = frame.to_ndarray()
    kind = frame.format.name.removesuffix("p")
    count = frame.layout.nb_channels
    data = data.T if frame.format.is_planar else data.reshape(-1, count)
    if kind in _INTEGER_SCALE:
        data = data.astype(np.float64) - (128.0 if kind == "u8" else 0.0)
        return (data / _INTEGER_SCALE[kind]).astype(np.float32)
    return data.astype(np.float32, copy=False)
