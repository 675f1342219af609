"""Static shapes: sizes, the planner's memory, and how much a mixed job compiles and pads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_jax.config import TABLES, BeatsConfig, ModelConfig, preset
from omni_jax.features.audio import KALDI_WINDOW
from omni_jax.tokens.batching import Planner, clip_sizes, plan_group
from omni_jax.tokens.buckets import cover, round_up, row_size
from omni_jax.tokens.prompts import build_sequences
from omni_jax.tokens.tokenizer import Tokenizer
from omni_jax.towers.base import MAX_PAIRS
from omni_jax.towers.beats import beats_tokens
from omni_jax.types import EncoderBatch, Features, TokenizedClip
from tests.golden_set import find
from tests.tokens import synthetic
from tests.tokens.batched import batched

GOLDEN = find("OMNI_GOLDEN", "wave_tiny")
CONFIG = ModelConfig.from_hf(GOLDEN.config, BeatsConfig())
TOKENIZER = Tokenizer.from_pretrained(GOLDEN.checkpoint)

MOST_PROGRAMS = 16
MOST_PADDING = 0.20


def test_sizes_have_three_significant_bits() -> None:
    assert sorted({round_up(n) for n in range(1, 161)}) == [
        *range(1, 9),
        10,
        12,
        14,
        16,
        20,
        24,
        28,
        32,
        40,
        48,
        56,
        64,
        80,
        96,
        112,
        128,
        160,
    ]
    assert sorted({row_size(n) for n in range(1, 2049)}) == [*range(16, 129, 16), *range(256, 1025, 128), 1280, 1536, 1792, 2048]


@given(value=st.integers(1, 10**6), unit=st.sampled_from([1, 16, 128]))
def test_round_up_wastes_less_than_a_fifth(value: int, unit: int) -> None:
    size = round_up(value, unit)
    assert size >= value
    assert size % unit == 0
    assert size - value < max(unit, size / 5 + unit)


@given(samples=st.integers(400, 4_800_000))
def test_fbank_frames_bound_the_tokens(samples: int) -> None:
    """Any segment fits the token rows that its fbank frames, cut to whole patches, are given."""
    frames = ((samples - KALDI_WINDOW) // 160 + 1) // 16 * 16
    mel = -(-samples // 160)
    assert ((mel - 1) // 2 + 1) // 2 <= beats_tokens(frames)


@settings(deadline=None)
@given(
    needs=st.lists(st.integers(1, 100), max_size=40),
    known=st.sets(st.tuples(st.integers(1, 8), st.integers(1, 120)), max_size=4),
    largest=st.integers(1, 16),
    multiple=st.integers(1, 4),
    new_cost=st.floats(0, 1000),
)
def test_cover_holds_every_item_once(needs: list[int], known: set, largest: int, multiple: int, new_cost: float) -> None:
    known = {(count * multiple, size) for count, size in known}
    pieces, cost = cover(needs, known=known, fit=round_up, limit=lambda size: largest, new_cost=new_cost, multiple=multiple)
    assert sorted(i for p in pieces for i in p.items) == list(range(len(needs)))
    for p in pieces:
        assert 1 <= len(p.items) <= p.count
        assert p.count % multiple == 0
        assert (p.count, p.size) in known or p.count <= max(largest, multiple)
        assert all(needs[i] <= p.size for i in p.items)
    assert cost >= sum(p.count * p.size for p in pieces) - sum(needs)


def _shapes(batch: EncoderBatch) -> set[tuple]:
    return {
        *(("vision", v.patches.shape) for v in batch.vision),
        *(("audio", a.mel.shape) for a in batch.audio),
        *(("beats", b.fbank.shape, b.max_tokens) for b in batch.beats),
        *(("rows", r.ids.shape, r.pool.shape) for r in batch.rows),
    }


def _measure(features: Sequence[Features], name: str, group: int, planner: Planner) -> tuple[int, float]:
    """Returns (programs, padded share) of a job with all tables."""
    shapes: set[tuple] = set()
    used = total = 0
    for start in range(0, len(features), group):
        batch = batched(features[start : start + group], TABLES, TOKENIZER, CONFIG, preset(name), planner=planner)
        shapes |= _shapes(batch)
        used, total = used + batch.used_tokens, total + batch.total_tokens
    assert len(shapes) == planner.programs
    return len(shapes), 1 - used / total


@pytest.mark.jit
@pytest.mark.parametrize(
    ("name", "seconds", "multiple"),
    [("training", (8.0, 8.0), 1), ("mteb", (1.0, 60.0), 1), ("training", (8.0, 8.0), 8), ("mteb", (1.0, 60.0), 8)],
)
def test_200_mixed_clips_compile_and_pad_little_golden(name: str, seconds: tuple[float, float], multiple: int) -> None:
    features = synthetic.clips(200, preset(name), seed=3, seconds=seconds)
    programs, padded = _measure(features, name, 16, Planner(row_multiple=multiple))
    print(f"{name}, {seconds[0]:g}-{seconds[1]:g} s, rows in multiples of {multiple}: {programs} programs, {padded:.1%} padded")
    assert programs <= MOST_PROGRAMS
    assert padded <= MOST_PADDING


def test_a_second_pass_compiles_nothing_golden() -> None:
    features = synthetic.clips(40, preset("mteb"), seed=5, seconds=(1.0, 30.0))
    planner = Planner()
    _measure(features, "mteb", 8, planner)
    first = planner.programs
    for _ in range(2):
        _measure(features, "mteb", 8, planner)
    assert planner.programs <= first + 1


def test_plans_are_deterministic_golden() -> None:
    features = synthetic.clips(12, preset("mteb"), seed=6, seconds=(1.0, 20.0))
    one, two = (batched(features, TABLES, TOKENIZER, CONFIG, preset("mteb"), planner=Planner()) for _ in range(2))
    assert _shapes(one) == _shapes(two)
    for a, b in zip((*(rows.ids for rows in one.rows), *one.owners), (*(rows.ids for rows in two.rows), *two.owners), strict=True):
        np.testing.assert_array_equal(a, b)


def test_groups_planned_from_sizes_and_learned_shapes_are_those_of_one_planner_golden() -> None:
    """So a group may be planned where its clips are not, and encoded where no other group was."""
    features, chosen = synthetic.clips(30, preset("mteb"), seed=9, seconds=(1.0, 30.0)), preset("mteb")
    together, ahead = Planner(), Planner()
    for start in range(0, len(features), 6):
        group = features[start : start + 6]
        sequences = [build_sequences(clip, TABLES, TOKENIZER, CONFIG, chosen) for clip in group]
        before = ahead.known()
        plan_group(
            [clip_sizes(TokenizedClip(*pair), CONFIG, CONFIG.shares_prefix) for pair in zip(group, sequences, strict=True)], CONFIG, ahead
        )
        elsewhere = Planner(before)
        one, two = (batched(group, TABLES, TOKENIZER, CONFIG, chosen, planner=planner) for planner in (together, elsewhere))
        assert _shapes(one) == _shapes(two)
        assert together.known() == elsewhere.known() == ahead.known()


def test_equal_audio_gets_an_exact_beats_shape_golden() -> None:
    features = synthetic.clips(16, preset("training"), seed=7, seconds=(8.0, 8.0))
    batch = batched(features, ("audio",), TOKENIZER, CONFIG, preset("training"), planner=Planner())
    assert {(b.fbank.shape[1], b.max_tokens) for b in batch.beats} == {(784, 200)}
    assert sum(b.fbank.shape[0] for b in batch.beats) == 16


def test_a_long_track_does_not_stretch_its_neighbours_golden() -> None:
    """One 290 s clip among short ones: rows and BEATs batches of its own, and attention of bounded size."""
    features = [
        *synthetic.clips(7, preset("mteb"), seed=8, seconds=(2.0, 4.0)),
        *synthetic.clips(1, preset("mteb"), seed=9, seconds=(290.0, 290.0)),
    ]
    batch = batched(features, TABLES, TOKENIZER, CONFIG, preset("mteb"), planner=Planner())
    assert 1 - batch.used_tokens / batch.total_tokens <= MOST_PADDING
    assert min(r.ids.shape[1] for r in batch.rows) <= 4096
    assert any(r.ids.shape[1] > 4096 and r.ids.shape[0] == 1 for r in batch.rows)
    for b in batch.beats:
        count, frames, _ = b.fbank.shape
        assert count == 1 or count * (frames // 2) ** 2 <= MAX_PAIRS
