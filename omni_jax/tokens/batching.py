"""Features of a group of clips to one `EncoderBatch`: the towers' batches, the media table's layout, the decoder's rows.

Letters: N items, P patches, F frames, R rows, S tokens, K prompts per row, k audio tokens of a segment before doubling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from omni_jax.config import DecoderConfig, ModelConfig, Preset
from omni_jax.tokens.buckets import BEATS_PATCH, Piece, Planner, RowPlan, beats_tokens
from omni_jax.tokens.packing import MediaRows, group_prompts, owners, row_batch
from omni_jax.tokens.prompts import build_sequences
from omni_jax.tokens.tokenizer import Tokenizer
from omni_jax.types import (
    SOURCE_AUDIO,
    SOURCE_VIDEO,
    AudioBatch,
    AudioSegment,
    BeatsBatch,
    EncoderBatch,
    Features,
    RowBatch,
    TokenSequence,
    VisionBatch,
    VisionFeatures,
)

__all__ = ["Planner", "build_batches", "clip_sizes", "mel_chunks", "plan_group", "step_layout", "whole_patches"]

NONE = np.zeros(0, np.int32)


def build_batches(
    features: Sequence[Features],
    tables: Sequence[str],
    tokenizer: Tokenizer,
    config: ModelConfig,
    preset: Preset,
    *,
    share_prefix: bool | None = None,
    planner: Planner,
    sequences: Sequence[Mapping[str, TokenSequence]] | None = None,
) -> EncoderBatch:
    """Returns everything the encoder needs for these clips, in static shapes that the planner chooses.

    A clip gets a prompt for each requested table whose modalities it has; towers run only for media that some prompt contains.

    Args:
      share_prefix: whether prompts of a clip with the same media share its tokens; None: where the backbone's attention is causal.
      planner: remembers shapes between calls.
      sequences: what `build_sequences` returned for each clip, where the caller has built them (to set bad captions aside).

    Raises:
      ConfigError: where a prefix is to be shared and cannot be.
      ClipError: where a prompt cannot be built (build sequences one by one to know which clip).
    """
    share_prefix = config.shares_prefix if share_prefix is None else share_prefix
    config.check_share_prefix(share_prefix)
    if sequences is None:
        sequences = [build_sequences(f, tables, tokenizer, config, preset) for f in features]
    groups = [g for clip, found in enumerate(sequences) for g in group_prompts(clip, found, share_prefix)]
    seen = [c for c in range(len(features)) if _contains(sequences[c], SOURCE_VIDEO)]
    heard = [c for c in range(len(features)) if _contains(sequences[c], SOURCE_AUDIO)]
    steps = [(c, t) for c in seen for t in range(_vision(features[c]).grid.thw[0])]
    segments = [(c, s) for c in heard for s in features[c].audio or ()]
    sizes = [clip_sizes(f, found, config, share_prefix) for f, found in zip(features, sequences, strict=True)]
    plan = plan_group(sizes, config, planner)

    table = _Table()
    video_rows: dict[int, list[np.ndarray]] = {}
    vision = _vision_batches(plan.vision, steps, features, config, table, video_rows)
    chunks = [mel_chunks(s, config) for _, s in segments]
    audio, whisper = _audio_batches(plan.audio, chunks, config, table)
    beats: tuple[BeatsBatch, ...] = ()
    streams = [whisper]
    if config.beats is not None:
        beats, second = _beats_batches(plan.beats, segments, table)
        streams.append(second)

    heard_rows: dict[int, list[np.ndarray]] = {}
    for (clip, s), *rows_of in zip(segments, *streams, strict=True):
        # Whisper's and BEATs' tokens in turn; Whisper's alone for a backbone without BEATs.
        heard_rows.setdefault(clip, []).append(np.stack([r[: s.tokens] for r in rows_of], axis=1).ravel())
    media = {
        clip: MediaRows(np.concatenate([NONE, *video_rows.get(clip, [])]), np.concatenate([NONE, *heard_rows.get(clip, [])]))
        for clip in range(len(features))
    }
    rows: list[RowBatch] = []
    owned: list[np.ndarray] = []
    for batch in plan.rows:
        filled = [[groups[g] for g in row] for row in batch.rows]
        rows.append(row_batch(filled, count=batch.count, size=batch.size, slots=batch.slots, media=media, pad=config.tokens.pad))
        owned.append(owners(filled, count=batch.count, slots=batch.slots))
    return EncoderBatch(
        vision=vision,
        audio=audio,
        beats=beats,
        rows=tuple(rows),
        owners=tuple(owned),
        used_tokens=plan.used,
        total_tokens=table.rows + sum(r.ids.size for r in rows),
        truncated=sum(any(s.truncated for s in found.values()) for found in sequences),
    )


@dataclasses.dataclass(frozen=True)
class ClipSizes:
    """What the shapes that a clip is encoded in follow from; none of its pixels or samples.

    Attributes:
      steps: merged tokens of each temporal step.
      tokens: audio tokens of each segment.
      frames: fbank frames of each segment, in whole patches.
      chunks: log-mel chunks of all segments.
      lengths, prompts: decoder tokens, and prompts, of each group of prompts that share a prefix.
    """

    steps: tuple[int, ...]
    tokens: tuple[int, ...]
    frames: tuple[int, ...]
    chunks: int
    lengths: tuple[int, ...]
    prompts: tuple[int, ...]


def clip_sizes(features: Features, sequences: Mapping[str, TokenSequence], config: ModelConfig, share_prefix: bool) -> ClipSizes:
    """Returns the sizes of a clip with its prompts, as `build_sequences` returned them."""
    groups = group_prompts(0, sequences, share_prefix)
    steps: tuple[int, ...] = ()
    if _contains(sequences, SOURCE_VIDEO):
        t, h, w = _vision(features).grid.thw
        steps = (h * w // config.vision.merge_size**2,) * t
    segments = (features.audio or ()) if _contains(sequences, SOURCE_AUDIO) else ()
    return ClipSizes(
        steps=steps,
        tokens=tuple(s.tokens for s in segments),
        frames=tuple(map(whole_patches, segments)),
        chunks=sum(len(mel_chunks(s, config)) for s in segments),
        lengths=tuple(g.length for g in groups),
        prompts=tuple(len(g.prompts) for g in groups),
    )


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """The batches of a group of clips: items are numbered through the whole group. `used` counts tokens without padding."""

    vision: list[Piece]
    audio: list[Piece]
    beats: list[Piece]
    rows: list[RowPlan]
    used: int


def plan_group(sizes: Sequence[ClipSizes], config: ModelConfig, planner: Planner) -> GroupPlan:
    """Returns the batches that clips of these sizes are encoded in; the planner remembers their shapes."""

    def all_of(name: str) -> list[int]:
        return [value for clip in sizes for value in getattr(clip, name)]

    steps, frames, lengths = all_of("steps"), all_of("frames"), all_of("lengths")
    used = sum(steps) + config.audio_repeat * sum(all_of("tokens")) + sum(lengths)
    cost = planner.new_cost(used)
    return GroupPlan(
        vision=planner.vision(steps, cost),
        audio=planner.audio(sum(clip.chunks for clip in sizes), config.audio.chunk_tokens, cost),
        beats=planner.beats(frames, cost) if frames and config.beats is not None else [],
        rows=planner.rows(lengths, all_of("prompts"), cost, attention_cost(config.decoder)) if lengths else [],
        used=used,
    )


def attention_cost(config: DecoderConfig) -> float:
    """Returns the operations of attention per token and token of the row, over those of a token's linear maps."""
    width, heads = config.hidden_size, config.num_heads + config.num_kv_heads
    linear = 2 * width * (2 * heads * config.head_dim + 3 * config.intermediate_size)
    return 4 * width / linear


