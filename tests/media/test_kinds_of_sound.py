"""Sound as other people store it: every sample that FFmpeg gives, in its place, and no process killed."""

from __future__ import annotations

import re
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr
from av.codec.codec import Codec, UnknownCodecError

from omni_jax.media import source
from omni_jax.media.audio import read_waveform
from omni_jax.types import ClipError, FilePart
from tests.media.containers import copy_tracks, damage_packets, mp3, tone, wav_bytes, whole, write_audio, write_video
from tests.media_samples import tones, write_clip

RATE = 16_000


def at_16k(samples: np.ndarray, rate: int) -> np.ndarray:
    return soxr.resample(samples, rate, RATE, quality="HQ")


def pitch(samples: np.ndarray) -> float:
    """The strongest frequency, Hz."""
    return float(np.argmax(np.abs(np.fft.rfft(samples * np.hanning(len(samples))))) * RATE / len(samples))


# ---------------------------------------------------------------------------------------------------------------- sample formats


@pytest.mark.parametrize(
    ("codec", "sample_format", "suffix", "layout", "channels"),
    [
        ("aac", "fltp", ".m4a", "7.1", 8),
        ("libopus", "flt", ".webm", "7.1", 8),
        ("wavpack", "fltp", ".wv", "7.1", 8),
        ("wavpack", "s16p", ".wv", "7.1.4", 12),
        ("wavpack", "s32p", ".wv", "hexadecagonal", 16),
        ("wavpack", "s16p", ".wv", "22.2", 24),
        ("pcm_f32le", "flt", ".mka", "22.2", 24),
    ],
)
def test_eight_and_more_channels(tmp_path: Path, codec: str, sample_format: str, suffix: str, layout: str, channels: int) -> None:
    """PyAV reads past the planes of such frames and ends the process."""
    samples = np.concatenate([tone(1.0, 48_000, 300 + 100 * i) for i in range(channels)], axis=1)
    path = write_audio(
        tmp_path / f"sound{suffix}", codec, 1.0, layout=layout, channels=channels, sample_format=sample_format, samples=samples
    )
    got = whole(path)
    assert abs(len(got) - RATE) <= 1024
    assert pitch(got[1000:15_000]) == pytest.approx(300, abs=3)
    assert whole(path, channels="mean")[1000:15_000].std() < 0.3


@pytest.mark.parametrize(
    ("codec", "sample_format", "error"),
    [
        ("pcm_u8", "u8", 2**-7),
        ("pcm_s24le", "s32", 2**-23),
        ("pcm_s32le", "s32", 2**-24),
        ("pcm_s64le", "s64", 2**-24),
        ("pcm_f32le", "flt", 0.0),
        ("pcm_f64le", "dbl", 0.0),
        ("flac", "s32", 2**-23),
        ("alac", "s32p", 2**-23),
    ],
)
def test_sample_formats(tmp_path: Path, codec: str, sample_format: str, error: float) -> None:
    path = write_audio(
        tmp_path / ("sound.nut" if "64" in codec else "sound.mkv"),
        codec,
        1.0,
        rate=RATE,
        layout="stereo",
        channels=2,
        sample_format=sample_format,
    )
    assert np.abs(whole(path) - tones(1.0, RATE, 2)[:, 0]).max() <= error


@pytest.mark.parametrize(
    ("name", "codec", "sample_format", "options"),
    [
        ("a.wav", "pcm_s16le", "s16", {}),
        ("a.wav", "pcm_s24le", "s32", {}),
        ("a.wav", "pcm_f32le", "flt", {}),
        ("a.rf64", "pcm_s16le", "s16", {"format": "wav", "container_options": {"rf64": "always"}}),
        ("a.w64", "pcm_s16le", "s16", {}),
        ("a.aiff", "pcm_s16be", "s16", {}),
        ("a.au", "pcm_s16be", "s16", {}),
        ("a.caf", "pcm_s16be", "s16", {}),
        ("a.flac", "flac", "s16", {}),
        ("a.tta", "tta", "s16", {}),
        ("a.wv", "wavpack", "s16p", {}),
    ],
)
def test_files_without_loss(tmp_path: Path, name: str, codec: str, sample_format: str, options: dict[str, Any]) -> None:
    want = tones(1.5, RATE, 1)[:, 0]
    got = whole(write_audio(tmp_path / name, codec, 1.5, rate=RATE, sample_format=sample_format, **options))
    assert len(got) == len(want)
    assert np.abs(got - want).max() <= 2**-15


