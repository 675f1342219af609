"""The frames that each sampler takes: cases read off the reference and mteb, and what holds for every clip."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_jax.config import PRESETS, Preset
from omni_jax.media.sampling import sample_indices
from omni_jax.types import ClipError

CASES = [
    # n, fps of the clip, rule -> frames
    (100, 25.0, Preset(frames=8), [0, 14, 28, 42, 56, 70, 84, 99]),
    (100, 25.0, Preset(frames=8, frame_rounding="nearest"), [0, 14, 28, 42, 57, 71, 85, 99]),
    (100, 25.0, Preset(frames=8, frame_rounding="stride"), [0, 12, 24, 36, 48, 60, 72, 84]),
    (5, 25.0, Preset(frames=8), [0, 0, 1, 1, 2, 2, 3, 4]),
    (5, 25.0, Preset(frames=8, frame_rounding="nearest"), [0, 0, 1, 1, 2, 3, 3, 4]),
    (5, 25.0, Preset(frames=8, frame_rounding="stride"), [0, 1, 2, 3, 4, 0, 1, 2]),
    (1, 25.0, Preset(frames=8, frame_rounding="nearest"), [0] * 8),
    # A frame each half second: 3.3 s are 6.6 steps, seven frames in training and six in mteb.
    (33, 10.0, Preset(frames=8, fps=2), np.linspace(0, 32, 7, dtype=int).tolist()),
    (33, 10.0, Preset(frames=8, fps=2, frame_rounding="nearest"), [0, 6, 13, 19, 26, 32]),
    (33, 10.0, Preset(frames=8, fps=2, frame_rounding="stride"), [0, 5, 10, 15, 20, 25]),
    (330, 10.0, Preset(frames=8, fps=2, max_frames=3), [0, 164, 329]),
    (3, 30.0, Preset(frames=8, fps=2, max_frames=64), [0]),
    (2, 1.0, Preset(frames=8, fps=4, frame_rounding="nearest"), [0, 1]),  # no more than there are
    (2, 1.0, Preset(frames=8, fps=4), [0, 0, 0, 0, 0, 0, 0, 1]),
]


@pytest.mark.parametrize(("count", "rate", "rule", "expected"), CASES)
def test_frames_of_known_clips(count: int, rate: float, rule: Preset, expected: list[int]) -> None:
    indices, seconds = sample_indices(count, rate, rule)
    assert indices.tolist() == expected and indices.dtype == np.int64
    assert seconds == count / rate


@given(
    count=st.integers(1, 4000),
    rate=st.floats(1, 120),
    frames=st.integers(1, 64).map(lambda n: 2 * n),
    rounding=st.sampled_from(["floor", "nearest", "stride"]),
    fps=st.sampled_from([0.0, 0.5, 2.0]),
    span=st.none() | st.tuples(st.floats(0, 0.99), st.floats(0.01, 3)),
)
def test_frames_lie_in_the_clip_and_rise(count: int, rate: float, frames: int, rounding: str, fps: float, span) -> None:
    rule = Preset(frames=frames, fps=fps, max_frames=16 if fps else 0, frame_rounding=rounding)
    length = count / rate
    times = (span[0] * length, span[0] * length + span[1]) if span else None
    indices, seconds = sample_indices(count, rate, rule, times)
    assert 0 < seconds <= length + 1e-9
    assert len(indices) == frames if not fps else 1 <= len(indices) <= 16
    assert indices.min() >= 0 and indices.max() < count
    assert rounding == "stride" or (np.diff(indices) >= 0).all()
    if times is not None:
        assert indices.min() >= min(round(times[0] * rate), count - 1)


def test_every_rule_keeps_to_the_interval() -> None:
    for rounding, expected in (("floor", [10, 13, 16, 20]), ("nearest", [10, 13, 17, 20]), ("stride", [10, 12, 14, 16])):
        assert sample_indices(100, 10.0, Preset(frames=4, frame_rounding=rounding), (1.0, 2.0))[0].tolist() == expected
    with pytest.raises(ClipError, match="start at 10 s"):
        sample_indices(100, 10.0, Preset(frames=4), (10.0, 12.0))


def test_presets_name_their_rule() -> None:
    rules = [PRESETS[name] for name in ("training", "wave", "mteb")]
    fields = [(rule.frames, rule.fps, rule.max_frames, rule.frame_rounding) for rule in rules]
    assert fields == [(8, 0.0, 0, "floor"), (8, 2.0, 128, "floor"), (8, 0.0, 0, "nearest")]
    for count in (3, 100):
        assert sample_indices(count, 25.0, 8)[0].tolist() == sample_indices(count, 25.0, PRESETS["training"])[0].tolist()
