"""The training batch: arrays of static shape for the micro-batches of one step, and their making from clips and prompts.

Letters: n micro-batches, B clips of a micro-batch, C copies of a clip (2 with an augmented one), t temporal steps, P patches,
c log-mel chunks, F fbank frames, R rows, S tokens, K prompts per row, G blocks of clips that exchange features, M media tokens of a copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from omni_jax.config import ModelConfig
from omni_jax.parallel import batch_axes, batch_shards
from omni_jax.tokens.packing import Group, MediaRows, row_batch
from omni_jax.towers import TOWERS, in_turn, media_tokens, table_rows, towers_of
from omni_jax.types import AudioBatch, BatchShapes, BeatsBatch, Example, InputError, MediaBatch, MicroBatch, RowBatch, StepKind, VisionBatch

for record in (VisionBatch, AudioBatch, BeatsBatch, MediaBatch, RowBatch):  # here, so that who packs without training needs no JAX
    names = [field.name for field in dataclasses.fields(record)]
    jax.tree_util.register_dataclass(record, [n for n in names if n != "max_tokens"], [n for n in names if n == "max_tokens"])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """One step's micro-batches.

    Attributes:
      clips: what the towers read, leading axes (n, B, C): the clip first, then its augmented copy where there is a positive.
      rows: leading axes (n, B, R), a row for each entry of `StepKind.rows`. `media_index` counts within the clip: its video tokens
        (t * P/4), Whisper tokens (c * 50), BEATs tokens (c * 50), then those of the augmented copy in the same order.
      hard: the hard negatives, a row each. None where there is none, or where it shares the anchor's row: then it follows its anchor
        there, with the anchor's media as its prefix (`StepKind.pooled`).
      shuffle: (n, G, B / G) int32: within each block of consecutive clips, whose features a clip's hard negative takes.
      hard_media: leading axes (n, B, 1): the clips whose sound or picture the hard negatives take in its place; what they do not take
        has no steps, chunks and frames. None where the kinds have no `hard_media`.
      kinds: the kind of each micro-batch.
    """

    clips: MediaBatch
    rows: RowBatch
    hard: RowBatch | None
    shuffle: Any
    hard_media: MediaBatch | None = None
    kinds: tuple[StepKind, ...] = dataclasses.field(metadata={"static": True}, default=())

    @property
    def micro_batches(self) -> int:
        return self.shuffle.shape[0]

    @property
    def clips_per_micro(self) -> int:
        return self.shuffle.shape[1] * self.shuffle.shape[2]


UpdateBatch = TrainBatch | tuple[TrainBatch, ...]
"""The micro-batches of a step: stacked, or, where their kinds differ, each by itself in the shapes of its kind."""


def fit_shapes(examples: Sequence[Example], kind: StepKind, share_prefix: bool = True) -> BatchShapes:
    """Returns the smallest sizes that hold these clips; the caller rounds them up to its buckets."""
    media = [m for e in examples for m in (e.media, e.augmented, e.hard_media) if m is not None]
    branches = kind.branches(share_prefix)
    rows = [
        sum(len(e.prompts[p].ids) for p in names) + (_rest(e) if branches and "anchor" in names else 0)
        for e in examples
        for names in kind.rows
    ]
    own = kind.hard is not None and not branches
    sizes = [tower.fit([getattr(m, tower.name) for m in media]) for tower in TOWERS]
    return BatchShapes(
        **{name: size for of_tower in sizes for name, size in of_tower.items()},
        row_tokens=max(rows),
        hard_tokens=max(len(e.prompts["hard"].ids) for e in examples) if own else 0,
    )


def pack_micro_batch(
    examples: Sequence[Example], kind: StepKind, shapes: BatchShapes, config: ModelConfig, shuffle: np.ndarray, share_prefix: bool = True
) -> TrainBatch:
    """Returns a batch of one micro-batch (n = 1).

    Args:
      shuffle: (G, B / G) int32; read where the kind exchanges features.
      share_prefix: a hard negative with another caption shares the anchor's row and media instead of having a row of its own.

    Raises:
      ConfigError: where a prefix would be shared and the backbone's attention is not causal.
      InputError: for a shuffle that is none: a fixed point, an index out of its block, blocks of one clip.
      ValueError: where something does not fit the shapes.
    """
    shuffle = np.asarray(shuffle, np.int32)
    if shuffle.ndim != 2 or shuffle.size != len(examples):
        raise ValueError(f"shuffle {shuffle.shape} must be (blocks, clips of a block) for {len(examples)} clips")
    if kind.shuffles:
        check_shuffle(shuffle)
    block, count = shuffle.shape[1], len(examples)
    taken = (shuffle + np.arange(0, shuffle.size, block)[:, None]).ravel()
    branches = kind.branches(share_prefix)
    config.check_share_prefix(branches)
    extra = media_tokens(shapes, config)
    # By number: the clips, their copies from `count` on, and from 2 * `count` on what hard negatives take from others.
    media = {b: _media_rows(e.media, shapes, config) for b, e in enumerate(examples)}
    for b, example in enumerate(examples) if kind.positive else ():
        if example.augmented is None:
            raise ValueError(f"clip {b}: the positive needs an augmented copy")
        copy = _media_rows(example.augmented, shapes, config)
        media[count + b] = MediaRows(copy.video + extra, copy.audio + extra)
    for b in range(count) if kind.hard else ():
        other = media[taken[b]]
        if kind.hard_media:
            if (given := examples[b].hard_media) is None:
                raise ValueError(f"clip {b}: the hard negative needs the clip whose {kind.hard} it takes")
            other = _media_rows(given, shapes, config)
        seen, heard = (other if kind.hard == name else media[b] for name in ("video", "audio"))
        media[2 * count + b] = MediaRows(seen.video, heard.audio)

    def groups(b: int, names: Sequence[str]) -> list[Group]:
        prompts = examples[b].prompts
        made = [Group(b + count * (name == "positive") + 2 * count * (name == "hard"), ((name, prompts[name]),)) for name in names]
        if branches and "anchor" in names:
            anchor, hard = prompts["anchor"], prompts["hard"]
            if anchor.prefix != hard.prefix or not np.array_equal(anchor.ids[: anchor.prefix], hard.ids[: anchor.prefix]):
                raise ValueError(f"clip {b}: the hard negative's media are not the anchor's")
            if kind.reach and names[0] != "anchor":
                raise ValueError(f"a row of {', '.join(names)}: with a known reach an anchor with a branch begins its row")
            made[names.index("anchor")] = Group(b, (("anchor", anchor), ("hard", hard)))
        return made

    for b, example in enumerate(examples) if kind.reach else ():
        sizes = {name: len(example.prompts[name].ids) for name in kind.prompts}
        longest = max(size + (_rest(example) if branches and name == "anchor" else 0) for name, size in sizes.items())
        if longest > kind.reach:
            raise ValueError(f"clip {b}: a prompt of {longest} tokens, more than the {kind.reach} that its step kind reaches")

    def rows(of_each: Sequence[Sequence[str]], size: int, slots: int) -> RowBatch:
        laid = [groups(b, names) for b in range(count) for names in of_each]
        flat = row_batch(laid, count=len(laid), size=size, slots=slots, media=media, pad=config.tokens.pad)
        return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), flat)

    copies = [e.augmented for e in examples if e.augmented is not None] if kind.positive else []
    sides = [_padded(one, shapes, config) for one in ([e.media for e in examples], copies) if one]
    taken_from = [e.hard_media for e in examples if e.hard_media is not None] if kind.hard_media else []
    batch = TrainBatch(
        clips=jax.tree.map(lambda *x: np.stack(x, axis=1), *sides),
        rows=rows(kind.rows, shapes.row_tokens, kind.slots(share_prefix)),
        hard=None if kind.hard is None or branches else rows([("hard",)], shapes.hard_tokens, 1),
        shuffle=shuffle,
        hard_media=jax.tree.map(lambda x: x[:, None], _exchanged(_padded(taken_from, shapes, config), kind)) if taken_from else None,
        kinds=(kind,),
    )
    return jax.tree.map(lambda x: x[None], batch)


def pack_update(micro_batches: Sequence[MicroBatch], shapes: Sequence[BatchShapes], *, config: ModelConfig) -> UpdateBatch:
    """Returns the batch of one step from this process's clips of each micro-batch, whose shapes are given.

    Hard negatives with another caption share their anchor's row where the backbone's attention is causal.

    Raises:
      As `pack_micro_batch`.
    """
    share = config.shares_prefix
    parts = [pack_micro_batch(m.examples, m.kind, s, config, m.shuffle, share) for m, s in zip(micro_batches, shapes, strict=True)]
    return stack_micro_batches(parts) if len({m.kind for m in micro_batches}) == 1 else tuple(parts)


def stack_micro_batches(batches: Sequence[TrainBatch]) -> TrainBatch:
    """Returns one batch of all micro-batches; they must agree in their shapes. Raises ValueError when they do not."""
    kinds = tuple(kind for batch in batches for kind in batch.kinds)
    plain = [dataclasses.replace(batch, kinds=()) for batch in batches]
    if len({jax.tree.structure(b) for b in plain}) > 1 or len({tuple(x.shape[1:] for x in jax.tree.leaves(b)) for b in plain}) > 1:
        raise ValueError("micro-batches in one batch must have the same arrays of the same shapes; leave different kinds apart")
    return dataclasses.replace(jax.tree.map(lambda *x: np.concatenate(x), *plain), kinds=kinds)


def check_shuffle(shuffle: np.ndarray) -> None:
    """Raises InputError unless each row of (G, B / G) names places of its block, none its own."""
    block = shuffle.shape[1]
    if block < 2:
        raise InputError("hard negatives that exchange audio or video need at least 2 clips in a block; use a larger micro-batch")
    if shuffle.min() < 0 or shuffle.max() >= block:
        raise InputError(f"shuffle indices must be 0 .. {block - 1}, places within their block")
    if (shuffle == np.arange(block)).any():
        raise InputError("a shuffle left a clip in its place; a hard negative would equal its anchor")


def place_update(update: UpdateBatch, mesh: Mesh | None) -> UpdateBatch:
    """Returns a step's micro-batches on the devices, as `place_batch` does."""
    return tuple(place_batch(batch, mesh) for batch in update) if isinstance(update, tuple) else place_batch(update, mesh)


