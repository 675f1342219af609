"""Opening a media file: what is wrong with it is said in one line, before any decoder sees it."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import av
import av.container
import av.error
import av.stream
import av.video.stream

from omni_jax.types import ClipError

AvError = (av.error.FFmpegError, ValueError, OSError)
"""What PyAV raises for a file it cannot read."""


PLAYLISTS = frozenset({"concat", "dash", "hls", "imf", "lavfi", "rtp", "rtsp", "sap", "sdp", "smoothstreaming"})
"""Formats of FFmpeg's that hold no media but name where they lie: other files, outside the media root too, or hosts."""


def is_remote(path: os.PathLike[str] | str) -> bool:
    """Whether a path names an object store (`gs://bucket/...`) and not a file of this machine."""
    return "://" in os.fspath(path)


def check_file(path: os.PathLike[str] | str) -> None:
    """Raises ClipError unless `path` is a file with something in it that may be read."""
    if is_remote(path):
        return  # the object store answers when the file is opened
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ClipError(f"{path}: file not found; check the manifest's path and --media-root") from None
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
def opened(path: os.PathLike[str] | str) -> Iterator[str | IO[bytes]]:
    """Yields what a reader library opens: the path itself, or a binary file for an object of a remote store."""
    if not is_remote(path):
        yield os.fspath(path)
        return
    from etils import epath  # reading gs:// alone needs it

    try:
        file = epath.Path(os.fspath(path)).open("rb")
    except Exception as error:  # every store has its own exceptions
        raise ClipError(f"{path}: cannot be opened ({reason(error)}); check the path and your access to it") from None
    with file:
        yield file


@contextlib.contextmanager
def open_container(path: os.PathLike[str] | str) -> Iterator[av.container.InputContainer]:
    """Yields an opened container.

    Raises:
      ClipError: when there is no such file, or it is not a media file that FFmpeg knows.
    """
    check_file(path)
    with opened(path) as file:
        try:
            # A playlist may name files of this machine, never a host.
            container = av.open(file, "r", metadata_errors="ignore", options={"protocol_whitelist": "file"})
        except AvError as error:
            raise ClipError(f"{path}: not a media file, or a damaged one ({reason(error)}); fetch it again or re-encode it") from None
        with container:
            if PLAYLISTS & set(container.format.name.split(",")):
                raise ClipError(f"{path}: a playlist ({container.format.name}), which names other files; give the media file itself")
            yield container


def moving_picture(container: av.container.InputContainer) -> av.video.stream.VideoStream | None:
    """Returns the first video stream that is not a cover picture, or None."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    return None


def is_incomplete(path: os.PathLike[str] | str) -> bool:
    """Whether a file ends before its outermost parts do, as a copy does that was broken off.

    Knows Matroska and WebM, MP4 and MOV, AVI and WAV, Ogg; False for everything else.
    """
    with contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(opened(path))
        if isinstance(file, str):
            file = stack.enter_context(Path(file).open("rb"))
        length = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(64)
        if head[:4] == b"\x1aE\xdf\xa3":
            return _matroska_end(head) > length
        if head[4:8] in (b"ftyp", b"styp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            return _boxes_end(file, length) > length
        if head[:4] == b"RIFF":
            return _riff_end(file, length) > length
        if head[:4] == b"OggS":
            return _ogg_end(file, length) > length
    return False


def reason(error: BaseException) -> str:
    """One line of an exception's message, without the path that our own messages already name."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())


def _matroska_end(head: bytes) -> int:
    """End of the Segment element in bytes; 0 where its size is left open, as in a live recording."""
    size, start = _vint(head, 4)
    segment = start + size
    if head[segment : segment + 4] != b"\x18S\x80g":
        return 0
    size, start = _vint(head, segment + 4)
    return 0 if size < 0 else start + size


def _vint(data: bytes, at: int) -> tuple[int, int]:
    """Reads an EBML size: (value, position after it); the value is -1 where all its bits are set (unknown) or the data end."""
    if at >= len(data) or not data[at]:
        return -1, at
    width = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + width], "big") & ((1 << 7 * width) - 1)
    return (-1 if value == (1 << 7 * width) - 1 else value), at + width


def _boxes_end(file: IO[bytes], length: int) -> int:
    """End of the last top-level MP4 box that starts within the file."""
    at = 0
    while at + 8 <= length:
        file.seek(at)
        head = file.read(16)
        size = int.from_bytes(head[:4], "big")
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        if size == 0:  # "to the end of the file"
            return length
        if size < 8:  # not a box: padding after the last one
            return at
        at += size
    return at


def _riff_end(file: IO[bytes], length: int) -> int:
    """End of the last RIFF list that starts within the file: a long AVI has several. A size that was never filled in counts as right."""
    at = 0
    while at + 12 <= length:
        file.seek(at)
        head = file.read(8)
        size = int.from_bytes(head[4:8], "little")
        if head[:4] != b"RIFF" or size == 0 or size >= 0x7FFF_F000:
            return length
        at += 8 + size
    return at if at > length + 1 else length  # the padding byte of an odd size is often left out


def _ogg_end(file: IO[bytes], length: int) -> int:
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
