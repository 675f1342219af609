"""What the packets of a video stream say about its frames, and decoding that enters the stream at a key frame.

Letters: n frames in the stream, K places where decoding can begin.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from omni_jax.media.parts import PathLike
from omni_jax.media.source import AvError, Decoding, nal_units, read_packets
from omni_jax.media.workers import goes_on

# Where a packet is a picture with a time of its own. Others hold fields, repeated or empty pictures, or leave times out (AVI, program
# streams, Ogg, GIF ...): their frames are known only once they are decoded.
_CONTAINERS = frozenset({"mp4", "matroska", "mpegts"})
_CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "libdav1d", "av1", "mpeg2video"})
_SEARCH_SECONDS = 1.0  # a transport stream has no table of its key frames: the search for one begins this long before it
_SEARCH_PACKETS = 1000  # and ends here
_LONG_STEP = 1.5  # times the usual one from frame to frame
# Packets of HEVC after which a sequence, or the stream, ends: such a NAL unit behind its start code or its size.
_SEQUENCE_ENDS = frozenset(mark + nal for mark in (b"\0\0\1", b"\0\0\2") for nal in (b"\x48\1", b"\x4a\1"))
_FIRST_FRAMES = 16  # frames that the first key frame may hold back: no codec refers further


@dataclasses.dataclass(frozen=True)
class PacketIndex:
    """Times of a stream, from its packets.

    Attributes:
      packets: number of packets with something in them.
      pts: (n,) int64, ascending, one per shown frame, in the stream's time base; zeros where some have no time.
      entries: (K,) int64, ascending times of the key frames that decoding can begin at.
      seek_times: (K, 2) int64, what to seek to for each of them, and where that misses it.
      margin: how many entries before a frame decoding begins early: 1 where a key frame alone need not restore the picture (open groups).
      exact: whether every packet is known to be a frame, so that their number is right and a frame is known by its time.
      leading: whether the first packets may be undecodable, so that the first frame must be decoded to know which it is.
    """

    packets: int
    pts: np.ndarray
    entries: np.ndarray
    seek_times: np.ndarray
    margin: int
    exact: bool
    leading: bool

    def entry(self, frame: int) -> int:
        """Returns the number of the entry that decoding begins at to reach a frame."""
        return max(0, int(np.searchsorted(self.entries, self.pts[frame], side="right")) - 1 - self.margin)

    def saves(self, entry: int, reached: int) -> bool:
        """Whether entering there decodes less than continuing from the frame that was reached."""
        return int(np.searchsorted(self.pts, self.entries[entry])) > reached + 1

    @functools.cached_property
    def behind_gaps(self) -> np.ndarray:
        """The times of the frames behind a long step, where packets may have been left out."""
        steps = np.diff(self.pts)
        return self.pts[1:][steps > _LONG_STEP * np.median(steps)] if len(steps) else steps


def read_index(container: Any, stream: Any, path: PathLike) -> PacketIndex:
    """Walks the packets without decoding them; leaves the container at its end. Raises ClipError for encrypted ones."""
    context = stream.codec_context
    kind = next((name for name in _CONTAINERS if name in container.format.name), "")
    exact = bool(kind) and context.name in _CODECS and (context.name != "mpeg2video" or kind == "mpegts")
    times, keys, seek_times = array.array("q"), array.array("q"), array.array("q")
    packets, margin, timed, ended = 0, 0, True, False
    leading = kind == "mpegts"
    before = key = None  # times of the last two key frames
    with contextlib.suppress(*AvError):  # a container that cannot be read to its end: `check_complete` says what is missing
        for packet in read_packets(container, stream, path):
            goes_on()
            if not packet.size:
                exact &= packet.dts is None and packet.pts is None  # the end; an empty packet elsewhere repeats a picture
                packets += packet.dts is not None
                continue
            if packet.is_corrupt:  # the file ends within it
                exact = False
                continue
            packets += 1
            if context.name == "hevc":
                exact &= not (packet.is_keyframe and len(keys) and _drops_leading(packet, context, ended))
                ended = bytes(packet)[-5:] in _SEQUENCE_ENDS
            time = packet.pts
            if time is None:
                exact, time, timed = False, packet.dts or 0, timed and packet.dts is not None
            if exact and packet.is_keyframe and (grade := _entry_grade(packet, context)):
                exact &= key is None or time > key
                before, key = key, time
                keys.append(time)
                seek_times.extend((time, packet.dts if kind == "mp4" and packet.dts is not None else time))
                margin = max(margin, grade - 1)
            elif key is None or time < key:  # leading pictures of an open group; anything earlier is another stream joined to this one
                leading |= before is None
                exact &= before is None or time > before
            if not packet.is_discard and not (exact and _is_hidden(packet, context.name)):
                times.append(time)
    pts = np.sort(np.frombuffer(times, np.int64)) * timed
    exact = exact and len(keys) > 0 and len(pts) > 0 and bool((np.diff(pts) > 0).all())
    back = int(_SEARCH_SECONDS / stream.time_base) if kind == "mpegts" else 0
    entries, sought = np.frombuffer(keys, np.int64), np.frombuffer(seek_times, np.int64).reshape(-1, 2) - back
    return PacketIndex(packets=packets, pts=pts, entries=entries, seek_times=sought, margin=margin, exact=exact, leading=leading)


def without_leading(index: PacketIndex, decoding: Decoding) -> PacketIndex | None:
    """Returns the index from the first frame on that the decoder shows; None where the packets behind it are not the next frames.

    Args:
      decoding: the frames of the track from the start of its file, of which a few are decoded.
    """
    shown = [frame.pts for frame in itertools.islice(decoding, _FIRST_FRAMES)]
    at = int(np.searchsorted(index.pts, shown[0])) if shown and None not in shown else len(index.pts)
    follow = index.pts[at:]
    if not shown or decoding.leading or decoding.lost or shown != follow[:_FIRST_FRAMES].tolist():
        return None
    return dataclasses.replace(index, pts=follow)


def shows_all(container: Any, stream: Any, index: PacketIndex) -> bool:
    """Whether the decoder shows every frame of the groups with a gap inside, in the order of their times; these groups are decoded.

    Decoders that reorder pictures may leave out or misplace those that miss what they depend on.
    """
    if stream.codec_context.name not in ("h264", "hevc", "mpeg2video"):
        return True
    behind = np.setdiff1d(index.behind_gaps, index.entries)
    bounds = np.append(index.entries, index.pts[-1] + 1)
    for group in np.unique(np.searchsorted(index.entries, behind, side="right")).tolist():
        first, last = np.searchsorted(index.pts, (bounds[max(0, group - 1)], bounds[group]))
        times = set(index.pts[first:last].tolist())
        shown = [frame.pts for frame in decode_from(container, stream, index, index.entry(int(first)), times)]
        if [time for time in shown if time in times] != sorted(times):
            return False
    return True


def decode_from(container: Any, stream: Any, index: PacketIndex, entry: int, times: set[int]) -> Iterator[Any]:
    """Yields the frames at `times`, and key frames, decoding from an entry on; others that no frame depends on are not decoded.

    Ends early, without all of the frames, where the stream cannot be entered there, a packet or picture does not decode, or packets are
    fields.
    """
    context, left = stream.codec_context, len(times)
    skips = context.name in ("h264", "mpeg2video") or (context.name == "hevc" and _has_one_layer(context.extradata))
    skips &= not len(index.behind_gaps)  # what is missing is made up from the pictures before, the skipped ones too
    sound_from = int(index.entries[min(entry + index.margin, len(index.entries) - 1)])
    try:
        for packet in _packets_from(container, stream, index, entry):
            goes_on()
            hit = packet.pts in times
            left -= hit
            context.skip_frame = "NONREF" if skips and not hit else "DEFAULT"
            frames = packet.decode()
            if not left and packet.size:
                frames += context.decode(None)  # those that the decoder still holds; the next seek resets it
            for frame in frames:
                if frame.interlaced_frame and context.name == "h264":
                    return
                if frame.is_corrupt and frame.pts >= sound_from:  # what is missing is made up from the pictures before
                    return
                if frame.pts in times or frame.key_frame:
                    yield frame
            if not left:
                return
    except (*AvError, IndexError):  # the second as in `read_packets`
        return
    finally:
        context.skip_frame = "DEFAULT"


def _packets_from(container: Any, stream: Any, index: PacketIndex, entry: int) -> Iterator[Any]:
    """Yields the packets of a track from an entry on; none where it is not found."""
    for time in dict.fromkeys(index.seek_times[entry].tolist()):
        container.seek(time, stream=stream, backward=True)
        packets = container.demux(stream)
        for packet in itertools.islice(packets, _SEARCH_PACKETS):
            if packet.is_keyframe and packet.pts == index.entries[entry]:
                yield packet
                yield from packets
                return


def _entry_grade(packet: Any, context: Any) -> int:
    """1 where decoding can begin at a key frame, 2 where that of one key frame earlier is safe, 0 where the flag is wrong."""
    if context.name != "h264":
        return 2 if context.name == "mpeg2video" else 1
    for kind, head in nal_units(packet, context):
        if kind == 5:  # a picture that resets the decoder
            return 1
        if kind == 1:  # another, which must be of intra slices: first macroblock 0, then slice type 7 or 2
            return 2 if head == 0x88 or head >> 4 == 0xB else 0
    return 0


def _drops_leading(packet: Any, context: Any, ended: bool) -> bool:
    """Whether pictures of HEVC that precede this key frame and depend on the group before are not shown. `ended`: it begins a sequence."""
    for kind, _ in nal_units(packet, context):
        ended |= kind in (36, 37)  # the end of a sequence or of the stream
        if kind < 32:  # a picture: one that breaks links, or else a clean one
            return kind in (16, 17, 18) or (ended and kind == 21)
    return False


def _has_one_layer(extradata: bytes | None) -> bool:
    """Whether HEVC has no temporal layers: pictures that none of their own layer need may be needed by the layers above."""
    return bool(extradata) and extradata[0] == 1 and len(extradata) > 22 and extradata[21] >> 3 & 7 == 1


def _is_hidden(packet: Any, codec: str) -> bool:
    """Whether a packet of VP8 or VP9 is there for prediction alone and never shown."""
    if codec == "vp8":
        return not bytes(packet)[0] >> 4 & 1
    if codec != "vp9":
        return False
    data = bytes(packet)
    if data[-1] & 0xE0 == 0xC0:  # several frames in one packet: one of them is shown
        return False
    bits = data[0] << (data[0] >> 4 & 3 == 3)  # profile 3 has one bit more before these
    return not bits >> 3 & 1 and not bits >> 1 & 1  # neither shows an earlier frame again nor is shown itself
