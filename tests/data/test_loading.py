"""Records to features through the pool: what is decoded, in which order, and what a bad clip costs."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax.config import preset
from omni_jax.data.loading import clip_features, load_clip, load_features
from omni_jax.types import Clip, ClipError, Features, InputError, Record
from tests.golden_set import GoldenSet
from tests.media.containers import copy_tracks, write_audio, write_video
from tests.media_samples import cut_file, write_clip, write_sound
from tests.tolerances import assert_close

TRAINING = preset("training")
ALL = frozenset("tva")


@pytest.mark.jit
@pytest.mark.parametrize("workers", [0, 2])
def test_golden_features_from_files(golden: GoldenSet, workers: int) -> None:
    records = golden.records[: golden.clips]
    loaded = list(load_features(records, golden.preset, ALL, workers, 120.0))
    assert len(loaded) == golden.clips
    for i, (record, features) in enumerate(zip(records, loaded, strict=True)):
        assert isinstance(features, Features), features
        assert features.record == record
        assert features.vision is not None
        assert features.audio is not None
        assert_close(features.vision.patches, golden.inputs[f"{i}/pixel_values"], "pixel_values")
        assert list(features.vision.grid.thw) == golden.inputs[f"{i}/grid_thw"][0].tolist()
        assert features.vision.grid.second_per_grid == pytest.approx(float(golden.inputs[f"{i}/second_per_grid"]), rel=1e-12)
        assert features.audio_tokens == golden.inputs[f"{i}/audio_tokens"]


def test_only_what_is_asked_for_is_opened(tmp_path: Path) -> None:
    record = Record("a", "caption", video=tmp_path / "missing.mp4", audio=write_sound(tmp_path / "a.wav"))
    clip = load_clip(record, TRAINING, frozenset("ta"))
    assert clip.video is None
    assert clip.waveform is not None
    assert load_clip(record, TRAINING, frozenset("t")).waveform is None
    with pytest.raises(ClipError, match="missing"):
        load_clip(record, TRAINING, frozenset("v"))


def test_modalities_a_record_lacks_are_left_out() -> None:
    (features,) = load_features([Record("a", "caption")], TRAINING, ALL, 0, 60)
    assert features == Features(Record("a", "caption"))


def test_an_argument_that_a_library_has_dropped_is_no_fault_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_without_options(file: str, mode: str) -> None:  # as a new PyAV has it
        raise AssertionError("called")

    record = Record("a", audio=write_sound(tmp_path / "a.wav"))
    monkeypatch.setattr("omni_jax.media.source.av.open", open_without_options)
    with pytest.raises(InputError, match=r"TypeError at source.py:\d+: .*unexpected keyword argument .* not of the files") as said:
        list(load_features([record] * 9, TRAINING, ALL, 0, 60))
    assert "\n" not in str(said.value) and "re-encode" not in str(said.value)


def test_the_preset_and_the_interval_reach_the_readers(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", 4.0, fps=10, sample_rate=16_000, channels=2)
    record = Record("a", video=path, audio=path, timestamps=(1.0, 3.0))
    clip = load_clip(record, dataclasses.replace(TRAINING, frames=4, audio_seconds=1.0, audio_crop="center"), ALL)
    assert clip.video is not None
    assert clip.waveform is not None
    assert clip.video.frame_index.tolist() == [10, 16, 23, 30]
    assert clip.video.seconds == pytest.approx(2.0)
    whole = load_clip(dataclasses.replace(record, timestamps=None), dataclasses.replace(TRAINING, audio_seconds=0.0), frozenset("a"))
    assert whole.waveform is not None
    assert np.array_equal(clip.waveform, whole.waveform[24_000:40_000])


@pytest.mark.parametrize(("rate", "suffix"), [(44_100, ".wav"), (48_000, ".mp4"), (22_050, ".flac")])
def test_sound_is_cut_after_resampling_as_the_reference_does(tmp_path: Path, rate: int, suffix: str) -> None:
    path = tmp_path / f"sound{suffix}"
    write_clip(path, 6.0, sample_rate=rate) if suffix == ".mp4" else write_sound(path, 6.0, rate)
    whole = load_clip(Record("a", audio=path), dataclasses.replace(TRAINING, audio_seconds=0.0, audio_pad=False), frozenset("a")).waveform
    assert whole is not None
    for start, end in ((0.3, 2.0), (2.34567, 4.5), (3.00004, 5.99999), (4.0, 60.0)):
        clip = load_clip(Record("a", audio=path, timestamps=(start, end)), TRAINING, frozenset("a"))
        want = whole[int(start * 16_000) : int(end * 16_000)]
        assert clip.waveform is not None and clip.waveform.shape == (128_000,)
        assert_close(clip.waveform, np.pad(want, (0, 128_000 - len(want))), "resampled")
    middle = dataclasses.replace(TRAINING, audio_crop="center", audio_seconds=1.0)
    clip = load_clip(Record("a", audio=path, timestamps=(1.1, 4.2)), middle, frozenset("a"))
    cut = whole[17_600:67_200]
    assert clip.waveform is not None
    assert_close(clip.waveform, cut[(len(cut) - 16_000) // 2 :][:16_000], "resampled")
    with pytest.raises(ClipError, match="at 7 s, where the timestamps start") if suffix != ".mp4" else contextlib.nullcontext():
        gone = load_clip(Record("a", audio=path, timestamps=(7.0, 8.0)), TRAINING, frozenset("a"))
        assert gone.waveform is not None and not gone.waveform.any() and gone.silent


@pytest.mark.jit
def test_the_preset_chooses_tracks_and_where_sound_starts(tmp_path: Path) -> None:
    pictures = [write_video(tmp_path / f"{width}.mp4", "libx264", 12, size=(width, 32)) for width in (48, 96)]
    sounds = [write_audio(tmp_path / f"{i}.m4a", "aac", 1.0, samples=np.full((48_000, 1), i / 4, np.float32)) for i in (1, 2)]

    def later(packet: Any, number: int) -> Any:
        if packet.time_base.denominator == 48_000:
            packet.pts, packet.dts = packet.pts + 48_000, packet.dts + 48_000
        return packet

    path = copy_tracks(tmp_path / "clip.mkv", *((p, 0) for p in pictures), *((s, 0) for s in sounds), change=later, default=(1, 2))
    record = Record("a", "x", video=path, audio=path)
    for fields, width, level, late in (
        ([], 96, 0.25, False),
        (["video_track=0", "audio_track=1"], 48, 0.5, False),
        (["audio_start=clip"], 96, 0.25, True),
    ):
        clip = load_clip(record, TRAINING.override(fields), ALL)
        assert clip.video is not None and clip.waveform is not None
        assert clip.video.frames.shape[2] == width
        assert clip.waveform[8_000] == pytest.approx(0.0 if late else level, abs=0.06)
        assert clip.waveform[24_000] == pytest.approx(level if late else 0.0, abs=0.06)


@pytest.mark.costly
def test_one_bad_clip_never_stops_the_others(tmp_path: Path) -> None:
    good = write_clip(tmp_path / "good.mp4", 1.0, faststart=True)
    mute = write_clip(tmp_path / "mute.mp4", 1.0, audio=False)
    records = [
        Record("good", video=good, audio=good),
        Record("cut", video=cut_file(good, tmp_path / "cut.mp4", 0.6)),
        Record("mute", video=mute, audio=mute),
        Record("missing", audio=tmp_path / "missing.wav"),
        Record("last", video=good),
    ]
    loaded = list(load_features(records, TRAINING, ALL, 2, 60))
    assert [isinstance(got, Features) for got in loaded] == [True, False, True, False, True]
    assert str(loaded[1]).startswith(f"{tmp_path / 'cut.mp4'}: truncated")
    assert str(loaded[3]).startswith(f"{tmp_path / 'missing.wav'}: file not found")
    assert isinstance(loaded[2], Features)
    assert loaded[2].warnings == (f"{mute}: no audio track; silence is used instead",)
    assert isinstance(loaded[0], Features)
    assert not loaded[0].warnings
    assert loaded[2].silent and not loaded[0].silent


@pytest.mark.parametrize("workers", [0, 1])
def test_messages_start_with_the_file_at_fault(tmp_path: Path, workers: int) -> None:
    sound = write_sound(tmp_path / "good.wav")
    low = write_clip(tmp_path / "low.mp4", 1.0, width=64, height=16)
    clip = write_clip(tmp_path / "clip.mp4", 1.0)
    (tmp_path / "noise.wav").write_bytes(b"not a sound")
    records = [Record("low", video=low, audio=sound), Record("noise", video=clip, audio=tmp_path / "noise.wav")]
    first, second = load_features(records, TRAINING, ALL, workers, 60)
    assert str(first) == f"{low}: frames are 64x16 pixels; both sides must be at least 28; give a larger copy or remove the record"
    assert isinstance(second, ClipError)
    assert str(second).startswith(f"{tmp_path / 'noise.wav'}: ")


def test_messages_about_arrays_without_a_file_start_with_the_record() -> None:
    broken = Clip(Record("x"), waveform=np.full(16_000, np.nan, np.float32))
    with pytest.raises(ClipError, match=r"^record 'x': audio has samples that are not finite"):
        clip_features(broken, TRAINING)
    with pytest.raises(ClipError, match=r"^a\.wav: audio has samples"):
        clip_features(dataclasses.replace(broken, record=Record("x", audio=Path("a.wav"))), TRAINING)


def test_decoding_processes_do_not_advise_pytorch(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", raising=False)
    (got,) = load_features([Record("a", audio=write_sound(tmp_path / "a.wav"))], TRAINING, ALL, 1, 60)
    assert isinstance(got, Features)
    assert "PyTorch" not in capfd.readouterr().err


def test_what_the_processes_import_holds_no_accelerator_library() -> None:
    code = (
        "import sys, omni_jax.data.loading, omni_jax.media.video, omni_jax.media.audio, omni_jax.features.vision, omni_jax.features.audio;"
        "found = {'jax', 'flax', 'torch', 'tensorflow'} & set(sys.modules);"
        "sys.exit(f'imported: {found}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
