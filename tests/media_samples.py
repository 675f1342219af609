"""Small media files made on the spot, the same bytes every time: moving shapes over a gradient, tones that differ by channel.

`frame_number` reads back which frame of a clip a picture is, so that tests can tell frames apart after lossy coding.
"""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile

# Codecs by container: (video, audio).
CODECS = {
    ".mp4": ("libx264", "aac"),
    ".mov": ("libx264", "aac"),
    ".m4v": ("libx264", "aac"),
    ".mkv": ("libx264", "aac"),
    ".webm": ("libvpx-vp9", "libopus"),
    ".avi": ("mpeg4", "libmp3lame"),
    ".m4a": (None, "aac"),
}
_BITS = 12  # frames are numbered by a row of black and white squares


def picture(number: int, width: int, height: int, seed: int = 0) -> np.ndarray:
    """Returns frame `number` of a clip: (height, width, 3) uint8. Its top eighth spells the number in squares."""
    rng = np.random.default_rng(seed)
    color, speed, phase = rng.integers(60, 255, 3), rng.uniform(1.0, 3.0), rng.uniform(0.0, 6.0)
    y, x = np.mgrid[0:height, 0:width]
    frame = np.stack([40 + 60 * x / width, 40 + 60 * y / height, np.full((height, width), 60.0)], axis=-1)
    center_x = width * (0.5 + 0.35 * np.sin(0.1 * speed * number + phase))
    disc = (x - center_x) ** 2 + (y - 0.6 * height) ** 2 < (height / 6) ** 2
    frame[disc] = color
    for bit in range(_BITS):
        left, right = bit * width // _BITS, (bit + 1) * width // _BITS
        frame[: height // 8, left:right] = 235 if number >> bit & 1 else 20
    return frame.astype(np.uint8)


def frame_number(frame: np.ndarray) -> int:
    """Returns the number that `picture` spelled on a frame."""
    height, width = frame.shape[:2]
    row = frame[height // 16, :, :].mean(axis=-1)
    return sum(int(row[int((bit + 0.5) * width / _BITS)] > 128) << bit for bit in range(_BITS))


def tones(seconds: float, sample_rate: int, channels: int, seed: int = 0) -> np.ndarray:
    """Returns (samples, channels) float32: a rising tone, another pitch in every channel, peak 0.5."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    pitches = rng.uniform(200.0, 900.0, channels)
    waves = [0.4 * np.sin(2 * np.pi * (pitch + 40 * time) * time) + 0.1 * np.sin(2 * np.pi * 3 * pitch * time) for pitch in pitches]
    return np.stack(waves, axis=-1).astype(np.float32)


def write_clip(
    path: Path | str,
    seconds: float = 1.0,
    fps: int = 10,
    width: int = 96,
    height: int = 64,
    sample_rate: int = 16_000,
    channels: int = 1,
    seed: int = 0,
    *,
    audio: bool = True,
    audio_seconds: float | None = None,
    gop: int = 12,
    video_codec: str | None = None,
    audio_codec: str | None = None,
    faststart: bool = False,
    video_options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Writes a clip of round(seconds * fps) frames and returns its path; the container and codecs follow the suffix.

    Args:
      audio: whether there is an audio track.
      audio_seconds: its length; default that of the video.
      gop: frames between key frames.
      faststart: whether an mp4's index stands before its data.
      video_options, container_options: options of the encoder and of the muxer.
    """
    path = Path(path)
    video_default, audio_default = CODECS[path.suffix]
    options = {"movflags": "faststart"} if faststart else {}
    with av.open(path, "w", options={"fflags": "bitexact", **options, **(container_options or {})}) as container:
        sound: Any = None
        video: Any = container.add_stream(video_codec or video_default, rate=Fraction(fps)) if video_codec or video_default else None
        if video is not None:
            video.width, video.height, video.pix_fmt = width, height, "yuv420p"
            video.gop_size = gop
            video.options = {"threads": "1", **_speed(video.codec_context.name), **(video_options or {})}
        if audio:
            layout = {1: "mono", 2: "stereo", 6: "5.1"}[channels]
            sound = container.add_stream(audio_codec or audio_default, rate=sample_rate, layout=layout)
        frames = (
            av.VideoFrame.from_ndarray(picture(i, width, height, seed), format="rgb24") for i in range(round(seconds * fps) if video else 0)
        )
        samples = tones(audio_seconds if audio_seconds is not None else seconds, sample_rate, channels, seed) if audio else None
        position = 0
        # Interleaved second by second, as a muxer wants it; the last round takes whatever is left.
        for second in itertools.count(1):
            for frame in itertools.islice(frames, fps):
                assert video is not None
                container.mux(video.encode(frame))
            end = second * sample_rate
            if sound is not None and samples is not None and position < len(samples):
                block = np.ascontiguousarray(samples[position:end].T)
                piece = av.AudioFrame.from_ndarray(block, format="fltp", layout=sound.layout.name)
                piece.sample_rate, piece.pts, piece.time_base = sample_rate, position, Fraction(1, sample_rate)
                container.mux(sound.encode(piece))
                position = min(end, len(samples))
            if second >= max(seconds, len(samples) / sample_rate if samples is not None else 0.0):
                break
        for stream in (video, sound):
            if stream is not None:
                container.mux(stream.encode(None))
    return path


def write_sound(
    path: Path | str, seconds: float = 1.0, sample_rate: int = 16_000, channels: int = 1, seed: int = 0, **options: Any
) -> Path:
    """Writes an audio file in the format of its suffix (wav, flac, ogg, mp3, m4a) and returns its path."""
    path = Path(path)
    if path.suffix == ".m4a":
        return write_clip(path, seconds, sample_rate=sample_rate, channels=channels, seed=seed)
    soundfile.write(path, tones(seconds, sample_rate, channels, seed), sample_rate, **options)
    return path


def cut_file(source: Path, target: Path, share: float) -> Path:
    """Writes the first `share` of a file's bytes, as a copy that was broken off, and returns the new path."""
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target


def _speed(codec: str) -> dict[str, str]:
    return {
        "libx264": {"preset": "ultrafast", "bf": "2"},
        "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
        "libvpx": {"deadline": "realtime", "cpu-used": "8"},
    }.get(codec, {})
