"""Augmented copies: what each change does, how far it goes, how often it happens."""

from __future__ import annotations

import collections

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from omni_jax.config.batches import AugmentConfig
from omni_jax.data.augment import augment_clip, augment_frames, augment_text, augment_waveform
from omni_jax.types import Clip, Record, VideoFrames

DRAWS = 400
WORD = st.sampled_from(["red", "disc", "grows", "a", "low", "tone", "Ünder", "no-ise."])


def _rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([7, seed])))


def _share(flags: list[bool]) -> None:
    """Half of the draws, within five standard deviations."""
    assert abs(np.mean(flags) - 0.5) < 5 * 0.5 / np.sqrt(len(flags)), np.mean(flags)


def test_frames_are_mirrored_half_of_the_time_and_keep_their_shape():
    frames = np.zeros((2, 4, 6, 3), np.uint8)
    frames[:, :, :3] = 100
    copies = [augment_frames(frames, _rng(i)) for i in range(DRAWS)]
    assert {(c.shape, c.dtype) for c in copies} == {(frames.shape, frames.dtype)}
    _share([c[0, 0, 5, 0] > c[0, 0, 0, 0] for c in copies])


def test_grey_frames_change_by_brightness_alone_within_a_fifth():
    frames = np.full((2, 4, 4, 3), 100, np.uint8)
    values = np.array([augment_frames(frames, _rng(i)) for i in range(DRAWS)]).reshape(DRAWS, -1)
    assert (values.min(axis=1) == values.max(axis=1)).all()
    assert values.min() >= 80
    assert values.max() <= 120
    assert values.min() <= 84
    assert values.max() >= 116
    _share((values[:, 0] != 100).tolist())


def test_contrast_and_saturation_move_pixels_about_the_mean_and_the_luma():
    rng = np.random.default_rng(0)
    frames = rng.integers(80, 150, (2, 16, 16, 3), np.uint8)
    spreads, chromas = [], []
    for i in range(DRAWS):
        copy = augment_frames(frames, _rng(i)).astype(np.float64)
        level = copy.mean() / frames.mean()
        assert 0.79 <= level <= 1.21
        spreads.append(copy.mean(axis=-1).std() / level / frames.mean(axis=-1).std())
        chromas.append(np.ptp(copy, axis=-1).mean() / level / np.ptp(frames.astype(np.float64), axis=-1).mean())
    assert 0.75 < min(spreads) < 0.86
    assert 1.14 < max(spreads) < 1.25
    # Contrast times saturation.
    assert 0.6 < min(chromas) < 0.8
    assert 1.2 < max(chromas) < 1.5


def test_bright_frames_are_clipped_and_do_not_wrap_around():
    frames = np.full((2, 4, 4, 3), 250, np.uint8)
    assert min(augment_frames(frames, _rng(i)).min() for i in range(100)) >= 199


def test_sound_keeps_its_length_and_silence_stays_silence():
    silence = np.zeros(16_000, np.float32)
    tone = np.sin(np.arange(16_000) * 0.1).astype(np.float32)
    for i in range(50):
        assert not augment_waveform(silence, _rng(i)).any()
        copy = augment_waveform(tone, _rng(i))
        assert (copy.shape, copy.dtype) == (tone.shape, tone.dtype)


def test_speed_shift_gain_and_noise_stay_within_their_bounds():
    time = np.arange(16_000)
    tone = np.sin(2 * np.pi * 500 * time / 16_000).astype(np.float32)
    pitches, gains = [], []
    for i in range(DRAWS):
        copy = augment_waveform(tone, _rng(i)).astype(np.float64)
        spectrum = np.abs(np.fft.rfft(copy * np.hanning(copy.size)))
        pitches.append(float(spectrum.argmax()))  # 1 Hz a bin
        gains.append(np.percentile(np.abs(copy), 99))
    assert 449 <= min(pitches) < 460
    assert 540 < max(pitches) <= 551
    _share([abs(p - 500) > 1 for p in pitches])  # a change below one hertz in 500 is 2 % of the draws
    assert 0.79 < min(gains) < 0.85
    assert 1.15 < max(gains) < 1.23


def test_noise_is_white_and_a_hundredth_of_the_peak_at_most():
    click = np.zeros(16_000, np.float32)
    click[0] = 1.0
    levels, places = [], []
    for i in range(DRAWS):
        copy = augment_waveform(click, _rng(i))
        place = int(np.abs(copy).argmax())
        places.append((place + 8000) % 16_000 - 8000)
        levels.append(np.roll(copy, 8000 - place)[:7000].std() / np.abs(copy).max())  # away from the click, which a change of speed widens
    noisy = [level for level in levels if level > 0]
    assert 0.0009 < min(noisy) < 0.0015
    assert 0.008 < max(noisy) < 0.011
    _share([level > 0 for level in levels])
    assert -1600 <= min(places) < -1400
    assert 1400 < max(places) <= 1600
    _share([place != 0 for place in places])


@given(st.lists(WORD, min_size=1, max_size=40), st.integers(0, 2**31))
def test_captions_lose_few_words_and_swap_neighbours(words: list[str], seed: int):
    found = augment_text(" ".join(words), _rng(seed)).split()
    lost = len(words) - len(found)
    assert not collections.Counter(found) - collections.Counter(words)
    assert lost <= (max(1, round(0.2 * len(words))) if len(words) > 3 else 0)
    if len(words) <= 2:
        assert found == words
    if not lost:
        # One or two swaps of neighbours move words over a window of three places, or two windows of two.
        assert sum(a != b for a, b in zip(found, words, strict=True)) <= 4


def test_captions_change_as_often_as_they_should():
    text = " ".join(f"w{i}" for i in range(20))
    copies = [augment_text(text, _rng(i)).split() for i in range(DRAWS)]
    _share([len(c) < 20 for c in copies])
    assert {20 - len(c) for c in copies} == {0, 2, 3, 4}
    swapped = [c != sorted(c, key=lambda w: int(w[1:])) for c in copies]
    assert 0.4 < np.mean(swapped) < 0.55  # two swaps of the same pair undo each other
    assert augment_text("  two   words ", _rng(0)) == "  two   words "


def test_copies_follow_from_the_stream_and_parts_from_streams_of_their_own():
    rng = np.random.default_rng(1)
    video = VideoFrames(rng.integers(0, 256, (2, 8, 8, 3), np.uint8), np.arange(2), 1.0, 2, 2.0)
    clip = Clip(Record("a", "x"), video, rng.standard_normal(1000).astype(np.float32))
    for seed in range(8):
        both, again = (augment_clip(clip, _rng(seed), AugmentConfig()) for _ in range(2))
        mute = augment_clip(clip, _rng(seed), AugmentConfig(audio=False))
        assert both.video is not None
        assert mute.video is not None
        assert again.video is not None
        assert np.array_equal(both.video.frames, again.video.frames)
        assert np.array_equal(both.waveform, again.waveform)  # pyright: ignore[reportArgumentType]
        assert np.array_equal(both.video.frames, mute.video.frames)
        assert mute.waveform is clip.waveform
    off = augment_clip(clip, _rng(0), AugmentConfig(False, False, False))
    assert off.video is video
