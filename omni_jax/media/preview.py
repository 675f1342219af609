"""A clip as a person sees and hears it in a page: a strip of small frames and a few seconds of low-rate sound, both encoded."""

from __future__ import annotations

import dataclasses
import io

import av
import numpy as np
from PIL import Image

from omni_jax.media.audio import read_waveform
from omni_jax.media.video import read_frames
from omni_jax.types import ClipError, Record

FRAMES = 3  # beside each other, from the start to the end
STRIP_WIDTH = 420  # pixels
LONGEST_HEIGHT = 200  # pixels; a tall picture is shown whole, and small
JPEG_QUALITY = 62
SECONDS = 6.0
SAMPLE_RATE = 16_000  # Hz, as read_waveform gives it
BIT_RATE = 24_000  # bits per second, MP3: 18 kB for SECONDS, playable everywhere


@dataclasses.dataclass(frozen=True)
class Preview:
    """Encoded bytes, or None where the record has no such part.

    Attributes:
      image: JPEG, a strip of FRAMES frames.
      sound: MP3, mono, at most SECONDS.
      problems: one line for each part that could not be read.
    """

    image: bytes | None = None
    sound: bytes | None = None
    problems: tuple[str, ...] = ()


def record_preview(record: Record) -> Preview:
    """Returns what can be shown of a record's media; a part that cannot be read is named among the problems."""
    image = sound = None
    problems = []
    if record.video is not None:
        try:
            image = strip(read_frames(record.video, FRAMES, record.timestamps).frames)
        except ClipError as error:
            problems.append(str(error))
    if record.audio is not None:
        try:
            wave = read_waveform(record.audio, seconds=SECONDS, pad=False, channels="mean", timestamps=record.timestamps)
            sound = mp3(wave.samples) if wave.samples.any() else None  # none for silence, which stands in for a track that is not there
        except ClipError as error:
            problems.append(str(error))
    return Preview(image, sound, tuple(dict.fromkeys(problems)))


def strip(frames: np.ndarray) -> bytes:
    """Returns (F, height, width, 3) uint8 frames side by side as JPEG, STRIP_WIDTH pixels wide or less."""
    count, height, width, _ = frames.shape
    scale = min(STRIP_WIDTH / count / width, LONGEST_HEIGHT / height, 1.0)
    size = max(1, int(width * scale)), max(1, int(height * scale))
    picture = Image.new("RGB", (size[0] * count, size[1]))
    for i, frame in enumerate(frames):
        picture.paste(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR), (i * size[0], 0))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return file.getvalue()


def mp3(samples: np.ndarray) -> bytes:
    """Returns (N,) float samples at SAMPLE_RATE as MP3."""
    file = io.BytesIO()
    values = (np.clip(samples, -1, 1) * 32767).astype(np.int16)
    with av.open(file, "w", format="mp3") as container:
        stream = container.add_stream("libmp3lame", rate=SAMPLE_RATE, layout="mono")
        stream.bit_rate = BIT_RATE
        frame = av.AudioFrame.from_ndarray(values[None], format="s16p", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()
