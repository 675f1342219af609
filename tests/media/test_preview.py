"""Previews: small pictures and sounds that decode again, and parts that cannot be read named without an error."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from omni_jax.media.preview import FRAMES, LONGEST_HEIGHT, SAMPLE_RATE, SECONDS, STRIP_WIDTH, mp3, record_preview, strip
from omni_jax.types import Record
from tests.media_samples import write_clip
from tests.tolerances import assert_close


def length(sound: bytes) -> float:
    """Seconds of an encoded sound."""
    with av.open(io.BytesIO(sound), "r") as container:
        return sum(frame.samples / frame.sample_rate for frame in container.decode(audio=0))


def test_strip_shows_the_frames_side_by_side() -> None:
    frames = np.zeros((3, 240, 320, 3), np.uint8)
    frames[0, ..., 0], frames[1, ..., 1], frames[2, ..., 2] = 255, 255, 255
    picture = Image.open(io.BytesIO(strip(frames)))
    assert picture.format == "JPEG" and picture.size == (STRIP_WIDTH, 105)
    for i, colour in enumerate(np.eye(3)):
        middle = np.asarray(picture)[50, 70 + 140 * i] / 255
        assert int(np.argmax(middle)) == int(np.argmax(colour)) and middle.max() > 0.9 > 0.2 > np.sort(middle)[1]


def test_strip_keeps_small_and_tall_frames_whole() -> None:
    assert Image.open(io.BytesIO(strip(np.zeros((3, 20, 30, 3), np.uint8)))).size == (90, 20)
    width, height = Image.open(io.BytesIO(strip(np.zeros((3, 2000, 500, 3), np.uint8)))).size
    assert height == LONGEST_HEIGHT and width == 3 * 50


def test_mp3_plays_the_same_tone() -> None:
    time = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    data = mp3((0.5 * np.sin(2 * np.pi * 440 * time)).astype(np.float32))
    assert len(data) < 10_000
    with av.open(io.BytesIO(data), "r") as container:
        samples = np.concatenate([frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)])
        assert container.streams.audio[0].rate == SAMPLE_RATE
    spectrum = np.abs(np.fft.rfft(samples[4000:20000]))
    assert_close(np.argmax(spectrum) * SAMPLE_RATE / 16000, 440.0, "metric")


def test_clip_has_picture_and_sound(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", seconds=8.0, channels=2)
    preview = record_preview(Record("a", video=clip, audio=clip))
    assert preview.image is not None and preview.sound is not None and preview.problems == ()
    assert Image.open(io.BytesIO(preview.image)).size == (FRAMES * 96, 64)
    assert length(preview.sound) == pytest.approx(SECONDS, abs=0.2)
    part = record_preview(Record("a", video=clip, audio=clip, timestamps=(2.0, 4.5)))
    assert part.sound is not None and length(part.sound) == pytest.approx(2.5, abs=0.2)


def test_silent_film_has_a_picture_alone(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "silent.mp4", audio=False)
    preview = record_preview(Record("a", video=clip, audio=clip))
    assert preview.image is not None and preview.sound is None and preview.problems == ()


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all")
    preview = record_preview(Record("a", video=broken, audio=tmp_path / "none.wav"))
    assert preview.image is None and preview.sound is None
    assert len(preview.problems) == 2 and "broken.mp4" in preview.problems[0] and "none.wav" in preview.problems[1]
    assert record_preview(Record("a", text="only text")).problems == ()