def _writes(codec: str) -> bool:
    try:
        Codec(codec, "w")
    except UnknownCodecError:
        return False
    return True


AMR = [("a.amr", "libopencore_amrnb", "s16", 8_000)] if _writes("libopencore_amrnb") else []  # PyAV 19's wheels read AMR alone


@pytest.mark.costly
@pytest.mark.parametrize(
    ("name", "codec", "sample_format", "rate"),
    [
        ("a.aac", "aac", "fltp", 48_000),
        ("a.ac3", "ac3", "fltp", 48_000),
        ("a.mp2", "mp2", "s16", 48_000),
        ("a.mp3", "libmp3lame", "fltp", 44_100),
        ("a.opus", "libopus", "flt", 48_000),
        ("a.wma", "wmav2", "fltp", 44_100),
        *AMR,
        ("a.mpg", "mp2", "s16", 48_000),
        ("a.ts", "aac", "fltp", 48_000),
        ("a.webm", "libopus", "flt", 48_000),
        ("a.wav", "adpcm_ima_wav", "s16p", 44_100),
        ("b.wav", "adpcm_ms", "s16", 44_100),
        ("c.wav", "pcm_alaw", "s16", 44_100),
        ("a.mov", "adpcm_ima_qt", "s16p", 44_100),
    ],
)
def test_far_samples_are_those_of_reading_through(tmp_path: Path, name: str, codec: str, sample_format: str, rate: int) -> None:
    """Sought or not: the samples at a time are the same as in the whole track."""
    path = write_audio(
        tmp_path / name,
        codec,
        36.0,
        rate=rate,
        sample_format=sample_format,
        bit_rate={"libopencore_amrnb": 12_200, "wmav2": 64_000}.get(codec),
    )
    got, far = whole(path), whole(path, timestamps=(33.0, 34.0))
    assert abs(len(got) - 36 * RATE) < 0.2 * RATE
    assert np.abs(far[100:-100] - got[33 * RATE + 100 : 34 * RATE - 100]).max() < 2e-3


# ------------------------------------------------------------------------------------------------------------------ joined files


def test_mp3_inside_wav(tmp_path: Path) -> None:
    plain = mp3(tmp_path / "a.mp3", 3.0, xing=False, b="64000")
    with_extra = wav_bytes(0x55, 1, 48_000, 8000, 1, 0, plain.read_bytes(), struct.pack("<HIHHH", 1, 2, 192, 1, 1393))
    (tmp_path / "a.wav").write_bytes(with_extra)
    assert abs(len(whole(tmp_path / "a.wav")) - len(whole(plain))) <= 1


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp3", "libmp3lame"), ("a.ogg", "libopus"), ("a.opus", "libopus"), ("a.flac", "flac"), ("b.ogg", "flac")]
)
def test_joined_and_chained_files(tmp_path: Path, name: str, codec: str) -> None:
    sample_format = {"flac": "s16", "libopus": "flt"}.get(codec, "fltp")
    parts = []
    for i, pitch_ in enumerate((440.0, 1320.0)):
        part = write_audio(tmp_path / f"{i}{name}", codec, 3.0, sample_format=sample_format, samples=tone(3.0, 48_000, pitch_))
        parts.append(part.read_bytes())
    (tmp_path / name).write_bytes(b"".join(parts))
    got = whole(tmp_path / name)
    assert abs(len(got) - 6 * RATE) < 0.1 * RATE
    assert pitch(got[RATE : 2 * RATE]) == pytest.approx(440, abs=2)
    assert pitch(got[4 * RATE : 5 * RATE]) == pytest.approx(1320, abs=2)


