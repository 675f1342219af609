"""Opening a media file and choosing its tracks: what is wrong with a file is one line, before any decoder sees it."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
from collections.abc import Iterator
from typing import Any

import av
import av.container
import av.error
import av.logging
import av.stream

from omni_jax.io.remote import is_remote
from omni_jax.media.ends import advice, is_incomplete
from omni_jax.media.parts import PathLike, check_part, open_bytes, reason
from omni_jax.media.workers import goes_on
from omni_jax.types import ClipError, FilePart

av.logging.set_level(None)  # FFmpeg writes to the terminal itself otherwise

AvError = (av.error.FFmpegError, ValueError, OSError)
"""What PyAV raises for a file it cannot read."""

LARGEST_LOSS = 0.1
"""Share of a track's packets that may fail to decode; a track that loses more is refused."""

PLAYLISTS = frozenset({"concat", "dash", "hls", "imf", "lavfi", "rtp", "rtsp", "sap", "sdp", "smoothstreaming"})
"""Formats of FFmpeg's that hold no media but name where they lie: other files, outside the media root too, or hosts."""


def check_file(path: PathLike) -> None:
    """Raises ClipError unless `path` is a file with something in it that may be read."""
    if isinstance(path, FilePart):
        check_file(path.file)
        return check_part(path)
    if is_remote(path):
        return  # the object store answers when the file is opened
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        more = " (with / for each backslash it is not there either)" if "\\" in os.fspath(path) else ""
        raise ClipError(f"{path}: file not found; check the manifest's path and --media-root{more}") from None
    except (OSError, ValueError) as error:
        raise ClipError(f"{path}: cannot be looked at ({reason(error)}); check the path and its permissions") from None
    if stat.S_ISDIR(found.st_mode):
        raise ClipError(f"{path}: is a directory; name a media file in it")
    if not stat.S_ISREG(found.st_mode):
        raise ClipError(f"{path}: is not a regular file; copy its content to one")
    if found.st_size == 0:
        raise ClipError(f"{path}: file is empty; fetch it again")
    if not os.access(path, os.R_OK):
        raise ClipError(f"{path}: may not be read; check its permissions")


@contextlib.contextmanager
def open_container(path: PathLike, by_header: bool = False) -> Iterator[av.container.InputContainer]:
    """Yields an opened container.

    Args:
      by_header: whether the size of pictures and their delay may be what the header of an MP4 file says. FFmpeg decodes the first key
        frame otherwise.

    Raises:
      ClipError: when there is no such file, or it is not a media file that FFmpeg knows.
    """
    check_file(path)
    here = not isinstance(path, FilePart) and not is_remote(path)
    # A name such as "take:2.mp4" would be a protocol to FFmpeg, and "%d.png" other files.
    with contextlib.nullcontext(os.path.join(os.curdir, path)) if here else open_bytes(path) as file:
        try:
            # A playlist may name files of this machine, never a host. Of WAV FFmpeg would search 5 MB for other codecs in disguise.
            options = {"protocol_whitelist": "file", "pattern_type": "none"}
            options |= {"probesize": "65536"} if os.fspath(path).lower().endswith(".wav") else {}
            options |= {"skip_frame": "all"} if by_header and _is_mp4(file) else {}
            container = av.open(file, "r", options=options, **_LENIENT)
        except AvError as error:
            raise ClipError(f"{path}: not a media file, or a damaged one ({reason(error)}); {advice(path)}") from None
        with container:
            if PLAYLISTS & set(container.format.name.split(",")):
                raise ClipError(f"{path}: a playlist ({container.format.name}), which names other files; give the media file itself")
            for context in (stream.codec_context for stream in container.streams.audio):
                # PyAV frees the list of channels of such a layout once too often, with each frame. Their order is used for nothing.
                if context is not None and "+" in (layout := context.layout).name:
                    context.layout = f"{layout.nb_channels} channels"
            yield container


