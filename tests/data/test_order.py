"""The order of clips, exchanges and other captions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_jax.data import order
from omni_jax.data.order import RngStream, apart, derangement, epoch_order, generator, other_captions, shuffled, stand_ins
from omni_jax.types import InputError


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 3), st.integers(0, 9))
def test_an_epoch_holds_every_clip_once_but_for_an_incomplete_last_update(count: int, size: int, epoch: int, seed: int):
    if count < size:
        with pytest.raises(InputError, match=f"{count} clips are fewer than the {size} of a step"):
            epoch_order(seed, epoch, count, size)
        return
    found = epoch_order(seed, epoch, count, size)
    assert found.shape == (count // size, size)
    assert len(set(found.ravel().tolist())) == found.size
    assert set(found.ravel().tolist()) <= set(range(count))


@pytest.mark.parametrize(("count", "size", "whole", "length"), [(2000, 30, 0, 300), (1999, 7, 0, 64), (40, 40, 0, 8)])
def test_an_epoch_in_windows_holds_every_clip_once(count: int, size: int, whole: int, length: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(order, "WHOLE", whole)
    monkeypatch.setattr(order, "WINDOW", length)
    each = order.window_updates(count, size)
    windows = [epoch_order(5, 1, count, size, lambda clips: clips // 2, window) for window in range(-(-(count // size) // each))]
    made = np.concatenate(windows)
    assert made.shape == (count // size, size) and all(len(window) == each for window in windows[:-1])
    assert len(np.unique(made)) == made.size and made.min() >= 0 and made.max() < count
    if each > 1:
        assert all(len(set((update // 2).tolist())) == size for update in made[: each - 1]), "both clips of a group in one update"
    assert not np.array_equal(made, np.concatenate([epoch_order(5, 2, count, size, None, w) for w in range(len(windows))]))


@given(st.integers(2, 3000), st.integers(0, 9))
def test_places_of_a_shuffle_are_each_clip_once(count: int, seed: int):
    places = np.arange(count)
    made = shuffled(places, count, np.random.default_rng(seed))
    assert np.array_equal(np.sort(made), places)
    assert np.array_equal(shuffled(places[::-3], count, np.random.default_rng(seed)), made[::-3]), "a place does not depend on the others"


def test_a_shuffle_looks_like_chance():
    """Displacements and successors of 60,000 places lie where those of a random permutation do, within five standard deviations."""
    count = 60_000
    made = shuffled(np.arange(count), count, np.random.default_rng(3))
    cells = np.histogram2d(np.arange(count), made, bins=20)[0]
    steps = np.histogram((np.diff(made) % count), bins=20, range=(0, count))[0]
    for found, mean in ((cells, count / 400), (steps, count / 20)):
        assert np.abs(found - mean).max() < 5 * np.sqrt(mean)


def test_stand_ins_of_many_clips_are_distinct_and_not_held(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(order, "WHOLE", 10)
    monkeypatch.setattr(order, "WINDOW", 100)
    held = np.arange(0, 5000, 500)
    own = [stand_ins(1, 2, place, held, 5000, 8) for place in range(10)]
    assert all(len(set(drawn.tolist())) == len(drawn) == 16 for drawn in own)
    assert not set(held.tolist()) & {int(clip) for drawn in own for clip in drawn}
    assert len({int(clip) for drawn in own for clip in drawn[:8]}) == 80, "no two places take the same"


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(epoch_order(seed, epoch, 50, 5).ravel()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(st.lists(st.integers(0, 30), min_size=1, max_size=80), st.integers(1, 8), st.integers(0, 5))
def test_spreading_groups_loses_and_doubles_no_clip(groups: list[int], size: int, seed: int):
    if len(groups) < size:
        return
    found = epoch_order(seed, 0, len(groups), size, np.array(groups).__getitem__)
    assert len(set(found.ravel().tolist())) == found.size


@pytest.mark.parametrize("seed", range(5))
def test_two_clips_of_a_group_do_not_meet_in_an_update(seed: int):
    groups = np.arange(200) // 2
    found = epoch_order(seed, 0, 200, 48, groups.__getitem__)
    assert [len(set(groups[update].tolist())) for update in found] == [48] * 4
    plain = epoch_order(seed, 0, 200, 48)
    assert any(len(set(groups[update].tolist())) < 48 for update in plain)


def test_streams_differ_by_purpose_and_by_both_numbers():
    keys = [(p, a, b) for p in RngStream for a in range(3) for b in range(3)]
    assert len({generator(0, *key).integers(1 << 62) for key in keys}) == len(keys)


@given(st.integers(1, 6), st.integers(2, 20), st.integers(0, 1000))
def test_an_exchange_is_a_permutation_of_each_block_without_a_fixed_point(blocks: int, size: int, number: int):
    shuffle = derangement(3, number, blocks * size, blocks)
    assert shuffle.shape == (blocks, size)
    assert (np.sort(shuffle, axis=1) == np.arange(size)).all()
    assert (shuffle != np.arange(size)).all()


def test_exchanges_differ_by_block_and_micro_batch():
    assert len({tuple(row) for number in range(5) for row in derangement(0, number, 64, 4).tolist()}) == 20


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.integers(0, 100))
def test_a_hard_caption_is_never_the_clips_own(texts: list[int], number: int):
    captions = [str(text) for text in (*texts, 7)]
    chosen = other_captions(0, number, np.arange(len(texts)), captions)
    found = [captions[clip] for clip in chosen]
    assert all(caption != captions[place] for place, caption in enumerate(found))
    assert set(found) <= ({"7"} if len(set(texts)) == 1 else set(captions[:-1]))


def test_captions_that_are_all_equal_cannot_be_hard_negatives():
    with pytest.raises(InputError, match="all captions are equal"):
        other_captions(0, 0, np.arange(4), ["a"] * 9)


@given(
    size=st.integers(2, 8),
    blocks=st.integers(1, 3),
    number=st.integers(0, 50),
    labels=st.lists(st.integers(0, 3), min_size=24, max_size=24),
)
def test_clips_that_are_alike_exchange_nothing_where_that_can_be_helped(size: int, blocks: int, number: int, labels: list[int]):
    same = np.array(labels[: size * blocks])
    shuffle = derangement(7, number, size * blocks, blocks)
    made = apart(shuffle, same)
    assert np.array_equal(apart(shuffle, np.arange(size * blocks)), shuffle), "where all differ nothing is changed"
    for row, numbers in zip(made, same.reshape(blocks, size), strict=True):
        assert sorted(row) == list(range(size)) and (row != np.arange(size)).all()
        most = np.bincount(numbers).max()
        alike = int((numbers[row] == numbers).sum())
        assert alike == max(0, 2 * most - size), "more than half alike must meet one another; the others need not"


def test_stand_ins_of_two_places_differ_while_there_are_enough():
    held = np.arange(8)
    own = [stand_ins(3, 5, place, held, 40, 256) for place in range(8)]
    first = [drawn[:4].tolist() for drawn in own]
    assert sorted(clip for drawn in first for clip in drawn) == list(range(8, 40))
    assert all(sorted(drawn.tolist()) == list(range(8, 40)) for drawn in own)
    assert [drawn[4] for drawn in own] == [own[(place + 1) % 8][3] for place in range(8)], "else the last of the next place's own"
    assert np.array_equal(stand_ins(3, 5, 2, held, 40, 256), own[2]) and not np.array_equal(stand_ins(3, 6, 2, held, 40, 256), own[2])
    assert stand_ins(3, 5, 0, held, 8, 256).size == 0
