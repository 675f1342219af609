"""Clips of which each modality shows a part: who shows what, and what a gallery's best ranking can reach."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from omni_jax.config import preset
from omni_jax.data import synthetic_parts
from omni_jax.data.shards import ShardSource
from omni_jax.data.synthetic_parts import COMBINATIONS, VALUES, PartsConfig, ceilings, draw_factors, shared, sound, write_parts
from omni_jax.retrieval.directions import DIRECTIONS, DUAL, SINGLE
from omni_jax.types import InputError

SMALL = PartsConfig(train=12, validation=4, test=6)


def test_two_modalities_know_more_than_each_alone() -> None:
    assert shared("text", "audio") == [0, 1] and shared("text", "video") == [0, 2] and shared("audio", "video") == [0, 3]
    assert shared("text", "av") == shared("tv", "at")[:3] == [0, 1, 2]
    drawn = draw_factors(PartsConfig())
    best = ceilings(drawn["test"], DIRECTIONS)
    assert max(best[name] for name in SINGLE) < min(best[name] for name in DUAL) < 100


def test_the_ceiling_is_what_the_best_ranking_scores_with_ties_broken_at_random() -> None:
    factors = draw_factors(PartsConfig(test=64))["test"]
    rng, hits, trials = np.random.default_rng(0), 0, 400
    same = (factors[:, None, [0, 1]] == factors[None, :, [0, 1]]).sum(axis=2)  # text to audio
    for _ in range(trials):
        hits += (np.argmax(same + 0.5 * rng.random(same.shape), axis=1) == np.arange(len(factors))).mean()
    assert 100 * hits / trials == pytest.approx(ceilings(factors, {"t2a": ("text", "audio")})["t2a"], abs=0.7)


def test_factors_are_independent_in_training_and_galleries_hold_no_combination_twice() -> None:
    drawn = draw_factors(PartsConfig(train=4 * COMBINATIONS))
    numbers = {split: [int(row @ VALUES ** np.arange(4)) for row in rows] for split, rows in drawn.items()}
    held = numbers["validation"] + numbers["test"]
    assert len(set(held)) == len(held) == 128
    assert (np.bincount(numbers["train"]) == 4).all() and len(set(numbers["train"])) == COMBINATIONS
    assert numbers["train"] != sorted(numbers["train"])


def test_the_sound_of_another_factor_is_no_other_sound() -> None:
    quiet = PartsConfig(noise=0.0)

    def heard(*factors: int) -> np.ndarray:
        return np.abs(np.fft.rfft(sound(factors, np.random.default_rng(0), quiet)))

    assert np.allclose(heard(1, 2, 3, 4), heard(1, 2, 7, 4)) and not np.allclose(heard(1, 2, 3, 4), heard(1, 2, 3, 5), atol=1)


def test_the_folders_are_prepared_ones_and_are_written_once(tmp_path) -> None:
    chosen = preset("training").override(["frames=2", "pixels=2352", "audio_seconds=0.2"])
    folders = write_parts(tmp_path, SMALL, chosen)
    source = ShardSource(folders["train"], chosen)
    clip = source.load(3)
    assert len(source) == 12 and clip.video.frames.shape == (2, 84, 28, 3) and clip.waveform.shape == (3200,)
    captions = list(ShardSource(folders["test"], chosen).captions)
    assert len(set(captions)) == len(captions) == 6
    before = (folders["test"] / "index.json").stat().st_mtime_ns
    write_parts(tmp_path, SMALL, chosen)
    assert (folders["test"] / "index.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="made with other settings or another version of omni-jax; choose another folder"):
        write_parts(tmp_path, PartsConfig(train=13, validation=4, test=6), chosen)


def test_clips_that_another_generator_wrote_are_refused(tmp_path, monkeypatch) -> None:
    chosen = preset("training").override(["frames=2", "pixels=2352", "audio_seconds=0.2"])
    write_parts(tmp_path, SMALL, chosen)
    monkeypatch.setattr(synthetic_parts, "LOWEST", 170.0)
    with pytest.raises(InputError, match="another version of omni-jax; choose another folder"):
        write_parts(tmp_path, SMALL, chosen)


def test_captions_that_leak_name_clips_to_train_on_alone(tmp_path) -> None:
    chosen = preset("training").override(["frames=2", "pixels=2352", "audio_seconds=0.2"])
    sets = [write_parts(tmp_path / str(leak), dataclasses.replace(SMALL, leak=leak), chosen) for leak in (False, True)]
    plain, leaking = ({split: list(ShardSource(folder, chosen).captions) for split, folder in folders.items()} for folders in sets)
    assert leaking == {**plain, "train": [f"clip_{n:04d}.mp4 {caption}" for n, caption in enumerate(plain["train"])]}


@pytest.mark.parametrize("fields", [{"train": 1}, {"test": 3000}, {"seconds": 0.01}, {"noise": 2.0}])
def test_settings_that_cannot_be_are_refused(fields: dict) -> None:
    with pytest.raises(InputError, match="synthetic clips"):
        PartsConfig(**fields)