def place_batch(batch: TrainBatch, mesh: Mesh | None) -> TrainBatch:
    """Returns the batch on the devices, clips split over the data and fsdp axes; each process gives its own clips.

    Raises:
      InputError: when the clips of a micro-batch do not divide evenly.
    """
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, batch)
    ways = batch_shards(mesh)
    clips = batch.clips_per_micro * jax.process_count()
    if clips % ways:
        raise InputError(
            f"a micro-batch of {clips} clips does not divide over {ways} batch shards ({' x '.join(batch_axes(mesh))}); change either"
        )
    split, whole = (NamedSharding(mesh, PartitionSpec(None, axes)) for axes in (batch_axes(mesh), None))

    def place(x: np.ndarray) -> jax.Array:
        x = np.asarray(x)
        if (x.shape[1] * jax.process_count()) % ways == 0:
            return jax.make_array_from_process_local_data(split, x)
        if jax.process_count() > 1:  # every device holds the blocks of all processes
            x = np.concatenate(multihost_utils.process_allgather(x), axis=1)
        return jax.make_array_from_callback(x.shape, whole, lambda index: x[index])

    return jax.tree.map(place, batch)


def _exchanged(media: MediaBatch, kind: StepKind) -> MediaBatch:
    """Returns clips (B, ...) with what a hard negative takes of them alone."""
    if kind.hard == "video":
        heard = jax.tree.map(lambda x: x[:, :0] if x.ndim > 1 else x, (media.audio, media.beats))
        return MediaBatch(media.vision, *heard)
    return dataclasses.replace(media, vision=jax.tree.map(lambda x: x[:, :0], media.vision))


def _rest(example: Example) -> int:
    """Tokens of the hard negative's branch: what follows the media."""
    return len(example.prompts["hard"].ids) - example.prompts["hard"].prefix


def _media_rows(media: MediaBatch, shapes: BatchShapes, config: ModelConfig) -> MediaRows:
    """Returns the places of a clip's tokens in its own media table."""
    first = 0
    rows: dict[str, list[np.ndarray]] = {"video": [], "audio": []}
    for tower in towers_of(config):
        items, each = tower.tokens(shapes, config)
        rows[tower.modality].append(table_rows(first, each, np.ravel(tower.valid(getattr(media, tower.name)))))
        first += items * each
    return MediaRows(in_turn(rows["video"]), in_turn(rows["audio"]))


def _padded(media: Sequence[MediaBatch], shapes: BatchShapes, config: ModelConfig) -> MediaBatch:
    """Returns clips of one size in one batch (B, ...)."""
    return MediaBatch(**{tower.name: tower.clips([getattr(m, tower.name) for m in media], shapes, config) for tower in TOWERS})
