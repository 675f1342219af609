"""Presets: what each field changes, and settings that would change nothing."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from omni_jax.cli.main import main
from omni_jax.config import PRESETS, ConfigError, Preset, presets_for
from omni_jax.data.shards import MEDIA_FIELDS, TEXT_FIELDS
from omni_jax.train.run_config import DataSection


def test_every_field_changes_either_media_or_text() -> None:
    assert sorted((*MEDIA_FIELDS, *TEXT_FIELDS)) == sorted(f.name for f in dataclasses.fields(Preset))


def test_presets_of_other_peoples_wrappers() -> None:
    mteb, before = PRESETS["mteb"], PRESETS["mteb_2026_08"]
    assert (mteb.audio_crop, mteb.audio_seconds, mteb.audio_pad, mteb.frame_rounding) == ("center", 8, True, "nearest")
    assert (before.audio_crop, before.audio_seconds, before.audio_pad, before.frame_rounding) == ("first", 300, False, "stride")
    assert {(p.text_head, p.channels, p.frames, p.areas) for p in (mteb, before)} == {("fused", "mean", 8, (50176, 50176))}
    wave = PRESETS["wave"]
    assert (wave.fps, wave.max_frames, wave.areas, wave.audio_seconds) == (2, 128, (784, 176_400), 0)
    assert [wave.filler_of(table) for table in ("audio", "video", "av")] == [
        "Please describe the audio.",
        "Please describe the video.",
        "Please describe the video.",
    ]
    nemotron = PRESETS["nemotron_mteb"]
    assert (nemotron.fps, nemotron.max_frames, nemotron.audio_seconds, nemotron.areas) == (2, 64, 128, (6_272, 50_176))
    assert list(presets_for("chat")) == ["nemotron", "nemotron_mteb"] and "wave" in presets_for("plain")


def test_fillers_of_one_medium() -> None:
    plain = Preset()
    assert {plain.filler_of(table) for table in ("audio", "video", "av")} == {"Please describe the video."}
    changed = plain.override(["filler_video=", "filler_audio=What is heard?"])
    assert [changed.filler_of(table) for table in ("audio", "video", "av")] == ["What is heard?", "", "Please describe the video."]
    assert plain.override(["filler="]).filler_of("audio") == ""


def test_one_way_of_counting_takes_the_place_of_the_other() -> None:
    fixed = PRESETS["wave"].override(["frames=4", "pixels=12544"])
    assert (fixed.frames, fixed.fps, fixed.max_frames, fixed.areas) == (4, 0, 0, (12544, 12544))
    counted = Preset().override(["fps=2", "max_frames=64", "min_pixels=6272", "max_pixels=50176"])
    assert (counted.fps, counted.most_frames, counted.areas) == (2, 64, (6272, 50176))
    assert DataSection("x", preset="wave", preset_fields={"frames": 4}).resolved_preset().most_frames == 4
    assert DataSection("x", preset="wave", preset_fields={"max_frames": 32}).resolved_preset().most_frames == 32


IDLE = [
    ("training", ["max_frames=64"], "max_frames=64"),
    ("training", ["fps=2", "frames=8"], "frames=8 has no effect"),
    ("training", ["pixels=784", "min_pixels=784", "max_pixels=1568"], "pixels=784 has no effect"),
    ("nemotron", ["audio_pad=true"], "audio_pad=True has no effect"),
    ("training", ["audio_seconds=0", "audio_crop=center"], "audio_crop='center' has no effect"),
    ("training", ["min_pixels=784", "max_pixels=783"], "max_pixels=783: must be at least 784"),
    ("training", ["max_pixels=784"], "smallest area 50176 is above the largest 784"),
    ("training", ["fps=-1"], "fps=-1"),
    ("training", ["fps=nan"], "fps=nan"),
    ("training", ["frame_rounding=up"], "floor, nearest, stride"),
]


@pytest.mark.parametrize(("name", "assignments", "words"), IDLE)
def test_a_setting_without_effect_or_out_of_range_is_refused(name: str, assignments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PRESETS[name].override(assignments)
    kinds = {f.name: type(f.default) for f in dataclasses.fields(Preset)}
    typed = {k: v == "true" if kinds[k] is bool else kinds[k](v) for k, v in (text.split("=") for text in assignments)}
    with pytest.raises(ConfigError, match=words):
        DataSection("x", preset=name, preset_fields=typed)


def test_of_several_presets_the_one_that_a_setting_does_not_fit_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = SimpleNamespace(config=SimpleNamespace(prompt="plain"))
    monkeypatch.setattr("omni_jax.cli.presets.named_model", lambda args: plain)
    assert main(["presets", "--model", "m", "--manifest", "c.jsonl", "--set", "audio_crop=center"]) == 2
    error = capsys.readouterr().err
    assert "preset wave is left out: preset field audio_crop='center' has no effect" in error
    assert error.endswith("c.jsonl: manifest not found; check the path\n")


def test_a_backbone_without_fusion_head_takes_none() -> None:
    with pytest.raises(ConfigError, match="no fusion head"):
        PRESETS["nemotron"].override(["text_head=fused"]).check("chat")
    PRESETS["nemotron"].check("chat")
    PRESETS["mteb"].check("plain")
