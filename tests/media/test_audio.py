"""Waveforms of every format: resampling, cropping, padding, silence for what is missing, one line for what is broken."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import av
import av.error
import numpy as np
import pytest
import soundfile
import soxr

from omni_jax.media import audio
from omni_jax.media.audio import read_waveform
from omni_jax.types import ClipError
from tests.golden_set import GoldenSet
from tests.media.containers import damage_packets, write_audio
from tests.media_samples import cut_file, tones, write_clip, write_sound
from tests.tolerances import assert_close

RATE = 16_000


def read_golden(golden: GoldenSet, number: int) -> np.ndarray:
    record, preset = golden.records[number], golden.preset
    assert record.audio is not None
    got = read_waveform(record.audio, seconds=preset.audio_seconds, pad=preset.audio_pad, timestamps=record.timestamps)
    assert got.samples.dtype == np.float32
    assert not (got.warnings and got.samples.any())  # only silence may stand in for a track
    return got.samples


def test_golden_waveform(golden: GoldenSet) -> None:
    for i in range(golden.clips):
        assert_close(read_golden(golden, i), golden.inputs[f"{i}/waveform"], "waveform")


def test_golden_nemotron_waveform(golden_nemotron: GoldenSet) -> None:
    for i in range(golden_nemotron.clips):
        assert_close(read_golden(golden_nemotron, i), golden_nemotron.inputs[f"{i}/waveform"], "waveform")


def pitch(samples: np.ndarray) -> float:
    """The strongest frequency, Hz."""
    return float(np.argmax(np.abs(np.fft.rfft(samples * np.hanning(len(samples))))) * RATE / len(samples))


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3", ".m4a"])
def test_every_audio_format(tmp_path: Path, suffix: str) -> None:
    got = read_waveform(write_sound(tmp_path / f"sound{suffix}", 2.0, 44_100, 2, seed=5), seconds=0).samples
    want = soxr.resample(tones(2.0, 44_100, 2, seed=5)[:, 0], 44_100, RATE)
    assert abs(len(got) - len(want)) < 0.1 * RATE  # lossy coders add padding
    middle = slice(RATE // 2, RATE)
    assert pitch(got[middle]) == pytest.approx(pitch(want[middle]), abs=3)
    assert got[middle].std() == pytest.approx(want[middle].std(), rel=0.1)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm", ".avi"])
def test_audio_of_every_video_container(tmp_path: Path, suffix: str) -> None:
    got = read_waveform(write_clip(tmp_path / f"clip{suffix}", 2.0, sample_rate=48_000, channels=2, seed=6), seconds=0)
    want = soxr.resample(tones(2.0, 48_000, 2, seed=6)[:, 0], 48_000, RATE)
    assert not got.warnings
    assert abs(len(got.samples) - len(want)) < 0.1 * RATE
    assert pitch(got.samples[RATE // 2 : RATE]) == pytest.approx(pitch(want[RATE // 2 : RATE]), abs=3)


@pytest.mark.parametrize("codec", ["pcm_u8", "pcm_s16le", "pcm_s32le", "pcm_f32le", "flac"])
def test_sample_formats_inside_a_container(tmp_path: Path, codec: str) -> None:
    clip = write_clip(tmp_path / "clip.mkv", 1.5, audio_codec=codec, channels=2, seed=7)
    got = read_waveform(clip, seconds=0, channels="mean").samples
    want = tones(1.5, RATE, 2, seed=7).mean(axis=1)
    assert len(got) == len(want)
    assert np.abs(got - want).max() < (2.0 / 128 if codec == "pcm_u8" else 2.0 / 2**15)


@pytest.mark.parametrize("channels", [2, 9])
def test_channels_in_an_order_without_a_name(tmp_path: Path, channels: int) -> None:
    """PyAV frees the list of such channels twice and ends the process."""
    samples = tones(1.0, RATE, channels)
    described = b"".join(struct.pack(">II3f", label, 0, 0, 0, 0) for label in (3, 2, 1, 4, 6, 5, 10, 9, 12)[:channels])
    chunks = {
        b"desc": struct.pack(">d4s5I", RATE, b"lpcm", 0, 2 * channels, 1, channels, 16),
        b"chan": struct.pack(">3I", 0, 0, channels) + described,
        b"data": bytes(4) + (samples * 32767).astype(">i2").tobytes(),
    }
    path = tmp_path / "sound.caf"
    path.write_bytes(b"caff\0\1\0\0" + b"".join(name + struct.pack(">q", len(data)) + data for name, data in chunks.items()))
    assert np.abs(read_waveform(path, seconds=0, pad=False).samples - samples[:, 0]).max() < 1e-4


def test_a_packet_that_decodes_by_chance_before_the_sound_begins(tmp_path: Path) -> None:
    """As where a copy begins inside a frame: what fails behind it is no gap."""
    path = write_audio(tmp_path / "a.mka", "aac", 2.0, rate=RATE, samples=tones(2.0, RATE, 1))
    got = read_waveform(damage_packets(path, tmp_path / "damaged.mka", {0, 3, 4, 5}), seconds=0)
    decoded = []
    with av.open(tmp_path / "damaged.mka") as container:
        for packet in container.demux(audio=0):
            with contextlib.suppress(av.error.FFmpegError):
                decoded += [frame.to_ndarray()[0] for frame in container.streams.audio[0].decode(packet)]
    assert np.array_equal(got.samples, np.concatenate(decoded))
    assert got.warnings == ()


def test_first_channel_or_the_mean(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "stereo.wav", 2.0, RATE, 2, subtype="FLOAT")
    both = tones(2.0, RATE, 2)
    assert np.array_equal(read_waveform(path, seconds=0).samples, both[:, 0])
    assert np.allclose(read_waveform(path, seconds=0, channels="mean").samples, both.mean(axis=1), atol=1e-7)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000, 96_000])
def test_block_by_block_resampling_equals_resampling_at_once(tmp_path: Path, rate: int) -> None:
    path = write_sound(tmp_path / "sound.wav", 5.3, rate, subtype="FLOAT")
    want = soxr.resample(tones(5.3, rate, 1)[:, 0], rate, RATE, quality="HQ")
    got = read_waveform(path, seconds=0).samples
    assert len(got) == int(np.ceil(round(5.3 * rate) * RATE / rate))
    assert_close(got[: len(want)], want[: len(got)], "resampled")
    assert np.array_equal(read_waveform(path, seconds=2.0).samples, got[: 2 * RATE])


@pytest.mark.parametrize("crop", ["first", "center"])
def test_crop_and_pad(tmp_path: Path, crop: str) -> None:
    path = write_sound(tmp_path / "sound.wav", 5.0, RATE, subtype="FLOAT")
    whole = tones(5.0, RATE, 1)[:, 0]
    start = 0 if crop == "first" else 3 * RATE // 2
    assert np.array_equal(read_waveform(path, seconds=2.0, crop=crop).samples, whole[start : start + 2 * RATE])
    padded = read_waveform(path, seconds=8.0, crop=crop).samples
    assert len(padded) == 8 * RATE
    assert np.array_equal(padded[: 5 * RATE], whole)
    assert not padded[5 * RATE :].any()
    assert len(read_waveform(path, seconds=8.0, crop=crop, pad=False).samples) == 5 * RATE


@pytest.mark.parametrize("seconds", [0.0, 0.5, 300.0])
def test_never_below_one_second(tmp_path: Path, seconds: float) -> None:
    got = read_waveform(write_sound(tmp_path / "sound.wav", 0.25, RATE), seconds=seconds, pad=False).samples
    assert len(got) == RATE
    assert not got[RATE // 4 :].any()


def test_timestamps_cut_at_the_tracks_own_rate(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "sound.wav", 4.0, 44_100, subtype="FLOAT")
    want = soxr.resample(tones(4.0, 44_100, 1)[round(0.7 * 44_100) : round(2.9 * 44_100), 0], 44_100, RATE, quality="HQ")
    got = read_waveform(path, seconds=0, timestamps=(0.7, 2.9)).samples
    assert abs(len(got) - len(want)) <= 1
    assert_close(got[: len(want)], want[: len(got)], "resampled")
    centre = read_waveform(path, seconds=1.0, crop="center", timestamps=(0.7, 2.9)).samples
    start = (len(got) - RATE) // 2
    assert np.array_equal(centre, got[start : start + RATE])


def test_timestamps_after_the_end(tmp_path: Path) -> None:
    with pytest.raises(ClipError, match=r"sound\.wav: the audio track has no samples at 5 s"):
        read_waveform(write_sound(tmp_path / "sound.wav", 2.0), timestamps=(5.0, 6.0))
    got = read_waveform(write_clip(tmp_path / "clip.mp4", 3.0, audio_seconds=1.0), timestamps=(2.0, 3.0))
    assert not got.samples.any()
    assert "no samples at 2 s" in got.warnings[0]


@pytest.mark.jit
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".m4a"])
def test_far_samples_of_a_long_track_are_entered_by_seeking(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_clip(tmp_path / f"long{suffix}", 100, fps=1, seed=8, audio_codec="aac")
    whole = read_waveform(path, seconds=0).samples
    far = read_waveform(path, seconds=2.0, timestamps=(70.0, 90.0)).samples
    assert_close(far, whole[70 * RATE : 72 * RATE], "resampled")
    monkeypatch.setattr(audio, "_CENTER_EXACT_SECONDS", 10.0)
    centre = read_waveform(path, seconds=2.0, crop="center").samples
    # The declared length may miss the last frame's padding, so the centre may lie a frame off.
    offsets = range(len(whole) // 2 - RATE - 2048, len(whole) // 2 - RATE + 2048)
    assert min(np.abs(centre[:500] - whole[at : at + 500]).max() for at in offsets) < 1e-3


@pytest.mark.costly
def test_three_hours_of_audio_decode_only_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "long.flac"
    with soundfile.SoundFile(path, "w", 8000, 1) as file:
        for _ in range(3 * 60):
            file.write(np.zeros(8000 * 60, np.float32))
    read = 0
    real = audio._floats

    def counted(frame: av.AudioFrame) -> np.ndarray:
        nonlocal read
        read += frame.samples
        return real(frame)

    monkeypatch.setattr(audio, "_floats", counted)
    for crop in ("first", "center"):
        read = 0
        assert len(read_waveform(path, seconds=8.0, crop=crop).samples) == 8 * RATE
        assert read < 60 * 8000


def test_a_video_without_a_track_is_silent_and_says_so(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "mute.mp4", audio=False)
    got = read_waveform(clip, seconds=8.0)
    assert len(got.samples) == 8 * RATE
    assert not got.samples.any()
    assert got.warnings == (f"{clip}: no audio track; silence is used instead",)
    assert len(read_waveform(clip, seconds=0.0).samples) == 8 * RATE
    assert len(read_waveform(clip, seconds=300.0, pad=False).samples) == 8 * RATE


def wipe_audio(clip: Path) -> Path:
    """Fills every audio packet of an mp4 with 0xFF, which no AAC decoder takes."""
    data = bytearray(clip.read_bytes())
    with av.open(clip) as container:
        for packet in container.demux(audio=0):
            if packet.size and packet.pos is not None:
                data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    clip.write_bytes(data)
    return clip


def test_a_video_with_an_unreadable_track_is_silent_and_says_so(tmp_path: Path) -> None:
    clip = wipe_audio(write_clip(tmp_path / "broken.mp4"))
    got = read_waveform(clip, seconds=8.0)
    assert len(got.samples) == 8 * RATE
    assert not got.samples.any()
    assert len(got.warnings) == 1
    assert got.warnings[0].startswith(f"{clip}: unreadable audio track (")
    assert got.warnings[0].endswith("silence is used instead")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    samples = tones(2.0, RATE, 1)
    samples[RATE] = value
    soundfile.write(tmp_path / "bad.wav", samples, RATE, subtype="FLOAT")
    with pytest.raises(ClipError, match=r"bad\.wav: unreadable audio track \(NaN or infinite samples\); re-encode it"):
        read_waveform(tmp_path / "bad.wav")


def test_bad_audio_files_get_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    (tmp_path / "noise.wav").write_bytes(np.random.default_rng(0).bytes(4000))
    (tmp_path / "noise.m4a").write_bytes(np.random.default_rng(0).bytes(4000))
    (tmp_path / "folder.wav").mkdir()
    soundfile.write(tmp_path / "zero.wav", np.zeros(0, np.float32), RATE)
    wipe_audio(write_clip(tmp_path / "wiped.m4a"))
    (tmp_path / "words.mp3").write_text("not a song\n")
    for name, words in {
        "missing.wav": "file not found; check",
        "empty.wav": "file is empty; fetch",
        "folder.wav": "is a directory; name",
        "noise.wav": "not a media file",
        "noise.m4a": "not a media file",
        "words.mp3": "",
        "zero.wav": "the audio track has no samples; re-encode",
        "wiped.m4a": "unreadable audio track",
    }.items():
        with pytest.raises(ClipError) as error:
            read_waveform(tmp_path / name)
        message = str(error.value)
        assert message.startswith(f"{tmp_path / name}: {words}"), message
        assert "\n" not in message


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
def test_truncated_audio_files(tmp_path: Path, suffix: str) -> None:
    whole = write_sound(tmp_path / f"whole{suffix}", 5.0)
    with pytest.raises(ClipError, match=r"cut\.\w+: "):
        read_waveform(cut_file(whole, tmp_path / f"cut{suffix}", 0.7))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".avi"])
def test_truncated_video_files(tmp_path: Path, suffix: str) -> None:
    whole = write_clip(tmp_path / f"whole{suffix}", 5.0, faststart=suffix == ".mp4")
    with pytest.raises(ClipError, match=r"cut\.\w+: truncated"):
        read_waveform(cut_file(whole, tmp_path / f"cut{suffix}", 0.6))


def test_a_wrong_suffix_is_forgiven(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.m4a", 2.0, seed=9)
    renamed = clip.rename(tmp_path / "clip.wav")
    assert len(read_waveform(renamed, seconds=0).samples) == pytest.approx(2 * RATE, abs=2048)
