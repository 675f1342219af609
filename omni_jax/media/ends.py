"""Whether a file ends before its container does, by the sizes in its headers."""

from __future__ import annotations

import os
import re
from typing import Any

from omni_jax.io.messages import stands_for
from omni_jax.media.parts import PathLike, open_bytes


def is_incomplete(path: PathLike) -> bool | None:
    """Whether a file ends before its parts do; None where it may, as its sizes contradict each other.

    Knows Matroska and WebM, MP4 and MOV, AVI, WAV, RF64, W64 and AIFF, CAF, Ogg, ASF; False for everything else.
    """
    with open_bytes(path) as file:
        length = file.seek(0, os.SEEK_END)
        end = _stated_end(file, length)
    return None if end is None else end > length


def _stated_end(file: Any, length: int) -> int | None:
    """Where a file ends by the sizes in its headers, in bytes; 0 where these say nothing, None where they contradict each other."""
    file.seek(0)
    head = file.read(64)
    if head[:4] == b"\x1aE\xdf\xa3":
        return _matroska_end(head)
    if head[4:8] in (b"ftyp", b"styp", b"moov", b"mdat", b"wide", b"free", b"skip") or head[:4] == b"caff":
        return _boxes_end(file, length, caf=head[:4] == b"caff")
    if head[:4] in (b"RF64", b"BW64") and head[12:16] == b"ds64":  # the sizes of the whole and of the samples
        return min(int.from_bytes(head[20:28], "little"), int.from_bytes(head[28:36], "little"))
    if head[:4] in (b"RIFF", b"FORM"):
        return _chunks_end(file, length, "little" if head[:4] == b"RIFF" else "big")
    if head[:4] == b"riff":  # W64
        return int.from_bytes(head[16:24], "little")
    if head[:4] == b"OggS":
        return _ogg_end(file, length)
    if head[:4] == b"\x30\x26\xb2\x75":  # ASF: a header, whose size some writers of tags leave wrong, and the object of the packets
        start = int.from_bytes(head[16:24], "little")
        file.seek(min(start, length))
        data = file.read(24)
        return start + int.from_bytes(data[16:], "little") if data[:4] == b"\x36\x26\xb2\x75" else start
    return 0


def advice(path: PathLike) -> str:
    """Says what to do about a file that FFmpeg does not know."""
    with open_bytes(path) as file:
        head = file.read(64)
    if said := stands_for(head):
        return f"it {said}"
    if head[4:8] in (b"styp", b"sidx", b"emsg", b"moof"):
        return "it is a segment of a stream: put the initialization segment before it (cat init.mp4 part.m4s > clip.mp4)"
    return "fetch it again" if is_incomplete(path) else "correct the path, or re-encode it"


def _matroska_end(head: bytes) -> int:
    """End of the Segment element in bytes; 0 where its size is left open, as in a live recording."""
    found = re.search(rb"\x18S\x80g([^\0].{0,7})", head, re.DOTALL)
    if found is None:
        return 0
    width = 9 - found[1][0].bit_length()  # bytes of the size, which begins with as many bits, the last of them set
    largest = (1 << 7 * width) - 1
    size = int.from_bytes(found[1][:width], "big") & largest
    return found.start(1) + width + size if size < largest else 0


def _boxes_end(file: Any, length: int, caf: bool) -> int:
    """End of the last top-level MP4 box, or CAF chunk, that starts within the file."""
    at = 8 if caf else 0
    while at + 8 <= length:
        file.seek(at)
        head = file.read(16)
        size = int.from_bytes(head[:4], "big")
        if caf:
            size = 12 + int.from_bytes(head[4:12], "big", signed=True) if head[4:5] < b"\x80" else 0
        elif size == 1:
            size = int.from_bytes(head[8:16], "big")
        if size == 0:  # "to the end of the file"
            return length
        if size < 8:  # not a box: padding after the last one
            return at
        at += size
    return at


_CHUNKS = frozenset({b"data", b"SSND", b"LIST", b"idx1"})
_UNFILLED = 0x7FFF_F000  # bytes: what writers to a pipe leave as a size is above


def _chunks_end(file: Any, length: int, order: Any) -> int | None:
    """End of the last chunk that starts within a RIFF or FORM file, or within one of the several lists of a long AVI.

    Writers leave the size of the whole list wrong, and that of a chunk unfilled, which counts as right. None where the samples of a sound
    file are more than both the file and the list: a copy that was broken off has the two sizes as they were.
    """
    at = whole = 0
    while at + 8 <= length:
        file.seek(at)
        head = file.read(8)
        size = int.from_bytes(head[4:8], order)
        if head[:4] in (b"RIFF", b"FORM"):
            whole = at + 8 + size if size < _UNFILLED else 0
            at += 12
            continue
        # Behind the last chunk there may be anything, a tag of another format for one.
        if size == 0 or size >= _UNFILLED or (head[:4] not in _CHUNKS and at + 8 + size > length):
            return length
        if head[:4] in (b"data", b"SSND") and at + 8 + size > max(length, whole):
            return None
        at += 8 + size + size % 2
    return at if at > length + 1 else length  # the padding byte of an odd size is often left out


def _ogg_end(file: Any, length: int) -> int:
    """End of the last page that starts within the file."""
    start = max(0, length - (1 << 17))  # a page has at most 65,307 bytes
    file.seek(start)
    tail = file.read()
    page = tail.rfind(b"OggS\0")
    segments = tail[page + 26 : page + 27]
    if page < 0 or not segments:
        return length + 1
    table = tail[page + 27 : page + 27 + segments[0]]
    return start + page + 27 + segments[0] + sum(table)
