"""Frames to patches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_jax.config import preset
from omni_jax.features import smart_resize, vision_features
from omni_jax.features.vision import FACTOR, MEAN, STD, patchify, square_crop
from omni_jax.types import ClipError, VideoFrames
from tests.golden_set import GoldenSet
from tests.tolerances import assert_close


def _frames(pictures: np.ndarray, seconds: float = 2.0) -> VideoFrames:
    return VideoFrames(frames=pictures, frame_index=np.arange(len(pictures)), fps=25.0, num_frames=50, seconds=seconds)


def test_golden_patches(golden: GoldenSet) -> None:
    for i in range(golden.clips):
        a = {name: golden.inputs[f"{i}/{name}"] for name in ("frames", "frame_index", "fps", "num_frames")}
        seconds = float(a["num_frames"]) / float(a["fps"])
        if span := golden.records[i].timestamps:
            seconds = min(span[1], seconds) - span[0]
        features = vision_features(
            VideoFrames(a["frames"], a["frame_index"], float(a["fps"]), int(a["num_frames"]), seconds), golden.preset
        )
        assert_close(features.patches, golden.inputs[f"{i}/pixel_values"], "pixel_values")
        assert features.grid.thw == tuple(golden.inputs[f"{i}/grid_thw"].reshape(3).tolist())
        assert features.grid.second_per_grid == float(golden.inputs[f"{i}/second_per_grid"])


def test_sizes_named_in_the_specification() -> None:
    assert smart_resize(240, 320, 50176) == (168, 252)
    assert smart_resize(500, 500, 50176) == (224, 224)
    assert smart_resize(120, 160, 50176) == (196, 280)  # below the area: rounded up
    assert smart_resize(700, 700, 336 * 336) == (336, 336)


@given(height=st.integers(28, 3000), width=st.integers(28, 3000), tokens=st.integers(1, 400))
def test_size_is_a_multiple_near_the_area(height: int, width: int, tokens: int) -> None:
    pixels = tokens * FACTOR**2
    if max(height, width) > 200 * min(height, width):
        return
    h, w = smart_resize(height, width, pixels)
    assert h % FACTOR == w % FACTOR == 0
    assert min(h, w) >= FACTOR
    # One step of rounding on each side, either way.
    ideal = np.sqrt(pixels / (height * width))
    assert h == FACTOR or abs(h - height * ideal) <= FACTOR + 1e-6 or h * w == pixels
    assert w == FACTOR or abs(w - width * ideal) <= FACTOR + 1e-6 or h * w == pixels


@pytest.mark.parametrize("size", [(27, 500), (500, 27), (30, 6001), (1, 1)])
def test_unusable_frames_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ClipError, match="pixels"):
        smart_resize(*size, 50176)


def test_extreme_strip_keeps_one_token_of_height() -> None:
    h, w = smart_resize(30, 6000, 50176)
    assert h == FACTOR
    assert w > 0


def test_patches_stand_in_the_order_of_the_merger() -> None:
    """Against the definition, entry by entry."""
    t, h, w = 2, 4, 6
    pixels = np.random.default_rng(0).normal(size=(2 * t, 14 * h, 14 * w, 3)).astype(np.float32)
    patches = patchify(pixels)
    row = 0
    for step in range(t):
        for y in range(h // 2):
            for x in range(w // 2):
                for i in range(2):
                    for j in range(2):
                        top, left = (2 * y + i) * 14, (2 * x + j) * 14
                        block = pixels[2 * step : 2 * step + 2, top : top + 14, left : left + 14]
                        np.testing.assert_array_equal(patches[row], block.transpose(3, 0, 1, 2).ravel())
                        row += 1
    assert row == len(patches)


def test_values_are_normalised_as_clip_does() -> None:
    picture = np.full((2, 56, 56, 3), 255, np.uint8)
    features = vision_features(_frames(picture), dataclasses.replace(preset("training"), frames=2, pixels=56 * 56))
    expected = (1 - MEAN) / STD
    np.testing.assert_allclose(features.patches.reshape(-1, 3, 2, 14, 14)[0, :, 0, 0, 0], expected, rtol=1e-6)
    assert features.grid.second_per_grid == 2.0


def test_square_crop_takes_the_centre() -> None:
    pictures = np.arange(2 * 4 * 8 * 3, dtype=np.uint8).reshape(2, 4, 8, 3)
    np.testing.assert_array_equal(square_crop(pictures), pictures[:, :, 2:6])
    np.testing.assert_array_equal(square_crop(pictures.transpose(0, 2, 1, 3)), pictures.transpose(0, 2, 1, 3)[:, 2:6])


def test_release_preset_gives_squares_of_336_pixels() -> None:
    pictures = np.random.default_rng(1).integers(0, 256, (2, 90, 160, 3), np.uint8)
    features = vision_features(_frames(pictures), dataclasses.replace(preset("release"), frames=2))
    assert features.grid.thw == (1, 24, 24)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_clip_without_length_is_refused(seconds: float) -> None:
    with pytest.raises(ClipError, match="seconds"):
        vision_features(_frames(np.zeros((2, 56, 56, 3), np.uint8), seconds), preset("training"))


def test_the_last_of_an_odd_number_of_frames_stands_twice() -> None:
    pictures = np.random.default_rng(2).integers(0, 256, (3, 56, 56, 3), np.uint8)
    wave = preset("wave")
    odd, even = (vision_features(_frames(p, 1.5), wave) for p in (pictures, np.concatenate([pictures, pictures[-1:]])))
    np.testing.assert_array_equal(odd.patches, even.patches)
    assert odd.grid.thw == even.grid.thw == (2, 4, 4)
    assert odd.grid.second_per_grid == 1.0, "the three frames that were sampled decide on the time between steps"


def test_a_clip_without_frames_is_refused() -> None:
    with pytest.raises(ClipError, match="no frames"):
        vision_features(_frames(np.zeros((0, 56, 56, 3), np.uint8)), preset("training"))


def test_between_two_areas_a_frame_keeps_its_size() -> None:
    assert smart_resize(240, 320, 784, 176_400) == (252, 308)  # each side to the nearest multiple of 28
    assert smart_resize(720, 1280, 784, 176_400) == (308, 560)
    assert smart_resize(30, 40, 6_272, 50_176) == (84, 112)
    pictures = np.zeros((2, 240, 320, 3), np.uint8)
    assert vision_features(_frames(pictures), preset("wave")).grid.thw == (1, 18, 22)
    assert vision_features(_frames(pictures), preset("nemotron_mteb")).grid.thw == (1, 12, 18)
