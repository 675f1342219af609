"""The order of clips and every draw of a training run, each a pure function of the seed and of what it is for.

Up to WHOLE clips an epoch is shuffled as one. Of more, a place's clip is computed from the place, and the clips of a group are kept apart
within windows of steps, so that time and memory do not grow with N.

Letters: N clips of the source, U clips of a step, B clips of a micro-batch, G blocks that exchange features.
"""

from __future__ import annotations

import collections
import enum
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np

from omni_jax.types import InputError

WHOLE = 1 << 20  # clips that are shuffled as one
WINDOW = 1 << 16  # clips of a window, about
ROUNDS = 6  # of the Feistel network; four make a permutation that is hard to distinguish from a random one


class RngStream(enum.IntEnum):
    """What a random stream is for: streams of different purposes are independent."""

    ORDER = 1
    AUGMENT = 2
    SHUFFLE = 3
    CAPTION = 4
    REPLACE = 5
    MINED = 6


def generator(seed: int, purpose: RngStream, first: int, second: int = 0) -> np.random.Generator:
    """Returns the stream of one purpose and two numbers (step and clip, or epoch)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, int(purpose), first, second])))


def window_updates(count: int, per_update: int) -> int:
    """Returns the steps of a window: all of an epoch of up to WHOLE clips."""
    return max(1, count // per_update if count <= WHOLE else WINDOW // per_update)


def epoch_order(
    seed: int, epoch: int, count: int, per_update: int, groups: Callable[[np.ndarray], np.ndarray] | None = None, window: int = 0
) -> np.ndarray:
    """Returns the clips of a window of an epoch in order, (steps, U) int64: each clip at most once in an epoch, the last N mod U of the
    shuffle left out.

    Args:
      groups: gives clips (n,) their groups (n,) int: clips of a group do not share a step as long as the window has another place.
      window: its number; it holds `window_updates(count, per_update)` steps, or those that are left.

    Raises:
      InputError: where the source holds fewer clips than a step takes.
    """
    updates = count // per_update
    if not updates:
        raise InputError(f"{count} clips are fewer than the {per_update} of a step; lower batch.micro_batch or batch.micro_batches")
    length = window_updates(count, per_update)
    here = min(length, updates - window * length)
    if count <= WHOLE:
        order = generator(seed, RngStream.ORDER, epoch).permutation(count)
    else:
        start = window * length * per_update
        stop = count if here + window * length == updates else start + here * per_update
        order = shuffled(np.arange(start, stop), count, generator(seed, RngStream.ORDER, epoch))
    if groups is not None:
        order = _spread(order, groups(order), here, per_update)
    return order[: here * per_update].reshape(here, per_update)


def shuffled(places: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the clips (n,) int64 at some places of a shuffle of `count`, without the others.

    A Feistel network permutes the numbers below a power of four; one that comes out at `count` or above goes through it again.
    """
    bits = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))  # of half a number
    mask = np.uint64((1 << int(bits)) - 1)
    keys = rng.integers(0, 1 << 64, ROUNDS, np.uint64)
    found = places.astype(np.uint64)
    left = np.arange(len(found))
    while len(left):
        high, low = found[left] >> bits, found[left] & mask
        for key in keys:
            high, low = low, high ^ (_mixed(low ^ key) & mask)
        found[left] = high << bits | low
        left = left[found[left] >= count]
    return found.astype(np.int64)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Hashes uint64 numbers (the finalizer of SplitMix64)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def numbered(values: Iterable[Hashable]) -> np.ndarray:
    """Returns an int64 for each value, equal for equal ones, from 0 in the order in which they come."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], np.int64)


def _spread(order: np.ndarray, groups: np.ndarray, updates: int, per_update: int) -> np.ndarray:
    """Moves a clip whose group is in its step already to the next step that lacks the group, if any is left.

    Args:
      groups: of the clips, in their order.
    """
    stream = iter(zip(order.tolist(), groups.tolist(), strict=True))
    later: collections.OrderedDict[int, collections.deque[int]] = collections.OrderedDict()
    placed: list[int] = []
    for _ in range(updates):
        update: list[int] = []
        seen: set[int] = set()
        for group in list(later)[:per_update]:
            update.append(later[group].popleft())
            seen.add(group)
            if not later[group]:
                del later[group]
        while len(update) < per_update and (upcoming := next(stream, None)) is not None:
            clip, group = upcoming
            if group in seen:
                later.setdefault(group, collections.deque()).append(clip)
            else:
                update.append(clip)
                seen.add(group)
        while len(update) < per_update:  # the groups that are left are all here already
            group, clips = next(iter(later.items()))
            update.append(clips.popleft())
            if not clips:
                del later[group]
        placed += update
    return np.asarray(placed, np.int64)


def derangement(seed: int, micro_batch: int, clips: int, blocks: int) -> np.ndarray:
    """Returns a shuffle (G, B / G) int32 for micro-batch number `micro_batch` of the run: in each block one cycle through all its clips.

    A cycle leaves no clip in its place. Blocks of one clip, which have none, stay as they are.
    """
    rng = generator(seed, RngStream.SHUFFLE, micro_batch)
    size = clips // blocks
    shuffle = np.zeros((blocks, size), np.int32)
    for row in shuffle:
        cycle = rng.permutation(size)
        row[cycle] = np.roll(cycle, -1)
    return shuffle


def apart(shuffle: np.ndarray, same: np.ndarray) -> np.ndarray:
    """Returns a shuffle (G, B / G) in which clips take no feature that equals their own, as far as changes of two at a time allow it.

    Args:
      shuffle: as `derangement` makes it.
      same: (B,) int, equal numbers for clips of equal features (two without sound, say).
    """
    made = shuffle.copy()
    for row, numbers in zip(made, same.reshape(shuffle.shape), strict=True):
        for i in np.flatnonzero(numbers[row] == numbers):
            # Neither of the two is then left with its own, nor with one like it.
            others = np.flatnonzero((numbers[row] != numbers[i]) & (numbers != numbers[i]))
            if numbers[row[i]] == numbers[i] and len(others):
                row[i], row[others[0]] = row[others[0]], row[i]
    return made


def stand_ins(seed: int, update: int, place: int, held: np.ndarray, count: int, most: int) -> np.ndarray:
    """Returns clips that may stand in for the one at a place of a step (of all its micro-batches): first its own, then those of the
    other places, beginning with the next one's last, so that two places hardly take the same. Every process and repetition gets the same.

    Args:
      held: (U,) int, the clips of the step, none of which stands in.
      count: N.
      most: clips returned of each kind.
    """
    rng = generator(seed, RngStream.REPLACE, update)
    order = rng.permutation(count) if count <= WHOLE else shuffled(np.arange(2 * max(WINDOW, len(held))), count, rng)
    order = order[~np.isin(order, held)]
    number = np.arange(len(order))
    away = (number - place) % len(held)  # places between this one and the one that a clip belongs to
    others = np.lexsort((-number, away))[np.count_nonzero(away == 0) :]
    return np.concatenate([order[away == 0][:most], order[others][:most]])


def other_captions(seed: int, micro_batch: int, clips: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """Returns for each clip of a micro-batch (B,) the clip whose caption is its hard negative: never one of the same caption.

    Args:
      captions: of all N clips: others are looked at where the micro-batch holds no other caption.

    Raises:
      InputError: where all captions of the source are equal.
    """
    rng = generator(seed, RngStream.CAPTION, micro_batch)
    size = len(clips)
    texts = numbered(captions[clip] for clip in clips.tolist())
    chosen = clips.copy()
    for b, start in enumerate(rng.integers(0, size, size)):
        turned = np.roll(np.arange(size), -int(start))
        others = np.flatnonzero(texts[turned] != texts[b])
        if len(others):
            chosen[b] = clips[turned[others[0]]]
            continue
        own, first = captions[int(clips[b])], int(rng.integers(len(captions)))
        other = next((n for n in itertools.chain(range(first, len(captions)), range(first)) if captions[n] != own), None)
        if other is None:
            raise InputError("all captions are equal, so that none can be a hard negative; give clips captions of their own")
        chosen[b] = other
    return chosen
