"""Media files of kinds that `media_samples` does not make: other containers and codecs, cut, joined and damaged ones."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.stream
import numpy as np

from omni_jax.media.audio import read_waveform
from tests.media_samples import picture, tones


def write_video(
    path: Path,
    codec: str,
    frames: int,
    *,
    options: dict[str, str] | None = None,
    gop: int = 12,
    b_frames: int = 0,
    size: tuple[int, int] = (96, 64),
    fps: int = 24,
    pix_fmt: str = "yuv420p",
    times: list[int] | None = None,
    **container: Any,
) -> Path:
    """Writes numbered pictures; `times` are their times in milliseconds where the rate varies."""
    with av.open(path, "w", **container) as out:
        stream: Any = out.add_stream(codec, rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = gop, b_frames
        stream.options = {"threads": "1", **(options or {})}
        if times:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24")
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def write_audio(
    path: Path,
    codec: str,
    seconds: float,
    *,
    rate: int = 48_000,
    layout: str = "mono",
    channels: int = 1,
    sample_format: str = "fltp",
    samples: np.ndarray | None = None,
    bit_rate: int | None = None,
    options: dict[str, str] | None = None,
    **container: Any,
) -> Path:
    """Writes tones, or (N, channels) float32 `samples`, in a sample format of the encoder."""
    samples = tones(seconds, rate, channels) if samples is None else samples
    with av.open(path, "w", **container) as out:
        stream: Any = out.add_stream(codec, rate=rate, layout=layout, options=options or {})
        stream.codec_context.format = sample_format
        if bit_rate:
            stream.bit_rate = bit_rate
        for frame in audio_frames(samples, rate, layout, sample_format):
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def audio_frames(samples: np.ndarray, rate: int, layout: str, sample_format: str = "fltp") -> Iterator[av.AudioFrame]:
    """Yields (N, channels) float32 samples as frames of 1,024 in an encoder's sample format."""
    convert = av.AudioResampler(format=sample_format, layout=layout, rate=rate)
    for start in range(0, len(samples), 1024):
        block = np.ascontiguousarray(samples[start : start + 1024].reshape(1, -1))  # packed: PyAV itself has no more than eight planes
        frame = av.AudioFrame.from_ndarray(block, format="flt", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        yield from convert.resample(frame)


def copy_tracks(
    path: Path,
    *sources: tuple[Path, int],
    keep: Callable[[Any, int], bool] = lambda packet, number: True,
    change: Callable[[Any, int], Any] = lambda packet, number: packet,
    default: tuple[int, ...] | None = None,
    **container: Any,
) -> Path:
    """Writes tracks (file, number of its stream) into one file, packet by packet, without encoding.

    Args:
      keep: whether a packet, the so-many-th of its track, is written.
      change: what is written in its place.
      default: the tracks marked as default; None leaves it to the muxer.
    """
    opened = [av.open(source) for source, _ in sources]
    with av.open(path, "w", **container) as out:
        streams: list[Any] = [out.add_stream_from_template(file.streams[n]) for file, (_, n) in zip(opened, sources, strict=True)]
        for place, stream in enumerate(streams):
            if default is not None:
                stream.disposition = av.stream.Disposition.default if place in default else av.stream.Disposition(0)
        packets = []
        for place, (file, (_, n)) in enumerate(zip(opened, sources, strict=True)):
            for number, packet in enumerate(p for p in file.demux(file.streams[n]) if p.size):
                if keep(packet, number):
                    packets.append((float((packet.dts if packet.dts is not None else 0) * packet.time_base), place, change(packet, number)))
        for _, place, packet in sorted(packets, key=lambda entry: entry[0]):
            packet.stream = streams[place]
            out.mux(packet)
    for file in opened:
        file.close()
    return path


def edit_list(path: Path, target: Path, start: float, seconds: float | None = None) -> Path:
    """Changes the edit list of an mp4's first track: the clip begins `start` seconds later and lasts so long."""
    data = bytearray(path.read_bytes())
    with av.open(path) as container:
        base = container.streams[0].time_base
    assert base is not None
    at = data.index(b"elst")  # version and flags, number of entries, duration, media time
    if seconds is not None:
        data[at + 12 : at + 16] = struct.pack(">I", round(seconds * struct.unpack(">I", data[data.index(b"mvhd") + 16 :][:4])[0]))
    data[at + 16 : at + 20] = struct.pack(">i", struct.unpack(">i", data[at + 16 : at + 20])[0] + round(start / base))
    target.write_bytes(data)
    return target


def wav_bytes(kind: int, channels: int, rate: int, byte_rate: int, block: int, bits: int, data: bytes, extra: bytes = b"") -> bytes:
    """A WAV file of any format tag."""
    head = struct.pack("<HHIIHHH", kind, channels, rate, byte_rate, block, bits, len(extra)) + extra
    chunks = b"fmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def damage_packets(path: Path, target: Path, numbers: set[int], fill: bytes = b"\xff") -> Path:
    """Overwrites packets of the last track of a file."""
    data = bytearray(path.read_bytes())
    with av.open(path) as container:
        for number, packet in enumerate(p for p in container.demux(container.streams[-1]) if p.size):
            if number in numbers and packet.pos is not None:
                at = data.index(bytes(packet), packet.pos)  # Matroska gives the place of a group of packets
                data[at : at + packet.size] = fill * packet.size
    target.write_bytes(data)
    return target


def whole(path: Path, **options: Any) -> np.ndarray:
    got = read_waveform(path, seconds=0, pad=False, **options)
    assert not any("silence is used" in line for line in got.warnings)
    return got.samples


def tone(seconds: float, rate: int, pitch: float) -> np.ndarray:
    """(N, 1) float32."""
    return (0.4 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)).astype(np.float32)[:, None]


def mp3(path: Path, seconds: float, *, xing: bool = True, pitch: float = 440.0, **options: str) -> Path:
    muxer = {"write_xing": str(int(xing)), "id3v2_version": "3" if xing else "0"}
    return write_audio(
        path, "libmp3lame", seconds, sample_format="fltp", samples=tone(seconds, 48_000, pitch), options=options, container_options=muxer
    )