def test_a_part_in_the_second_of_two_joined_files(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "a.flac", "flac", 35.0, rate=8000, sample_format="s16")
    once = whole(path, timestamps=(32.0, 33.0))
    path.write_bytes(path.read_bytes() * 2)
    assert np.abs(whole(path, timestamps=(67.0, 68.0)) - once).max() < 1e-3


@pytest.mark.parametrize(("name", "codec", "sample_format"), [("a.opus", "libopus", "flt"), ("b.ogg", "flac", "s16")])
def test_chains_of_other_layouts_and_rates(tmp_path: Path, name: str, codec: str, sample_format: str) -> None:
    """FFmpeg's reader of Ogg ends where the layout or the rate changes."""
    parts = []
    for i, (layout, rate) in enumerate((("stereo", 48_000), ("stereo", 48_000), ("mono", 24_000), ("stereo", 48_000))):
        channels = 2 if layout == "stereo" else 1
        samples = np.tile(tone(2.0, rate, 440.0 * (i + 1)), channels)
        part = write_audio(
            tmp_path / f"{i}{name}", codec, 2.0, rate=rate, layout=layout, channels=channels, sample_format=sample_format, samples=samples
        )
        parts.append(part.read_bytes())
    (tmp_path / name).write_bytes(b"".join(parts))
    got = read_waveform(tmp_path / name, seconds=0)
    assert got.warnings == () and abs(len(got.samples) - 8 * RATE) < 0.1 * RATE
    for i in range(4):
        assert pitch(got.samples[int((2 * i + 0.5) * RATE) : int((2 * i + 1.5) * RATE)]) == pytest.approx(440 * (i + 1), abs=2)
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(tmp_path / name, name)
    part = FilePart(tmp_path / "x.tar", name, 512, (tmp_path / name).stat().st_size)
    assert np.array_equal(read_waveform(part, seconds=0).samples, got.samples), "a chain inside a tar ends with its member"


def test_a_file_that_cannot_be_read_on_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_audio(tmp_path / "0.ogg", "libopus", 2.0, layout="stereo", channels=2, sample_format="flt")
    second = write_audio(tmp_path / "1.ogg", "libopus", 2.0, sample_format="flt")
    (tmp_path / "a.ogg").write_bytes(first.read_bytes() + second.read_bytes())
    monkeypatch.setattr(source, "_next_in_chain", lambda path, place: 0)
    (told,) = read_waveform(tmp_path / "a.ogg", seconds=0).warnings
    assert re.search(r"a\.ogg: the file cannot be read on after \d+ packets of the sound \(.*\); what is before is used", told)


def test_gsm(tmp_path: Path) -> None:
    blocks = np.random.default_rng(0).integers(0, 256, (50, 65), np.uint8)
    (tmp_path / "a.wav").write_bytes(wav_bytes(0x31, 1, 8000, 1625, 65, 0, blocks.tobytes(), struct.pack("<H", 320)))
    assert len(whole(tmp_path / "a.wav")) == 50 * 320 * 2


# ----------------------------------------------------------------------------------------------------------- damaged and changed


@pytest.mark.parametrize("name", ["a.m4a", "a.mka"])
def test_packets_that_do_not_decode_leave_a_gap_of_their_length(tmp_path: Path, name: str) -> None:
    path = write_audio(tmp_path / name, "aac", 3.0, samples=tone(3.0, 48_000, 440))
    before = whole(path)
    got = read_waveform(damage_packets(path, tmp_path / f"damaged-{name}", {70, 71}), seconds=0)
    assert got.warnings == (f"{tmp_path / f'damaged-{name}'}: 2 of 142 packets of the sound do not decode; the others are used",)
    assert abs(len(got.samples) - len(before)) <= (1 if name == "a.m4a" else 20)  # Matroska counts milliseconds
    late = slice(2 * RATE, 2 * RATE + 8000)
    shift = min(range(-20, 21), key=lambda k: np.abs(got.samples[2 * RATE + k : 2 * RATE + k + 8000] - before[late]).max())
    assert np.abs(got.samples[2 * RATE + shift : 2 * RATE + shift + 8000] - before[late]).max() < 1e-3
    assert np.abs(got.samples[int(1.48 * RATE) : int(1.5 * RATE)]).max() < 1e-4