def _is_mp4(file: Any) -> bool:
    with open(file, "rb") if isinstance(file, str) else contextlib.nullcontext(file) as opened:
        head = opened.read(8)
        opened.seek(0)
    return head[4:] == b"ftyp"


# Titles in a wrong character set are no reason to refuse a file. PyAV 19 has no such argument and never raises for them.
_LENIENT: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


def tracks(container: av.container.InputContainer, kind: str) -> list[Any]:
    """Returns the tracks of a kind, "video" or "audio"; cover pictures are none."""
    found: tuple[Any, ...] = getattr(container.streams, kind)
    return [stream for stream in found if not stream.disposition & av.stream.Disposition.attached_pic]


def choose_track(container: av.container.InputContainer, kind: str, number: int, path: PathLike) -> Any:
    """Returns a track of a kind ("video" or "audio") or None where the file has none.

    Args:
      number: its place among the tracks of its kind, from 0; -1 takes the one marked as default, and without a mark, or with several, the
        one with the most pixels or channels, as FFmpeg does.

    Raises:
      ClipError: when there is no track of that number.
    """
    found = tracks(container, kind)
    if number >= len(found) > 0:
        raise ClipError(f"{path}: {kind} track {number} is not there; the last is {len(found) - 1}, and {kind}_track=-1 the usual one")
    if number >= 0 or not found:
        return found[number] if found else None
    # MP4 has no such mark but "enabled", and whoever writes the file enables the first picture, whatever it is.
    unmarked = found[0] if kind == "video" and "mp4" in container.format.name else None

    def merit(stream: Any) -> tuple[bool, bool, bool, int]:
        context = stream.codec_context
        size = 0 if context is None else context.width * context.height if kind == "video" else context.layout.nb_channels
        return size > 0, stream.frames > 0, bool(stream.disposition & av.stream.Disposition.default) and stream is not unmarked, size

    return max(found, key=merit)


def read_packets(container: av.container.InputContainer, stream: Any, path: PathLike) -> Iterator[Any]:
    """Yields the packets of a track and an empty one for its end. Raises AvError where the container cannot be read on."""
    # PyAV 18 ends with an IndexError, after that empty packet, where other tracks began on the way.
    with contextlib.suppress(IndexError):
        for packet in container.demux(stream):
            if packet.is_keyframe and _has_sidedata(packet, "encryption_info"):  # decoders make pictures of noise of it
                raise ClipError(f"{path}: its {stream.type} is encrypted (DRM); decrypt the file, or leave it out")
            yield packet


_KIN = (
    {"mpeg1video", "mpeg2video"},
    {"mp1float", "mp2", "mp2float", "mp3", "mp3float"},
    {"ac3", "eac3"},
)  # one decoder reads the others' packets
_PLACES = 8  # of a transport stream where the codecs are looked up, evenly spaced, and once more before its end
_TABLES = 1 << 18  # bytes that hold the tables of a transport stream, which come ten times a second


def other_codec(container: av.container.InputContainer, stream: Any, path: PathLike) -> str:
    """Says to which codec a track of a transport stream changes, "" where it keeps its own.

    FFmpeg continues with the first codec, and may drop all that follows without an error.
    """
    if container.format.name != "mpegts" or is_remote(path):
        return ""
    own = stream.codec_context.name
    changed = os.stat(path.file if isinstance(path, FilePart) else path).st_mtime_ns
    for number, name in _codecs(path, container.size, changed):
        if number == stream.id and name != own and not any({name, own} <= kin for kin in _KIN):
            return f"the codec of the {stream.type} changes from {own} to {name}"
    return ""


