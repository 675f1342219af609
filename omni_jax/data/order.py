"""The order of clips and every draw of a training run, each a pure function of the seed and of what it is for.

Letters: N clips of the source, U clips of an update, B clips of a micro-batch, G blocks that exchange features.
"""

from __future__ import annotations

import collections
import enum

import numpy as np

from omni_jax.types import InputError


class Draw(enum.IntEnum):
    """What a random stream is for: streams of different purposes are independent."""

    ORDER = 1
    AUGMENT = 2
    SHUFFLE = 3
    CAPTION = 4
    REPLACE = 5


def generator(seed: int, purpose: Draw, first: int, second: int = 0) -> np.random.Generator:
    """Returns the stream of one purpose and two numbers (update and clip, or epoch)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, int(purpose), first, second])))


def epoch_order(seed: int, epoch: int, count: int, per_update: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Returns the clips of an epoch in order, (updates, U) int64: each clip at most once, the last N mod U of the shuffle left out.

    Args:
      groups: (N,) int, clips of a group do not share an update as long as there is another place for them.

    Raises:
      InputError: where the source holds fewer clips than an update takes.
    """
    updates = count // per_update
    if not updates:
        raise InputError(f"{count} clips are fewer than the {per_update} of an update; lower batch.micro_batch or batch.micro_batches")
    order = generator(seed, Draw.ORDER, epoch).permutation(count)
    if groups is not None and len(np.unique(groups)) < count:
        order = _spread(order, groups, updates, per_update)
    return order[: updates * per_update].reshape(updates, per_update)


def _spread(order: np.ndarray, groups: np.ndarray, updates: int, per_update: int) -> np.ndarray:
    """Moves a clip whose group is in its update already to the next update that lacks the group, if any is left."""
    stream = iter(order.tolist())
    later: collections.OrderedDict[int, collections.deque[int]] = collections.OrderedDict()
    placed: list[int] = []
    group_of = groups.tolist()
    for _ in range(updates):
        update: list[int] = []
        seen: set[int] = set()
        for group in list(later)[:per_update]:
            update.append(later[group].popleft())
            seen.add(group)
            if not later[group]:
                del later[group]
        while len(update) < per_update and (clip := next(stream, None)) is not None:
            group = group_of[clip]
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


def exchange(seed: int, micro_batch: int, clips: int, blocks: int) -> np.ndarray:
    """Returns a shuffle (G, B / G) int32 for micro-batch number `micro_batch` of the run: in each block one cycle through all its clips.

    A cycle leaves no clip in its place. Blocks of one clip, which have none, stay as they are.
    """
    rng = generator(seed, Draw.SHUFFLE, micro_batch)
    size = clips // blocks
    shuffle = np.zeros((blocks, size), np.int32)
    for row in shuffle:
        cycle = rng.permutation(size)
        row[cycle] = np.roll(cycle, -1)
    return shuffle


def apart(shuffle: np.ndarray, same: np.ndarray) -> np.ndarray:
    """Returns a shuffle (G, B / G) in which clips take no feature that equals their own, as far as changes of two at a time allow it.

    Args:
      shuffle: as `exchange` makes it.
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
    """Returns clips that may stand in for the one at a place of an update (of all its micro-batches): first its own, then those of the
    other places, beginning with the next one's last, so that two places hardly take the same. Every process and repetition gets the same.

    Args:
      held: (U,) int, the clips of the update, none of which stands in.
      count: N.
      most: clips returned of each kind.
    """
    order = generator(seed, Draw.REPLACE, update).permutation(count)
    order = order[~np.isin(order, held)]
    number = np.arange(len(order))
    away = (number - place) % len(held)  # places between this one and the one that a clip belongs to
    others = np.lexsort((-number, away))[np.count_nonzero(away == 0) :]
    return np.concatenate([order[away == 0][:most], order[others][:most]])


def other_captions(seed: int, micro_batch: int, texts: np.ndarray, everywhere: np.ndarray) -> np.ndarray:
    """Returns for each clip of a micro-batch the text number of a hard negative: another clip's, never its own.

    Args:
      texts: (B,) int, number of each clip's caption; equal captions have equal numbers.
      everywhere: (N,) int, the same of all clips: read where the micro-batch holds no other caption.

    Raises:
      InputError: where all captions of the source are equal.
    """
    rng = generator(seed, Draw.CAPTION, micro_batch)
    size = len(texts)
    chosen = texts.copy()
    for b, start in enumerate(rng.integers(0, size, size)):
        turned = np.roll(texts, -int(start))
        others = np.flatnonzero(turned != texts[b])
        if len(others):
            chosen[b] = turned[others[0]]
            continue
        turned = np.roll(everywhere, -int(rng.integers(len(everywhere))))
        others = np.flatnonzero(turned != texts[b])
        if not len(others):
            raise InputError("all captions are equal, so that none can be a hard negative; give clips captions of their own")
        chosen[b] = turned[others[0]]
    return chosen
