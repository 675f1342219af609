"""From an audio or video file to one 16 kHz waveform (SPEC section 2). FFmpeg is the one reader."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import av
import numpy as np
import soxr
from av.audio.plane import AudioPlane

from omni_jax.media.parts import PathLike, open_bytes
from omni_jax.media.source import AvError, Decoding, check_complete, choose_track, open_container, other_codec, tracks
from omni_jax.types import ClipError

Interval: TypeAlias = "tuple[float, float] | None"
SAMPLE_RATE = 16_000  # Hz
SHORTEST = SAMPLE_RATE  # samples: no waveform is shorter than one second
SILENCE_SECONDS = 8.0  # stands for a missing track where the preset names no length, as in training

_CENTER_EXACT_SECONDS = 600.0  # a longer track is not held whole to find its centre: its length is found first
_SEEK_SECONDS = 30.0  # less than this is decoded and dropped
_SEEK_MARGIN_SECONDS = 1.0  # decoded before the first sample wanted, so that the decoder has settled
_LATE_SECONDS = 0.2  # a smaller difference of the tracks' starts is codec delay or interleaving, which players and the reference ignore
_BLOCK = 1 << 16  # samples in memory resampled together
_HOLE_SECONDS = (0.05, 10.0)  # a jump in the times of Ogg that a lost page explains; a longer one is another stream's start
_LARGEST_FRAME = 4096  # bytes: more than a frame of mp3 has
_SILENT, _AUDIBLE = 1e-4, 1e-3  # peaks: -80 and -60 dB
# Containers whose packets are numbered in samples from the file's own table, so that seeking is exact ("mp4": every edition of it).
_EXACT = frozenset({"mp4", "wav", "w64", "aiff", "au", "flac"})
# Headers that state a length. For others FFmpeg guesses it from the file's size and its first packets.
_STATED = frozenset({"mp4", "w64", "au", "flac", "ape", "tta", "wv"})
_COUNTED = frozenset({"flac", "tta", "wv"})  # of these, those whose samples are counted
# Streams of bare packets: the times of a packet are counted, so that they cannot show how much was lost before it.
_BARE = frozenset({"mp3", "aac", "ac3", "eac3", "dts", "loas", "amr", "gsm"})


@dataclasses.dataclass(frozen=True)
class Waveform:
    """One clip's audio.

    Attributes:
      samples: (N,) float32 at 16 kHz, cropped and padded; N >= 16,000.
      warnings: one line each: what stands in for a track or for packets that are missing, and a first channel that is silent alone.
      silent: whether the samples are silence in place of a track that is missing or cannot be read.
    """

    samples: np.ndarray
    warnings: tuple[str, ...] = ()
    silent: bool = False


def read_waveform(
    path: PathLike,
    *,
    seconds: float = 8.0,
    pad: bool = True,
    crop: str = "first",
    channels: str = "first",
    timestamps: Interval = None,
    track: int = -1,
    start: str = "clip",
) -> Waveform:
    """Returns the audio of a file as 16 kHz mono, cropped and padded; silence and a warning for a video without a readable track.

    Channels are joined and `timestamps` cut at the track's own rate, samples [start * rate, end * rate); resampling follows (soxr HQ, the
    length rounded up, as librosa's `soxr_hq`), then the crop. Only the part wanted is decoded, block by block. Packets that do not decode
    become silence of their own length.

    Args:
      path: an audio file, or a video file with sound.
      seconds: length kept; 0 keeps the whole track.
      pad: whether a shorter track is filled with zeros up to `seconds`. One second is always filled.
      crop: "first" or "center".
      channels: "first" or "mean".
      timestamps: (start, end) seconds of the part to take; None for the whole track.
      track: its number among the sound tracks, from 0; -1 as `choose_track` chooses.
      start: "clip" puts silence before a track that starts later than the picture; "track" begins with its first sample, as the reference
        (soundfile, librosa) does.

    Raises:
      ClipError: when the file is missing, empty, a directory, not a media file or truncated, and when a file that holds audio alone cannot
        be decoded, has no samples, has NaN or infinite samples, loses more than LARGEST_LOSS of its packets, or ends before the interval.
    """
    in_video = False
    try:
        with open_container(path, by_header=True) as container:
            in_video = bool(tracks(container, "video"))
            sound = _Track(container, path, channels, track, start)
            return Waveform(_part(sound, seconds, pad, crop, timestamps), sound.warnings())
    except _Unreadable as error:
        if not in_video:
            raise ClipError(f"{path}: {error}; re-encode it or remove the record's audio field") from None
        length = round((seconds if pad and seconds > 0 else SILENCE_SECONDS) * SAMPLE_RATE)
        return Waveform(np.zeros(max(length, SHORTEST), np.float32), (f"{path}: {error}; silence is used instead",), silent=True)


def array_waveform(samples: np.ndarray, rate: int, name: str, *, channels: str = "first", **part: Any) -> Waveform:
    """Returns samples in memory as `read_waveform` returns those of a file.

    Args:
      samples: (N, channels) float32, finite.
      rate: Hz.
      name: what to call them in a message.
      part: `seconds`, `pad`, `crop` and `timestamps`, as there.

    Raises:
      ClipError: when they end before the interval.
    """
    mixer = _Mixer(channels)
    try:
        return Waveform(_part(_Held(mixer.mono(samples), rate), **part), mixer.warnings(name))
    except _Unreadable as error:
        raise ClipError(f"{name}: {error}; correct the interval") from None


class _Mixer:
    """Joins channels, and notices where the first one is silent alone."""

    def __init__(self, channels: str) -> None:
        self._mean, self._peaks = channels == "mean", np.zeros(2)  # of the first channel, of the others

    def mono(self, samples: np.ndarray) -> np.ndarray:
        """(N, channels) to (N,) float32."""
        if samples.shape[1] > 1 and self._mean:
            return samples.mean(axis=1, dtype=np.float32)
        if samples.shape[1] > 1 and samples.size and self._peaks[0] < _SILENT:
            self._peaks = np.maximum(self._peaks, (np.abs(samples[:, 0]).max(), np.abs(samples[:, 1:]).max()))
        return np.ascontiguousarray(samples[:, 0])

    def warnings(self, name: object) -> tuple[str, ...]:
        if self._peaks[0] >= _SILENT or self._peaks[1] <= _AUDIBLE:
            return ()
        return (f"{name}: the first channel is silent, others are not; set channels=mean to hear them",)


class _Held:
    """Samples in memory, with what `_part` asks of a track."""

    def __init__(self, samples: np.ndarray, rate: int) -> None:
        self._samples, self.rate, self.longest = samples, rate, len(samples)

    def length(self) -> int:
        return self.longest

    def blocks(self, start: int) -> Iterator[np.ndarray]:
        yield from (self._samples[at : at + _BLOCK] for at in range(start, self.longest, _BLOCK))


class _Unreadable(Exception):
    """A track that cannot be used; the message completes "FILE: ..."."""


def _part(track: _Track | _Held, seconds: float = 8.0, pad: bool = True, crop: str = "first", timestamps: Interval = None) -> np.ndarray:
    """Returns the wanted part of a track at 16 kHz, cropped and padded: (N,) float32."""
    wanted = round(seconds * SAMPLE_RATE) if seconds > 0 else None
    start, stop = (round(t * track.rate) for t in timestamps) if timestamps else (0, None)
    longest = track.longest if stop is None else min(stop, track.longest)
    if wanted is None or crop == "first":
        samples = _resample(track, start, stop, wanted)
    elif longest - start <= _CENTER_EXACT_SECONDS * track.rate:
        whole = _resample(track, start, stop, None)
        first = max(0, len(whole) - wanted) // 2
        samples = whole[first : first + wanted].copy()
    else:
        end = track.length() if stop is None else min(stop, track.length())
        span = math.ceil(wanted * track.rate / SAMPLE_RATE)
        first = start + max(0, end - start - span) // 2
        samples = _resample(track, first, first + span, wanted)
    return _filled(samples, max(SHORTEST, wanted if pad and wanted else 0))


def _filled(samples: np.ndarray, length: int) -> np.ndarray:
    """Returns samples with silence behind them up to a length."""
    return samples if len(samples) >= length else np.pad(samples, (0, length - len(samples)))


def _resample(track: _Track | _Held, start: int, stop: int | None, wanted: int | None) -> np.ndarray:
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
    return _filled(samples[:length], length)


class _Track:
    """Mono samples of one track at the rate of its first frame.

    Attributes:
      rate: samples per second.
      longest: samples that the track may have at most, as far as the container can be trusted; infinite where it says nothing.
    """

    def __init__(self, container: Any, path: PathLike, channels: str, number: int, start: str) -> None:
        stream = choose_track(container, "audio", number, path)
        if stream is None:
            raise _Unreadable("no audio track")
        if stream.codec_context is None:
            raise _Unreadable("unreadable audio track (unknown codec)")
        if change := other_codec(container, stream, path):
            raise _Unreadable(change)
        stream.thread_type = "NONE"
        self._container, self._stream, self._path, self._channels, self._number = container, stream, path, channels, number
        self._format = "mp4" if "mp4" in container.format.name else container.format.name
        self._gaps = 0  # packets lost between others
        self._holes = 0  # samples lost with whole pages, of which FFmpeg says nothing
        self._ended = ""  # what its end warns of
        self._mixer = _Mixer(channels)
        self._decoding = Decoding(container, stream, path)
        self._frames = iter(self._decoding)
        # The rate in the header may be half of what the decoder gives (HE-AAC), so the first frame is asked.
        self._first = next(self._frames, None)
        if self._first is None:
            error = self._decoding.error
            raise _Unreadable(f"unreadable audio track ({error})" if error else "the audio track has no samples")
        self.rate: int = self._first.sample_rate
        self._late = self._lateness(stream) if start == "clip" else 0
        seconds = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / av.time_base
        self._declared = _mp3_seconds(path, self.rate) if self._format == "mp3" else seconds if self._format in _STATED else None
        # A table of packets says more than a length does, and WMV states that of its picture.
        self._checked = self._format != "mp4" and not tracks(container, "video")
        self.longest = round(seconds * self.rate) + self._late if seconds else math.inf

    def length(self) -> int:
        """Samples of the track: stated in its header, else counted by decoding it."""
        if self._format in _EXACT and self._declared:
            return round(self._declared * self.rate) + self._late
        with open_container(self._path, by_header=True) as container:
            again = _Track(container, self._path, self._channels, self._number, "track")
            return self._late + sum(map(len, again.blocks(0)))

    def blocks(self, start: int) -> Iterator[np.ndarray]:
        """Yields (N,) float32 blocks from sample `start` on. Raises _Unreadable or ClipError for what does not decode."""
        if start < self._late:
            yield np.zeros(self._late - start, np.float32)
        start = max(0, start - self._late)
        position = self._seek(start) if start > _SEEK_SECONDS * self.rate and self._seekable(start) else 0
        sought = position > 0
        for block in self._samples():
            position += len(block)
            if position > start:
                yield block[max(0, start - position + len(block)) :]
        self._check_end(position, sought)

    def warnings(self) -> tuple[str, ...]:
        """Says what a listener would miss in the blocks that were read. Raises _Unreadable where that is too much."""
        if refusal := self._decoding.refusal("sound"):
            raise _Unreadable(refusal)
        lines = [self._ended] if self._ended else []
        if self._gaps:
            lines.append(f"{self._path}: {self._gaps} of {self._decoding.packets} packets of the sound do not decode; the others are used")
        if self._holes:
            lines.append(f"{self._path}: {self._holes / self.rate:.3g} s of the sound are damaged; silence takes their place")
        if self._decoding.stopped:
            said = f"after {self._decoding.packets} packets of the sound ({self._decoding.stopped}); what is before is used"
            lines.append(f"{self._path}: the file cannot be read on {said}")
        return (*lines, *self._mixer.warnings(self._path))

    def _samples(self) -> Iterator[np.ndarray]:
        """Yields mono blocks at `rate`: gaps are filled, another rate is resampled."""
        expected, lost = None, self._decoding.lost
        converter, rate = None, self.rate
        time_base = float(self._stream.time_base)
        assert self._first is not None  # opening and seeking refuse a track without any
        for frame in itertools.chain((self._first,), self._frames):
            lost, missing = self._decoding.lost, self._decoding.lost - lost
            jump = 0.0 if expected is None or frame.pts is None else (frame.pts - expected) * time_base
            gap = round(jump * self.rate)
            if missing and expected is not None:
                self._gaps += missing
                gap = 0 if self._format in _BARE else min(gap, 2 * missing * frame.samples)
            elif self._format == "ogg" and _HOLE_SECONDS[0] < jump < _HOLE_SECONDS[1]:
                self._holes += gap
            else:
                gap = 0
            if gap > 0:
                yield np.zeros(gap, np.float32)
            expected = None if frame.pts is None else frame.pts + frame.samples / frame.sample_rate / time_base
            block = self._mixer.mono(_floats(frame))
            if frame.sample_rate != rate:
                if converter:
                    yield converter.resample_chunk(np.zeros(0, np.float32), last=True)
                rate = frame.sample_rate
                converter = soxr.ResampleStream(rate, self.rate, 1, dtype="float32", quality="HQ") if rate != self.rate else None
            yield converter.resample_chunk(block) if converter else block
        if converter:
            yield converter.resample_chunk(np.zeros(0, np.float32), last=True)

    def _lateness(self, stream: Any) -> int:
        """Samples by which the track starts later than the picture."""
        picture = choose_track(self._container, "video", -1, self._path)
        if picture is None or picture.start_time is None or stream.start_time is None:
            return 0
        late = float(stream.start_time * stream.time_base - picture.start_time * picture.time_base)
        return round(late * self.rate) if late > _LATE_SECONDS else 0

    def _seekable(self, start: int) -> bool:
        """Whether the place of a sample follows from its number."""
        codec = self._stream.codec_context.name
        # Packets of ADPCM begin elsewhere than their times say, or take up what the one before left.
        if self._format not in _EXACT or self._stream.time_base * self.rate != 1 or "adpcm" in codec:
            return False
        if start > (self._declared or math.inf) * self.rate:  # in another file joined to this one
            return False
        if self._format != "mp4":
            return codec.startswith(("pcm_", "flac"))
        times = np.array([entry.timestamp for entry in self._stream.index_entries])
        return len(times) > 2 and bool((np.diff(times[:-1]) == times[1] - times[0]).all())  # without a gap between packets

    def _seek(self, start: int) -> int:
        """Moves on to shortly before a sample; returns the number of the first sample that then comes."""
        origin = (self._first.pts if self._first else None) or 0
        for target in (start - round(_SEEK_MARGIN_SECONDS * self.rate), 0):
            with contextlib.suppress(*AvError):
                self._container.seek(origin + target, stream=self._stream, backward=True)
            self._decoding = Decoding(self._container, self._stream, self._path)
            self._frames = iter(self._decoding)
            self._first = next(self._frames, None)
            if self._first is not None and self._first.pts is not None and self._first.pts - origin <= start:
                return self._first.pts - origin
        raise _Unreadable(f"unreadable audio track (no way to {start / self.rate:g} s)")

    def _check_end(self, position: int, sought: bool) -> None:
        """Refuses a track that ended early or lost too much. Where encoders count their padding in different ways, a fraction of a second
        may be missing."""
        there = position / self.rate
        packets = None if sought else self._decoding.packets
        self._ended = check_complete(self._container, self._stream, self._path, packets, f"{there:.6g} s of sound")
        slack = 0.05 if self._format in _COUNTED else 0.5 + 0.01 * (self._declared or 0)
        if self._declared is None or not self._checked or there >= self._declared - slack:
            if self._declared and there <= self._declared + slack:  # what follows is no sound: a tag
                self._decoding.stopped = ""
            return
        # A copy that was broken off ends within a frame. Programs that cut a file keep the header of the whole.
        if (self._format in _COUNTED and not self._decoding.error) or (self._format == "mp3" and _holds_frame(self._decoding.last)):
            self._ended = f"{self._path}: its header states {self._declared:.6g} s of sound; the {there:.6g} s in it are whole and used"
            return
        ends = f"the audio ends after {there:.6g} s of {self._declared:.6g} s"
        if self._decoding.leading + self._decoding.lost > 1:  # not the last alone
            raise _Unreadable(f"damaged: {self._decoding.said('sound')}, {ends}")
        raise ClipError(f"{self._path}: truncated: {ends}; fetch it again")


def _mp3_seconds(path: PathLike, rate: int) -> float | None:
    """Length that an mp3 file states in the header of the Xing, LAME or Fraunhofer encoders, None without one. FFmpeg guesses it then."""
    with open_bytes(path) as file:
        head = file.read(10)
        # Behind a tag, whose size is in four groups of seven bits.
        file.seek(10 + sum((byte & 0x7F) << 7 * (3 - i) for i, byte in enumerate(head[6:10])) if head[:3] == b"ID3" else 0)
        data = file.read(2048)
    for mark, place in ((b"Xing", 8), (b"Info", 8), (b"VBRI", 14)):
        at = data.find(mark)
        if at >= 0 and (mark == b"VBRI" or (data[at + 7 : at + 8] > b"\0" and data[at + 7] & 1)):
            return int.from_bytes(data[at + place : at + place + 4], "big") * (1152 if rate >= 32_000 else 576) / rate
    return None


def _holds_frame(packet: Any) -> bool:
    """Whether the last packet of an mp3 file has all of its frame: FFmpeg's parser, given more bytes, makes it no longer."""
    frames = av.CodecContext.create("mp3", "r").parse(bytes(packet) + bytes(_LARGEST_FRAME))
    return not frames or frames[0].size <= packet.size


_TYPES = {"u8": "u1", "s16": "i2", "s32": "i4", "s64": "i8", "flt": "f4", "dbl": "f8"}
_SCALES = {"u8": 2.0**7, "s16": 2.0**15, "s32": 2.0**31, "s64": 2.0**63}


def _floats(frame: Any) -> np.ndarray:
    """(samples, channels) float32 in [-1, 1] of a decoded frame in any sample format."""
    channels, planar, kind = frame.layout.nb_channels, frame.format.is_planar, frame.format.name.removesuffix("p")
    # The planes one by one: PyAV counts those of a frame of eight or more wrongly (SIGSEGV in 18, ValueError in 19).
    count, planes = (frame.samples, channels) if planar else (frame.samples * channels, 1)
    data = np.empty((planes, count), _TYPES[kind])
    for i in range(planes):
        plane: Any = AudioPlane(frame, i)
        data[i] = np.frombuffer(plane, data.dtype, count)
    data = data.T if planar else data.reshape(-1, channels)
    if kind in _SCALES:  # 16 bits are exact in float32
        data = data.astype(np.float32 if data.itemsize < 4 else np.float64) - (128 if kind == "u8" else 0)
        data /= _SCALES[kind]
    return data.astype(np.float32, copy=False)
