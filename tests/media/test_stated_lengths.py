"""The length of sound where a file's headers do not say it, or say another."""

from __future__ import annotations

import contextlib
import re
import struct
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from omni_jax.media.audio import read_waveform
from omni_jax.types import ClipError
from tests.media.containers import mp3, whole, write_audio
from tests.media_samples import write_sound

RATE = 16_000


@pytest.mark.parametrize(("more", "tag"), [(0, b""), (0, b"TAG" + bytes(125)), (100, b"")])
def test_mp3_whose_header_states_another_length(tmp_path: Path, more: int, tag: bytes) -> None:
    """Programs that cut at a frame keep the header of the whole; a copy that was broken off ends within a frame."""
    path = mp3(tmp_path / "a.mp3", 5.0)
    with av.open(path) as container:
        end = [(packet.pos or 0) + packet.size for packet in container.demux(audio=0) if packet.size][50]
    path.write_bytes(path.read_bytes()[: end + more] + tag)
    if more:
        with pytest.raises(ClipError, match=r"truncated: the audio ends after 1\.\d+ s of 5\.\d+ s; fetch it again"):
            read_waveform(path)
        return
    got = read_waveform(path, seconds=0, pad=False)
    assert abs(len(got.samples) - 51 * 1152 / 3) < 500
    (told,) = got.warnings
    assert re.search(r"its header states 5\.\d+ s of sound; the 1\.\d+ s in it are whole and used", told)


def test_the_length_of_wma_is_that_of_its_packets(tmp_path: Path) -> None:
    """Its header has the time of sending, which is no length: what is cut off shows in the size of the packets' object."""
    path = write_audio(tmp_path / "a.wma", "wmav2", 3.0, rate=44_100, bit_rate=64_000)
    before, data = whole(path), bytearray(path.read_bytes())
    at = data.index(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")) + 64  # the file's properties: how long to play, 100 ns
    data[at : at + 8] = (2 * int.from_bytes(data[at : at + 8], "little")).to_bytes(8, "little")
    path.write_bytes(data)
    assert np.array_equal(whole(path), before)
    path.write_bytes(data[:-4000])
    with pytest.raises(ClipError, match=r"truncated: .*; fetch it again"):
        whole(path)


@pytest.mark.parametrize("stated", [0, 5])
def test_flac_of_unknown_or_another_length(tmp_path: Path, stated: int) -> None:
    """`ffmpeg -t 2 -c copy` keeps the length of the whole file; a copy that was broken off ends within a frame."""
    path = write_audio(tmp_path / "a.flac", "flac", 2.0, rate=RATE, sample_format="s16")
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0  # STREAMINFO: 36 bits of the number of samples
    data[22:26] = (stated * RATE).to_bytes(4, "big")
    path.write_bytes(data)
    got = read_waveform(path, seconds=0, pad=False)
    assert len(got.samples) == 2 * RATE
    assert len(got.warnings) == bool(stated)
    path.write_bytes(data[:-100])
    with pytest.raises(ClipError, match="fetch it again") if stated else contextlib.nullcontext():
        read_waveform(path)


@pytest.mark.parametrize("sizes", ["riff too big", "zero", "all ones", "data unknown", "data too big", "data too big, the whole unknown"])
def test_wrong_sizes_in_wav(tmp_path: Path, sizes: str) -> None:
    data = bytearray(write_sound(tmp_path / "a.wav", 2.0).read_bytes())
    at = data.index(b"data") + 4
    riff, chunk = {
        "riff too big": (len(data) + 5000, None),
        "zero": (0, 0),
        "all ones": (2**32 - 1, 2**32 - 1),
        "data unknown": (0, 0x7FFFF000),
        "data too big": (len(data) - 8, len(data) + 5000),
        "data too big, the whole unknown": (2**32 - 1, 2 * len(data)),
    }[sizes]
    data[4:8] = struct.pack("<I", riff)
    if chunk is not None:
        data[at : at + 4] = struct.pack("<I", chunk)
    (tmp_path / "b.wav").write_bytes(data)
    got = read_waveform(tmp_path / "b.wav", seconds=0)
    assert np.array_equal(got.samples, whole(tmp_path / "a.wav"))
    told = "the sizes in its header contradict each other, and one is larger than the file; the 2 s of sound in it are used"
    assert got.warnings == ((f"{tmp_path / 'b.wav'}: {told}",) if "data too big" in sizes else ())


@pytest.mark.parametrize("name", ["a.caf", "a.rf64", "a.w64", "a.flac"])
def test_copies_that_were_broken_off(tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {"format": "wav", "container_options": {"rf64": "always"}} if name == "a.rf64" else {}
    codec = "flac" if name == "a.flac" else "pcm_s16le"
    path = write_audio(tmp_path / name, codec, 2.0, rate=RATE, sample_format="s16", **options)
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(ClipError, match=r"truncated: the \w+ ends .*after 1\.\d+ s of .*; fetch it again"):
        whole(path)


def test_a_tag_behind_wav(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.wav", 2.0)
    before = whole(path)
    path.write_bytes(path.read_bytes() + b"TAGa title of thirty characters".ljust(128))
    assert np.array_equal(whole(path), before)


def test_a_quiet_start_says_nothing_of_the_length(tmp_path: Path) -> None:
    """FFmpeg guesses 306 s from the small packets at the start of bare AAC."""
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, (9 * 44_100, 1)).astype(np.float32)
    samples = np.concatenate([np.zeros((3 * 44_100, 1), np.float32), noise])
    path = write_audio(tmp_path / "a.aac", "aac", 12.0, rate=44_100, samples=samples, bit_rate=128_000)
    assert abs(len(whole(path)) - 12 * RATE) < 0.1 * RATE
    assert len(whole(path, crop="center")) == len(whole(path))


def test_a_tag_before_and_after_mp3(tmp_path: Path) -> None:
    path = mp3(tmp_path / "a.mp3", 2.0)
    plain = len(whole(path))
    tag = b"ID3\x03\x00\x00" + bytes([0, 0, 8, 0]) + bytes(1024)
    path.write_bytes(tag + path.read_bytes() + b"TAG" + bytes(125))
    assert abs(len(whole(path)) - plain) <= 1


@pytest.mark.parametrize("quality", [{"b": "64000"}, {"q": "2"}])
def test_mp3_without_a_xing_header(tmp_path: Path, quality: dict[str, str]) -> None:
    path = mp3(tmp_path / "a.mp3", 5.0, xing=False, **quality)
    got = whole(path)
    assert abs(len(got) - 5.04 * RATE) < 500
    assert whole(path, timestamps=(2.0, 4.0)).std() == pytest.approx(got.std(), rel=0.05)


def test_a_tag_behind_wavpack(tmp_path: Path) -> None:
    """FFmpeg says that the file cannot be read on there."""
    path = write_audio(tmp_path / "a.wv", "wavpack", 2.0, rate=RATE, sample_format="s16p")
    before = whole(path)
    path.write_bytes(path.read_bytes() + b"APETAGEX".ljust(100, b"a") + b"TAG".ljust(128))
    got = read_waveform(path, seconds=0, pad=False)
    assert np.array_equal(got.samples, before) and not got.warnings


def test_a_damaged_file_is_not_called_truncated(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "a.tta", "tta", 4.0, rate=RATE, sample_format="s16")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + b"\xff" * (len(data) // 2))
    with pytest.raises(ClipError, match=r"damaged: \d+ of \d+ packets of the sound do not decode"):
        whole(path)