def step_layout(h: int, w: int, merge_size: int, window_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns coords (h*w, 2) and window (h*w,) int32 of one temporal step's patches, in the order (h/2, w/2, 2, 2).

    Coordinates are row and column in patches; windows are squares of `window_tokens` merged tokens, numbered by rows.
    """
    rows, columns = h // merge_size, w // merge_size
    y, x, i, j = np.meshgrid(np.arange(rows), np.arange(columns), np.arange(merge_size), np.arange(merge_size), indexing="ij")
    coords = np.stack([(y * merge_size + i).ravel(), (x * merge_size + j).ravel()], axis=1).astype(np.int32)
    window = (y // window_tokens) * -(-columns // window_tokens) + x // window_tokens
    return coords, window.ravel().astype(np.int32)


class _Table:
    """Counts rows of the media table as batches are laid out."""

    def __init__(self) -> None:
        self.rows = 0

    def take(self, count: int) -> int:
        """Returns the first of `count` new rows."""
        self.rows += count
        return self.rows - count


def _vision_batches(
    pieces: list[Piece],
    steps: list[tuple[int, int]],
    features: Sequence[Features],
    config: ModelConfig,
    table: _Table,
    rows: dict[int, list[np.ndarray]],
) -> tuple[VisionBatch, ...]:
    """Fills vision batches; `rows` receives each clip's rows of the media table, a list over temporal steps."""
    merge = config.vision.merge_size**2
    batches = []
    for piece in pieces:
        patches = piece.size * merge
        batch = VisionBatch(
            patches=np.zeros((piece.count, patches, config.vision.patch_values), np.float32),
            coords=np.zeros((piece.count, patches, 2), np.int32),
            window=np.full((piece.count, patches), -1, np.int32),
        )
        first = table.take(piece.count * piece.size)
        for n, item in enumerate(piece.items):
            clip, t = steps[item]
            steps_of_clip, h, w = _vision(features[clip]).grid.thw
            size = h * w
            batch.patches[n, :size] = _vision(features[clip]).patches[t * size : (t + 1) * size]
            batch.coords[n, :size], batch.window[n, :size] = step_layout(h, w, config.vision.merge_size, config.vision.window_tokens)
            start = first + n * piece.size
            rows.setdefault(clip, [NONE] * steps_of_clip)[t] = np.arange(start, start + size // merge, dtype=np.int32)
        batches.append(batch)
    return tuple(batches)


def mel_chunks(segment: AudioSegment, config: ModelConfig) -> list[np.ndarray]:
    """Returns the segment's log-mel, transposed, in pieces (frames, 128); pieces too short for a token are left out."""
    frames = config.audio.chunk_frames
    pieces = [segment.log_mel[:, start : start + frames].T for start in range(0, segment.log_mel.shape[1], frames)]
    return [p for p in pieces if _chunk_tokens(len(p)) > 0]


def _chunk_tokens(frames: int) -> int:
    return ((frames - 1) // 2 + 1) // 2


def _audio_batches(
    pieces: list[Piece], chunks: list[list[np.ndarray]], config: ModelConfig, table: _Table
) -> tuple[tuple[AudioBatch, ...], list[np.ndarray]]:
    """Returns audio batches and, per segment, the media rows of its Whisper tokens."""
    flat = [c for of_segment in chunks for c in of_segment]
    first = np.zeros(len(flat), np.int64)
    batches = []
    for piece in pieces:
        batch = AudioBatch(
            mel=np.zeros((piece.count, config.audio.chunk_frames, config.audio.num_mel_bins), np.float32),
            frames=np.zeros(piece.count, np.int32),
        )
        start = table.take(piece.count * config.audio.chunk_tokens)
        for n, item in enumerate(piece.items):
            batch.mel[n, : len(flat[item])] = flat[item]
            batch.frames[n] = len(flat[item])
            first[item] = start + n * config.audio.chunk_tokens
        batches.append(batch)
    rows, done = [], 0
    for of_segment in chunks:
        places = [first[done + i] + np.arange(_chunk_tokens(len(c))) for i, c in enumerate(of_segment)]
        rows.append(np.concatenate([NONE, *places]).astype(np.int32))
        done += len(of_segment)
    return tuple(batches), rows


def whole_patches(segment: AudioSegment) -> int:
    """Returns the fbank frames that fill whole patches of BEATs."""
    return len(segment.fbank) // BEATS_PATCH * BEATS_PATCH


def _beats_batches(
    pieces: list[Piece], segments: list[tuple[int, AudioSegment]], table: _Table
) -> tuple[tuple[BeatsBatch, ...], list[np.ndarray]]:
    """Returns BEATs batches and, per segment, the media rows of its BEATs tokens."""
    rows = [NONE] * len(segments)
    batches = []
    for piece in pieces:
        most = beats_tokens(piece.size)
        batch = BeatsBatch(
            fbank=np.zeros((piece.count, piece.size, segments[0][1].fbank.shape[1]), np.float32),
            frames=np.zeros(piece.count, np.int32),
            tokens=np.zeros(piece.count, np.int32),
            max_tokens=most,
        )
        first = table.take(piece.count * most)
        for n, item in enumerate(piece.items):
            segment = segments[item][1]
            frames = whole_patches(segment)
            if segment.tokens > most:
                raise ValueError(f"a segment of {len(segment.fbank)} fbank frames cannot have {segment.tokens} tokens")
            batch.fbank[n, :frames] = segment.fbank[:frames]
            batch.frames[n] = frames
            batch.tokens[n] = segment.tokens
            rows[item] = np.arange(first + n * most, first + n * most + segment.tokens, dtype=np.int32)
        batches.append(batch)
    return tuple(batches), rows


def _contains(sequences: Mapping[str, TokenSequence], source: int) -> bool:
    return any((s.source == source).any() for s in sequences.values())


def _vision(features: Features) -> VisionFeatures:
    assert features.vision is not None
    return features.vision
