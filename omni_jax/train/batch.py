"""The training batch: arrays of static shape for the micro-batches of one update, and their making from clips and prompts.

Letters: n micro-batches, B clips of a micro-batch, C copies of a clip (2 with an augmented one), t temporal steps, P patches,
c log-mel chunks, F fbank frames, R rows, S tokens, K prompts per row, G blocks of clips that exchange features, M media tokens of a copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from omni_jax.config import ModelConfig
from omni_jax.parallel import batch_axes, batch_shards
from omni_jax.types import (
    PATCHES_PER_TOKEN,
    SOURCE_AUDIO,
    SOURCE_VIDEO,
    BatchShapes,
    ClipMedia,
    Example,
    InputError,
    MicroBatch,
    StepKind,
    TokenSequence,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TowerInputs:
    """What the towers read: the clip first, then its augmented copy where there is a positive.

    Attributes:
      patches: (n, B, C, t, P, 1176) float32; coords: (n, B, C, t, P, 2) int32; window: (n, B, C, t, P) int32, -1 for padding.
      mel: (n, B, C, c, 200, 128) float32; mel_frames: (n, B, C, c) int32.
      fbank: (n, B, C, F, 128) float32; fbank_frames: (n, B, C) int32.
    """

    patches: Any
    coords: Any
    window: Any
    mel: Any
    mel_frames: Any
    fbank: Any
    fbank_frames: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed decoder rows; fields as in `types.RowBatch`.

    `media_index` counts within the clip: its video tokens (t * P/4), Whisper tokens (c * 50), BEATs tokens (c * 50), then those of the
    augmented copy in the same order.

    Attributes:
      ids, media_index, segment, branch: (n, B, R, S) int32.
      positions: (n, B, R, 3, S) int32.
      pool: (n, B, R, K) int32.
    """

    ids: Any
    media_index: Any
    positions: Any
    segment: Any
    branch: Any
    pool: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """One update's micro-batches.

    Attributes:
      clips: what the towers read.
      rows: a row for each entry of `StepKind.rows`.
      hard: the hard negatives, a row each. None where there is none, or where it shares the anchor's row: then it is the last prompt
        pooled there, with the anchor's media as its prefix.
      shuffle: (n, G, B / G) int32: within each block of consecutive clips, whose features a clip's hard negative takes.
      kinds: the kind of each micro-batch.
    """

    clips: TowerInputs
    rows: Rows
    hard: Rows | None
    shuffle: Any
    kinds: tuple[StepKind, ...] = dataclasses.field(metadata={"static": True}, default=())

    @property
    def micro_batches(self) -> int:
        return self.clips.patches.shape[0]

    @property
    def clips_per_micro(self) -> int:
        return self.clips.patches.shape[1]


UpdateBatch = TrainBatch | tuple[TrainBatch, ...]
"""The micro-batches of an update: stacked, or, where their kinds differ, each by itself in the shapes of its kind."""