def test_damaged_pages_of_ogg_leave_a_gap_of_their_length(tmp_path: Path) -> None:
    """FFmpeg passes over a page whose sum is wrong and says nothing."""
    path = write_audio(tmp_path / "a.opus", "libopus", 8.0, sample_format="flt", samples=tone(8.0, 48_000, 440))
    before, data = whole(path), bytearray(path.read_bytes())
    page = [match.start() for match in re.finditer(rb"OggS\0", data)][5]
    data[page + 200 : page + 220] = bytes(20)
    path.write_bytes(data)
    got = read_waveform(path, seconds=0)
    (told,) = got.warnings
    assert re.fullmatch(rf"{re.escape(str(path))}: [\d.]+ s of the sound are damaged; silence takes their place", told)
    assert abs(len(got.samples) - len(before)) <= 2
    assert np.abs(got.samples[-RATE:] - before[-RATE:]).max() < 0.02
    assert 0.5 * RATE < (np.abs(got.samples) < 1e-4).sum() < 2.5 * RATE


def test_too_many_lost_packets_are_refused_with_the_share(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "a.m4a", "aac", 3.0)
    with pytest.raises(ClipError, match=r"b\.m4a: damaged: 40 of 142 packets of the sound do not decode"):
        whole(damage_packets(path, tmp_path / "b.m4a", set(range(60, 100))))


