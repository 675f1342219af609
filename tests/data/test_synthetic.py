"""Synthetic clips: what is drawn can be seen and heard again in the decoded mp4, held-out combinations stay out of training."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from omni_jax.data.manifest import read_manifest
from omni_jax.data.synthetic import SyntheticConfig, caption, captions_of, combination, plan_clips, render, write_set
from omni_jax.data.synthetic_media import COLORS, PITCHES, RATE, write_mp4
from omni_jax.media.audio import read_waveform
from omni_jax.media.video import read_frames
from omni_jax.types import InputError

SMALL = SyntheticConfig(clips=1, held_out=2, combinations=5, seconds=0.5, side=56)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A set of five clips and its folder."""
    folder = tmp_path_factory.mktemp("synthetic")
    return folder, write_set(folder, SMALL)


def test_held_out_combinations_are_not_trained_on_though_each_value_is():
    clips = plan_clips(SyntheticConfig())
    seen = {c.values for c in clips if not c.held_out}
    held = {c.values for c in clips if c.held_out}
    assert (len(seen), len(held), len(clips)) == (561, 64, 4 * 561 + 64)
    assert not seen & held
    assert {(place, v[place]) for v in seen for place in range(4)} == set(itertools.product(range(4), range(5)))
    assert len({c.id for c in clips}) == len(clips)
    assert {c.id.split("-")[0] for c in clips if c.held_out}.isdisjoint(c.id.split("-")[0] for c in clips if not c.held_out)


def test_combinations_are_numbered_without_a_gap():
    assert len({combination(number) for number in range(625)}) == 625
    assert combination(624) == (4, 4, 4, 4)


def test_a_set_is_the_same_each_time_and_another_seed_gives_another(tmp_path, small):
    folder, _ = small
    write_set(tmp_path / "again", SMALL)
    write_set(tmp_path / "other", SyntheticConfig(**{**SMALL.__dict__, "seed": 1}))
    files = sorted(p.relative_to(folder) for p in folder.rglob("*.mp4"))
    assert len(files) == 5
    assert all((folder / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
    for manifest in ("train.jsonl", "held_out.jsonl"):
        assert (folder / manifest).read_bytes() == (tmp_path / "again" / manifest).read_bytes()
    assert (folder / "train.jsonl").read_bytes() != (tmp_path / "other" / "train.jsonl").read_bytes()


def test_only_missing_files_are_made_again(small):
    folder, _ = small
    manifest = read_manifest(folder / "train.jsonl")
    gone, kept = (Path(record.video) for record in manifest.records[:2])
    before = kept.stat().st_mtime_ns
    data = gone.read_bytes()
    gone.unlink()
    assert write_set(folder, SMALL, workers=1).written == 1
    assert gone.read_bytes() == data and kept.stat().st_mtime_ns == before
    assert not [p for p in folder.rglob("*") if p.name.startswith(".")]


def test_a_folder_of_another_set_is_refused(small):
    folder, _ = small
    with pytest.raises(InputError, match="holds synthetic clips of other settings"):
        write_set(folder, SyntheticConfig())


@pytest.mark.parametrize("wrong", [{"held_out": 0}, {"held_out": 5}, {"combinations": 626}, {"clips": 0}, {"side": 57}, {"seconds": 0.1}])
def test_settings_that_give_no_set_are_refused(wrong):
    with pytest.raises(InputError, match="synthetic clips"):
        SyntheticConfig(**{**SMALL.__dict__, **wrong})


def test_manifests_hold_every_clip_with_picture_sound_and_caption(small):
    _, made = small
    train, held = read_manifest(made.train), read_manifest(made.held_out)
    assert (len(train.records), len(held.records), train.problems, held.problems) == (3, 2, (), ())
    for record in (*train.records, *held.records):
        assert record.modalities == frozenset("tva")
        assert record.video == record.audio and Path(record.video).is_file()


def test_captions_of_a_combination_differ_and_name_its_values():
    rng = np.random.default_rng(0)
    found = {caption((0, 1, 2, 3), rng) for _ in range(50)}
    assert len(found) > 40
    for text in found:
        words = set(text.split())
        for options in ("disc circle", "green emerald", "dimming fading", "teal cyan", "deep bass", "hollow reedy", "falling sinking"):
            assert len(words & set(options.split())) == 1, text


def test_vocabulary_captions_come_from_training_combinations():
    texts = captions_of(SyntheticConfig(), 100)
    assert len(texts) == 100 and len(set(texts)) > 90
    assert texts == captions_of(SyntheticConfig(), 100)


@pytest.mark.parametrize("color", range(5))
def test_the_shape_has_its_color_in_the_decoded_picture(tmp_path, color):
    clip = next(c for c in plan_clips(SyntheticConfig()) if c.values[1] == color and c.values[0] == 0 and c.values[2:] == (0, 0))
    write_mp4(tmp_path / "clip.mp4", *render(clip, SyntheticConfig()))
    frames = read_frames(tmp_path / "clip.mp4", 4).frames.astype(float)
    middle = np.median(frames[:, 18:38, 18:38].reshape(-1, 3), axis=0)
    distances = [np.abs(middle - np.array(value)).max() for value in COLORS.values()]
    assert int(np.argmin(distances)) == color and min(distances) < 50


@pytest.mark.parametrize(("change", "rising"), [(1, True), (2, False)])
def test_brightening_and_dimming_can_be_seen(tmp_path, change, rising):
    clip = next(c for c in plan_clips(SyntheticConfig()) if c.values[0] == 0 and c.values[1] == 4 and c.values[2] == change)
    write_mp4(tmp_path / "clip.mp4", *render(clip, SyntheticConfig()))
    light = read_frames(tmp_path / "clip.mp4", 4).frames[:, 18:38, 18:38].mean(axis=(1, 2, 3))
    assert (np.diff(light) > 3).all() if rising else (np.diff(light) < -3).all()


@pytest.mark.parametrize("pitch", range(5))
def test_the_pitch_is_heard_in_the_decoded_sound(tmp_path, pitch):
    clip = next(c for c in plan_clips(SyntheticConfig()) if c.values[0] == pitch and c.values[1] == 0 and c.values[2] == 0)
    write_mp4(tmp_path / "clip.mp4", *render(clip, SyntheticConfig()))
    wave = read_waveform(tmp_path / "clip.mp4", seconds=1.0, pad=True, crop="first", channels="first").samples
    assert wave.shape == (RATE,)  # AAC's last frame sticks out
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(wave.size)))
    loudest = np.fft.rfftfreq(wave.size, 1 / RATE)[np.argmax(spectrum)]
    assert loudest == pytest.approx(PITCHES[pitch], rel=0.05)


def test_clips_of_one_combination_differ():
    config = SyntheticConfig()
    first, second = plan_clips(config)[:2]
    assert first.values == second.values
    pictures, sounds = zip(render(first, config), render(second, config), strict=True)
    assert np.abs(pictures[0].astype(int) - pictures[1]).max() > 50
    assert np.abs(sounds[0] - sounds[1]).max() > 0.05


def test_the_settings_are_written_beside_the_clips(small):
    folder, _ = small
    assert json.loads((folder / "synthetic.json").read_text())["combinations"] == 5