@functools.lru_cache(maxsize=1)  # picture and sound ask one after the other
def _codecs(path: PathLike, size: int, changed: int) -> list[tuple[int, str]]:
    """Returns the number and the codec of the tracks that the tables of a transport stream name, in the order of the file."""
    found: dict[tuple[int, str], None] = {}
    options = {"analyzeduration": "1", "fpsprobesize": "0"}  # the tables alone say what is asked
    for start in (*(size * place // _PLACES for place in range(1, _PLACES)), max(0, size - _TABLES)):
        with contextlib.suppress(*AvError), open_bytes(path, start) as file, av.open(file, "r", "mpegts", options=options) as rest:
            # The tag is the kind of stream that the table names. Without one, or with 6 for anything, FFmpeg may have guessed.
            contexts = [(other.id, other.codec_context) for other in rest.streams if other.codec_context]
            found |= {(number, context.name): None for number, context in contexts if context.codec_tag.strip("\0\6")}
    return list(found)


class Decoding:
    """Frames of a track from the container's position on, through a chain of Ogg streams; what does not decode is counted, not raised.

    Attributes:
      packets: packets read whole.
      leading: those of them that do not decode before two others do, as where a copy begins inside a group of pictures or a frame.
      lost: those that do not decode after it.
      error: what the decoder, or the container, said last.
      stopped: why the container could not be read to its end, "" where it could.
      last: the last packet with something in it.
    """

    def __init__(self, container: av.container.InputContainer, stream: Any, path: PathLike) -> None:
        self._container, self._stream, self._path = container, stream, path
        self._whole = stream.type == "audio" and "mp4" in container.format.name
        self._place = 0  # of the last packet in the file, bytes
        self.last: Any = None
        self.packets = self.leading = self.lost = 0
        self.error = self.stopped = ""

    def __iter__(self) -> Iterator[Any]:
        begun = 0  # packets that decode one after the other: of a copy that begins inside a frame one may by chance
        for stream, packet in self._packets():
            try:
                frames = stream.decode(packet)
            except AvError as error:
                self.error = reason(error)
                if packet is None:
                    continue
                if _is_message(packet, stream.codec_context):
                    self.packets -= 1
                elif begun == 1:
                    self.leading, begun = self.leading + 1, 0
                else:
                    self.lost += 1
                continue
            if frames and begun < 2:
                begun, self.leading, self.lost = begun + 1, self.leading + self.lost, 0
            yield from frames

    def _packets(self) -> Iterator[tuple[Any, Any]]:
        yield from self._demux(self._container, self._stream, 0)
        # FFmpeg ends where the next stream of an Ogg chain has another layout or rate.
        while self.stopped and self._container.format.name == "ogg" and (start := _next_in_chain(self._path, self._place)):
            self.stopped = ""
            with open_bytes(self._path, start) as file, av.open(file, "r", "ogg") as rest:
                if found := tracks(rest, self._stream.type):
                    yield from self._demux(rest, found[0], start)

    def _demux(self, container: av.container.InputContainer, stream: Any, start: int) -> Iterator[tuple[Any, Any]]:
        # A container that cannot be read on has ended: `check_complete` says what is missing.
        try:
            for packet in read_packets(container, stream, self._path):
                goes_on()
                self.packets += not packet.is_corrupt and (packet.size > 0 or packet.dts is not None)
                if packet.size:  # an empty packet repeats a picture; the decoder would take it for the end
                    self.last, self._place = packet, start + (packet.pos or 0)
                    if self._whole and _has_sidedata(packet, "skip_samples"):
                        _keep_end(packet)
                    yield stream, packet
        except AvError as error:
            self.error = self.stopped = reason(error)
        yield stream, None  # the end: the decoder gives what it holds

    def refusal(self, what: str) -> str:
        """Says why the track is not used, "" where it may be: more than LARGEST_LOSS of the packets do not decode."""
        return f"damaged: {self.said(what)} ({self.error})" if self.lost > max(1, LARGEST_LOSS * self.packets) else ""

    def said(self, what: str) -> str:
        """Says how many packets do not decode, and where the container stops; "" where all do and it does not."""
        lost = self.leading + self.lost
        parts = [f"{lost} of {self.packets} packets of the {what} do not decode"] if lost else []
        parts += [f"the file cannot be read on after {self.packets} packets of the {what} ({self.stopped})"] if self.stopped else []
        return ", ".join(parts)


_START_CODE = b"\0\0\1"


def nal_units(packet: Any, context: Any) -> Iterator[tuple[int, int]]:
    """Yields the type and the second byte of each NAL unit of an H.264 or HEVC packet."""
    data, extradata, hevc = bytes(packet), context.extradata, context.name == "hevc"
    sized = bool(extradata) and extradata[0] == 1  # each is behind its size; else behind a start code
    width = extradata[21 if hevc else 4] % 4 + 1 if sized else len(_START_CODE)
    at = 0 if sized else data.find(_START_CODE)
    while 0 <= at < len(data) - width - 1:
        unit = at + width
        yield data[unit] >> 1 & 0x3F if hevc else data[unit] & 0x1F, data[unit + 1]
        at = unit + int.from_bytes(data[at:unit], "big") if sized else data.find(_START_CODE, unit)


def _is_message(packet: Any, context: Any) -> bool:
    """Whether a packet of H.264 or HEVC holds no picture but what surrounds one, which FFmpeg may give in packets of its own and refuse."""
    if context.name not in ("h264", "hevc"):
        return False
    kinds = {kind for kind, _ in nal_units(packet, context)}
    return bool(kinds) and kinds <= set(range(32, 41) if context.name == "hevc" else range(6, 13))


def _has_sidedata(packet: Any, kind: str) -> bool:
    return next(packet.iter_sidedata(), None) is not None and packet.has_sidedata(kind)  # the first takes a tenth of the second's time


def _keep_end(packet: Any) -> None:
    """Keeps the samples at the end of a packet. FFmpeg 9 cuts the last packet of a sound track in MP4 to its duration, FFmpeg 8 and the
    reference do not: the same file must give the same samples with both."""
    skipped = packet.get_sidedata("skip_samples")  # samples to skip at the start and at the end, 4 bytes each, and two reasons
    data = bytes(skipped)
    skipped.update(data[:4] + bytes(4) + data[8:])
    packet.set_sidedata(skipped)


def check_complete(container: av.container.InputContainer, stream: Any, path: PathLike, packets: int | None, shown: str) -> str:
    """Returns a warning, or "", for a file that was read to its end.

    Args:
      packets: packets of the track that were read; None where the reading began further on.
      shown: what was read, for the message: "30 frames" or "2.5 s of sound".

    Raises:
      ClipError: when the file ends before the container says so, as a copy does that was broken off.
    """
    if "mp4" in container.format.name and stream.frames and packets is not None:
        declared = len(stream.index_entries)
        if packets < declared:
            what = "frames" if stream.type == "video" else "packets"
            raise ClipError(f"{path}: truncated: {packets} of the {declared} {what} that the container declares are there; fetch it again")
    elif incomplete := is_incomplete(path):
        raise ClipError(f"{path}: truncated: the file ends before the container does, after {shown}; fetch it again")
    elif incomplete is None:
        return f"{path}: the sizes in its header contradict each other, and one is larger than the file; the {shown} in it are used"
    return ""


def _next_in_chain(path: PathLike, place: int) -> int:
    """Returns where the next stream of a chain of Ogg streams begins after a page of the one before, 0 where none follows; bytes."""
    if is_remote(path):
        return 0
    begun = False  # of the pages that begin streams those of the stream itself are passed over
    with open_bytes(path, place) as file:
        while len(head := file.read(27)) == 27 and head[:4] == b"OggS":
            if head[5] & 2 and begun:
                return place
            begun |= not head[5] & 2
            size = sum(file.read(head[26]))
            place += 27 + head[26] + size
            file.seek(size, os.SEEK_CUR)
    return 0