def test_adts_cut_at_any_byte(tmp_path: Path) -> None:
    data = write_audio(tmp_path / "a.aac", "aac", 4.0).read_bytes()
    (tmp_path / "cut.aac").write_bytes(data[len(data) // 3 + 77 :])
    assert abs(len(whole(tmp_path / "cut.aac")) - 4 * RATE * 2 / 3) < 0.15 * RATE


def test_the_sample_rate_and_layout_change(tmp_path: Path) -> None:
    first = write_audio(tmp_path / "a.ts", "mp2", 3.0, sample_format="s16", samples=tone(3.0, 48_000, 440))
    second = write_audio(
        tmp_path / "b.ts", "mp2", 3.0, rate=32_000, layout="stereo", sample_format="s16", samples=np.tile(tone(3.0, 32_000, 880), 2)
    )
    (tmp_path / "joined.ts").write_bytes(first.read_bytes() + second.read_bytes())
    got = whole(tmp_path / "joined.ts")
    assert abs(len(got) - 6 * RATE) < 0.2 * RATE
    assert pitch(got[RATE : 2 * RATE]) == pytest.approx(440, abs=2)
    assert pitch(got[4 * RATE : 5 * RATE]) == pytest.approx(880, abs=2)


# -------------------------------------------------------------------------------------------------------------- several tracks


def test_the_default_track(tmp_path: Path) -> None:
    picture = write_video(tmp_path / "v.mp4", "libx264", 24)
    silent = write_audio(tmp_path / "silent.m4a", "aac", 1.0, samples=np.zeros((48_000, 1), np.float32))
    loud = write_audio(tmp_path / "loud.m4a", "aac", 1.0)
    for suffix in (".mp4", ".mkv"):
        path = copy_tracks(tmp_path / f"clip{suffix}", (picture, 0), (silent, 0), (loud, 0), default=(0, 2))
        assert whole(path).std() > 0.1
        assert not whole(path, track=0).any()
        assert whole(path, track=1).std() > 0.1
        with pytest.raises(ClipError, match="audio track 2 is not there; the last is 1"):
            whole(path, track=2)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_sound_that_starts_late_keeps_its_place(tmp_path: Path, suffix: str) -> None:
    picture = write_video(tmp_path / "v.mp4", "libx264", 72, options={"preset": "ultrafast", "bf": "0"})
    sound = write_audio(tmp_path / "a.m4a", "aac", 2.0, samples=tone(2.0, 48_000, 440))

    def later(packet: Any, number: int) -> Any:
        if packet.time_base.denominator == 48_000:
            packet.pts, packet.dts = packet.pts + 48_000, packet.dts + 48_000
        return packet

    path = copy_tracks(tmp_path / f"clip{suffix}", (picture, 0), (sound, 0), change=later)
    placed, first = whole(path, start="clip"), whole(path, start="track")
    late = len(placed) - len(first)
    assert late == pytest.approx(RATE, abs=0.08 * RATE)  # one second, but for the encoder's delay
    assert np.abs(placed[: late - 100]).max() < 1e-4
    assert np.abs(placed[late + 100 :] - first[100:]).max() < 0.06  # less than a sample apart
    assert first[: RATE // 10].any()
    cut = whole(path, start="clip", timestamps=(0.5, 2.5))
    assert np.abs(cut[RATE : RATE + 8000] - placed[3 * RATE // 2 : 3 * RATE // 2 + 8000]).max() < 0.02


def test_a_warning_where_the_first_channel_alone_is_silent(tmp_path: Path) -> None:
    samples = np.zeros((48_000, 6), np.float32)
    samples[:, 2] = tone(1.0, 48_000, 440)[:, 0]
    path = write_audio(tmp_path / "a.m4a", "aac", 1.0, layout="5.1", channels=6, samples=samples)
    assert read_waveform(path).warnings == (f"{path}: the first channel is silent, others are not; set channels=mean to hear them",)
    assert read_waveform(path, channels="mean").warnings == ()
    samples[:, 0] = samples[:, 2]
    assert read_waveform(write_audio(path, "aac", 1.0, layout="5.1", channels=6, samples=samples)).warnings == ()


def test_decoder_libraries_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 2.0)
    data = clip.read_bytes()
    middle = data.index(b"mdat") + 2000
    (tmp_path / "a.mp4").write_bytes(data[:middle] + np.random.default_rng(0).bytes(800) + data[middle + 800 :])
    tagged = mp3(tmp_path / "a.mp3", 2.0).read_bytes()
    frames = b"COMM" + struct.pack(">IH", 40, 0) + bytes(40)  # a comment without text: mpg123 complains of it on the terminal
    (tmp_path / "b.mp3").write_bytes(b"ID3\x03\0\0\0\0\0" + bytes([len(frames)]) + frames + tagged + bytes(5000))
    capfd.readouterr()
    for name in ("a.mp4", "b.mp3"):
        read_waveform(tmp_path / name)
    assert capfd.readouterr() == ("", "")


def test_bad_advice_is_not_given(tmp_path: Path) -> None:
    """ "Fetch it again" is for files that are shorter than they say."""
    clip = write_clip(tmp_path / "clip.mp4", 2.0)
    data = clip.read_bytes()
    (tmp_path / "short.mp4").write_bytes(data[: len(data) // 2])
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(4000))
    (tmp_path / "part.m4s").write_bytes(b"\0\0\0\x10stypmsdh\0\0\0\0\0\0\1\0moof" + bytes(248))
    (tmp_path / "lfs.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n")
    for name, advice in (
        ("short.mp4", "fetch it again"),
        ("noise.mp4", "correct the path, or re-encode it"),
        ("part.m4s", r"put the initialization segment before it \(.*\)"),
        ("lfs.mp4", "run git lfs pull"),
    ):
        with pytest.raises(ClipError, match=f"{advice}$"):
            read_waveform(tmp_path / name)
