"""The vision tower's rungs, against windows cut out of the grid one by one."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.model import Encoder, vision
from omni_jax.model.rope import vision_angles
from tests.model import builders, reference_towers
from tests.model.reference import Weights
from tests.tolerances import assert_close

pytestmark = pytest.mark.jit

CFG = builders.ODD.vision
# In patches; windows are 6x6 patches. Partial at the right, below, both; one row of tokens; smaller than a window.
GRIDS = [(12, 18), (8, 14), (2, 10), (4, 2)]


def window_numbers(height: int, width: int) -> np.ndarray:
    """(P,): the window of each patch."""
    numbers = np.full(height * width, -1)
    for number, members in enumerate(reference_towers.windows(height, width, CFG)):
        numbers[members] = number
    return numbers


@pytest.fixture(scope="module")
def steps() -> dict[str, np.ndarray]:
    """Every grid as one temporal step, padded to one size with noise that nothing may see."""
    size = max(h * w for h, w in GRIDS) + 8
    batch = {
        "patches": builders.noise(1, len(GRIDS), size, CFG.patch_values),
        "coords": np.zeros((len(GRIDS), size, 2), np.int32),
        "window": np.full((len(GRIDS), size), -1, np.int32),
    }
    for n, (h, w) in enumerate(GRIDS):
        batch["coords"][n, : h * w] = reference_towers.patch_order(h, w, CFG.merge_size)
        batch["window"][n, : h * w] = window_numbers(h, w)
    return batch


@pytest.mark.parametrize("full", [False, True], ids=["window", "full"])
@pytest.mark.parametrize("part", ["attention", "block"])
def test_one_block(full: bool, part: str):
    height, width = 8, 14
    places = reference_towers.patch_order(height, width, CFG.merge_size)
    groups = [list(range(height * width))] if full else reference_towers.windows(height, width, CFG)
    numbers = np.zeros(height * width, int) if full else window_numbers(height, width)
    turns = vision_angles(jnp.asarray(places)[None], CFG.head_dim, CFG.rope_theta)
    mask = (numbers[:, None] == numbers[None])[None]
    x = builders.noise(2, 1, height * width, CFG.hidden_size)

    kind, want = {
        "attention": (vision.Attention, reference_towers.vision_attention),
        "block": (vision.Block, reference_towers.vision_block),
    }[part]
    module, w = builders.random_part(lambda: kind(builders.maker(), CFG))
    assert_close(builders.run(module, x, jnp.cos(turns), jnp.sin(turns), mask)[0], want(w, CFG, x[0], places, groups), "layer")


def test_tower(odd: tuple[Encoder, Weights], steps: dict[str, np.ndarray]):
    encoder, w = odd
    got = builders.run(encoder, *steps.values(), method="video_tokens")
    for n, (height, width) in enumerate(GRIDS):
        want = reference_towers.vision_tower(w / "vision", CFG, steps["patches"][n, : height * width], height, width)
        assert_close(got[n, : len(want)], want, "video_tokens")


def test_windows_and_full_blocks_both_matter(odd: tuple[Encoder, Weights], steps: dict[str, np.ndarray]):
    """The tower test could not tell window from full attention if both gave nearly the same numbers."""
    encoder, _ = odd
    got = builders.run(encoder, *steps.values(), method="video_tokens")
    one_window = {**steps, "window": np.minimum(steps["window"], 0)}
    other = builders.run(encoder, *one_window.values(), method="video_tokens")
    assert np.abs(got[0] - other[0]).max() > 1e-2


def test_padding_alone_gives_finite_tokens(odd: tuple[Encoder, Weights], steps: dict[str, np.ndarray]):
    encoder, _ = odd
    empty = {**steps, "window": np.full_like(steps["window"], -1)}
    assert np.isfinite(builders.run(encoder, *empty.values(), method="video_tokens")).all()