def fit_shapes(examples: Sequence[Example], kind: StepKind, share_prefix: bool = True) -> BatchShapes:
    """Returns the smallest sizes that hold these clips; the caller rounds them up to its buckets."""
    media = [m for e in examples for m in (e.media, e.augmented) if m is not None]
    branches = kind.branches(share_prefix)
    rows = [
        sum(len(e.prompts[p].ids) for p in names) + (_rest(e) if branches and "anchor" in names else 0)
        for e in examples
        for names in kind.rows
    ]
    own = kind.hard is not None and not branches
    return BatchShapes(
        steps=max(m.vision.patches.shape[0] for m in media),
        patches=max(m.vision.patches.shape[1] for m in media),
        chunks=max(m.audio.mel.shape[0] for m in media),
        fbank_frames=max(m.beats.fbank.shape[1] for m in media),
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
    block = shuffle.shape[1]
    taken = (shuffle + np.arange(0, shuffle.size, block)[:, None]).ravel()
    extra = shapes.media_tokens(config.audio.chunk_tokens, config.audio_repeat)
    places = [_places(e.media, shapes, config) for e in examples]
    branches = kind.branches(share_prefix)
    config.check_share_prefix(branches)
    rows = _empty_rows(len(examples), len(kind.rows), shapes.row_tokens, kind.slots(share_prefix), config.tokens.pad)
    hard = None if kind.hard is None or branches else _empty_rows(len(examples), 1, shapes.hard_tokens, 1, config.tokens.pad)
    for b, example in enumerate(examples):
        copy = None
        if kind.positive:
            if example.augmented is None:
                raise ValueError(f"clip {b}: the positive needs an augmented copy")
            copy = {s: p + extra for s, p in _places(example.augmented, shapes, config).items()}
        for r, names in enumerate(kind.rows):
            filled = [(example.prompts[name], copy if name == "positive" and copy is not None else places[b]) for name in names]
            start = _fill_row(rows, b, r, filled)
            if branches and "anchor" in names:
                _fill_branch(rows, b, r, names, start, example)
        if hard is not None:
            source = {SOURCE_VIDEO: taken[b] if kind.hard == "video" else b, SOURCE_AUDIO: taken[b] if kind.hard == "audio" else b}
            _fill_row(hard, b, 0, [(example.prompts["hard"], {s: places[c][s] for s, c in source.items()})])
    if config.beats is None:  # clips may carry a filter bank all the same
        shapes = dataclasses.replace(shapes, fbank_frames=0)
    copies = [e.augmented for e in examples if e.augmented is not None] if kind.positive else []
    inputs = [_tower_inputs(media, shapes) for media in ([e.media for e in examples], copies) if media]
    batch = TrainBatch(
        clips=jax.tree.map(lambda *x: np.stack(x, axis=1), *inputs),
        rows=rows,
        hard=hard,
        shuffle=shuffle,
        kinds=(kind,),
    )
    return jax.tree.map(lambda x: x[None], batch)


def pack_update(micro_batches: Sequence[MicroBatch], shapes: Sequence[BatchShapes], *, config: ModelConfig) -> UpdateBatch:
    """Returns the batch of one update from this process's clips of each micro-batch, whose shapes are given.

    Hard negatives with another caption share their anchor's row where the backbone's attention is causal.

    Raises:
      As `pack_micro_batch`.
    """
    share = config.shares_prefix
    parts = [pack_micro_batch(m.examples, m.kind, s, config, m.shuffle, share) for m, s in zip(micro_batches, shapes, strict=True)]
    return stack_micro_batches(parts) if len({m.kind for m in micro_batches}) == 1 else tuple(parts)


def stack_micro_batches(batches: Sequence[TrainBatch]) -> TrainBatch:
    """Returns one batch of all micro-batches; they must agree in their shapes.

    Raises:
      ValueError: when they do not.
    """
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
    """Returns an update's micro-batches on the devices, as `place_batch` does."""
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


def _rest(example: Example) -> int:
    """Tokens of the hard negative's branch: what stands behind the media."""
    return len(example.prompts["hard"].ids) - example.prompts["hard"].prefix


def _places(media: ClipMedia, shapes: BatchShapes, config: ModelConfig) -> dict[int, np.ndarray]:
    """Source -> media-table rows of a clip's video tokens and of its doubled audio tokens."""
    step, valid = shapes.patches // PATCHES_PER_TOKEN, int((media.vision.window[0] >= 0).sum()) // PATCHES_PER_TOKEN
    video = (np.arange(media.vision.patches.shape[0])[:, None] * step + np.arange(valid)).ravel()
    audio = shapes.chunks * config.audio.chunk_tokens
    pairs = np.stack([r * audio + np.arange(audio) for r in range(config.audio_repeat)], axis=1)[: int(media.beats.tokens[0])]
    return {SOURCE_VIDEO: video, SOURCE_AUDIO: shapes.steps * step + pairs.ravel()}


def _empty_rows(clips: int, count: int, size: int, slots: int, pad: int) -> Rows:
    shape = (clips, count, size)
    return Rows(
        ids=np.full(shape, pad, np.int32),
        media_index=np.full(shape, -1, np.int32),
        positions=np.zeros((clips, count, 3, size), np.int32),
        segment=np.zeros(shape, np.int32),
        branch=np.zeros(shape, np.int32),
        pool=np.zeros((clips, count, slots), np.int32),
    )


def _media_index(sequence: TokenSequence, places: Mapping[int, np.ndarray]) -> np.ndarray:
    index = np.full(len(sequence.ids), -1, np.int32)
    for source, rows in places.items():
        here = sequence.source == source
        wanted = sequence.source_index[here]
        if len(wanted) and wanted.max() >= len(rows):
            raise ValueError(f"a prompt has {wanted.max() + 1} tokens of a medium whose clip has {len(rows)}")
        index[here] = rows[wanted]
    return index


def _fill_row(rows: Rows, b: int, r: int, prompts: Sequence[tuple[TokenSequence, Mapping[int, np.ndarray]]]) -> int:
    """Writes prompts, each with the places of its media, one after another as segments of their own; returns the first free token."""
    start, size = 0, rows.ids.shape[-1]
    for k, (prompt, places) in enumerate(prompts):
        span = slice(start, start + len(prompt.ids))
        if span.stop > size:
            raise ValueError(f"clip {b}: prompts of {sum(len(p.ids) for p, _ in prompts)} tokens do not fit a row of {size}")
        rows.ids[b, r, span] = prompt.ids
        rows.media_index[b, r, span] = _media_index(prompt, places)
        rows.positions[b, r, :, span] = prompt.positions
        rows.segment[b, r, span] = k + 1
        rows.pool[b, r, k] = span.stop - 1
        start = span.stop
    return start


def _fill_branch(rows: Rows, b: int, r: int, names: Sequence[str], start: int, example: Example) -> None:
    """Makes the anchor's caption one branch of its media, and writes the hard negative's as another, from `start` on."""
    anchor, hard, size = example.prompts["anchor"], example.prompts["hard"], rows.ids.shape[-1]
    prefix, rest = anchor.prefix, _rest(example)
    if prefix != hard.prefix or not np.array_equal(anchor.ids[:prefix], hard.ids[:prefix]):
        raise ValueError(f"clip {b}: the hard negative's media are not the anchor's")
    if start + rest > size:
        raise ValueError(f"clip {b}: prompts and the hard negative's caption, {start + rest} tokens, do not fit a row of {size}")
    k = names.index("anchor")
    end = rows.pool[b, r, k] + 1
    first, span = end - len(anchor.ids) + prefix, slice(start, start + rest)
    rows.ids[b, r, span] = hard.ids[prefix:]
    rows.positions[b, r, :, span] = hard.positions[:, prefix:]
    rows.segment[b, r, span] = k + 1
    rows.branch[b, r, first:end] = 1
    rows.branch[b, r, span] = 2
    rows.pool[b, r, len(names)] = span.stop - 1 if rest else first - 1


def _tower_inputs(media: Sequence[ClipMedia], shapes: BatchShapes) -> TowerInputs:
    t, p, c, f = shapes.steps, shapes.patches, shapes.chunks, shapes.fbank_frames
    return TowerInputs(
        patches=_pad([m.vision.patches for m in media], (t, p)),
        coords=_pad([m.vision.coords for m in media], (t, p)),
        window=_pad([m.vision.window for m in media], (t, p), fill=-1),
        mel=_pad([m.audio.mel for m in media], (c,)),
        mel_frames=_pad([m.audio.frames for m in media], (c,)),
        fbank=_pad([m.beats.fbank[0] if f else m.beats.fbank[0, :0] for m in media], (f,)),
        fbank_frames=np.concatenate([m.beats.frames for m in media]).astype(np.int32),
    )


def _pad(arrays: Sequence[np.ndarray], sizes: tuple[int, ...], fill: int = 0) -> np.ndarray:
    """Stacks arrays, their leading axes padded to `sizes`."""
    out = np.full((len(arrays), *sizes, *arrays[0].shape[len(sizes) :]), fill, arrays[0].dtype)
    for n, array in enumerate(arrays):
        if any(have > size for have, size in zip(array.shape, sizes, strict=False)):
            raise ValueError(f"an array of shape {array.shape} does not fit the batch's {sizes}")
        out[(n, *(slice(0, s) for s in array.shape[: len(sizes)]))] = array
    return out
