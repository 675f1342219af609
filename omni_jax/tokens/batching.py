"""Features of a group of clips to one `EncoderBatch`: the towers' batches, the media table's layout, the decoder's rows.

Letters: N items, P patches, F frames, R rows, S tokens, K prompts per row, k audio tokens of a segment before doubling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from omni_jax.config import DecoderConfig, ModelConfig
from omni_jax.tokens.buckets import Piece, Planner, RowPlan
from omni_jax.tokens.packing import MediaRows, group_prompts, owners, row_batch
from omni_jax.towers import NAMES, TOWERS, Item, Tower, in_turn, table_rows
from omni_jax.types import SOURCE_AUDIO, SOURCE_VIDEO, EncoderBatch, RowBatch, TokenizedClip


def build_batches(
    clips: Sequence[TokenizedClip], config: ModelConfig, *, planner: Planner, share_prefix: bool | None = None
) -> EncoderBatch:
    """Returns everything the encoder needs for these clips, in static shapes that the planner chooses.

    Towers run only for media that some prompt contains.

    Args:
      share_prefix: whether prompts of a clip with the same media share its tokens; None: where the backbone's attention is causal.
      planner: remembers shapes between calls.

    Raises:
      ConfigError: where a prefix is to be shared and cannot be.
    """
    share_prefix = config.shares_prefix if share_prefix is None else share_prefix
    config.check_share_prefix(share_prefix)
    groups = [group for n, clip in enumerate(clips) for group in group_prompts(n, clip.sequences, share_prefix)]
    items = {tower: [(n, item) for n, clip in enumerate(clips) for item in _items(tower, clip, config)] for tower in TOWERS}
    plan = plan_group([clip_sizes(clip, config, share_prefix) for clip in clips], config, planner)

    taken = 0  # rows of the media table
    batches: dict[str, tuple[Any, ...]] = dict.fromkeys(NAMES, ())
    # Clip and modality -> part of the clip -> tower -> rows of each item.
    places: dict[tuple[int, str], dict[int, dict[str, list[np.ndarray]]]] = {}
    for tower, found in items.items():
        rows_of: dict[int, np.ndarray] = {}
        for piece in plan.media[tower.name]:
            batches[tower.name] += (tower.batch([found[n][1] for n in piece.items], piece.count, piece.size, config),)
            each = tower.width(piece.size, config)
            for place, n in enumerate(piece.items):
                rows_of[n] = table_rows(taken + place * each, each, [found[n][1].tokens])
            taken += piece.count * each
        for n, (clip, item) in enumerate(found):
            places.setdefault((clip, tower.modality), {}).setdefault(item.part, {}).setdefault(tower.name, []).append(rows_of[n])
    media = {clip: MediaRows(*(_in_order(places.get((clip, name), {})) for name in ("video", "audio"))) for clip in range(len(clips))}
    rows: list[RowBatch] = []
    owned: list[np.ndarray] = []
    for batch in plan.rows:
        filled = [[groups[g] for g in row] for row in batch.rows]
        rows.append(row_batch(filled, count=batch.count, size=batch.size, slots=batch.slots, media=media, pad=config.tokens.pad))
        owned.append(owners(filled, count=batch.count, slots=batch.slots))
    return EncoderBatch(
        **batches,
        rows=tuple(rows),
        owners=tuple(owned),
        used_tokens=plan.used,
        total_tokens=taken + sum(r.ids.size for r in rows),
        truncated=sum(any(s.truncated for s in clip.sequences.values()) for clip in clips),
    )


@dataclasses.dataclass(frozen=True)
class ClipSizes:
    """What the shapes that a clip is encoded in follow from; none of its pixels or samples.

    Attributes:
      media: tower's name -> size of each item, as in `towers.Item`.
      tokens: tokens that all items give.
      lengths, prompts: decoder tokens, and prompts, of each group of prompts that share a prefix.
    """

    media: Mapping[str, tuple[int, ...]]
    tokens: int
    lengths: tuple[int, ...]
    prompts: tuple[int, ...]


def clip_sizes(clip: TokenizedClip, config: ModelConfig, share_prefix: bool) -> ClipSizes:
    """Returns the sizes of a clip with its prompts."""
    groups = group_prompts(0, clip.sequences, share_prefix)
    items = {tower.name: _items(tower, clip, config) for tower in TOWERS}
    return ClipSizes(
        media={name: tuple(item.size for item in found) for name, found in items.items()},
        tokens=sum(item.tokens for found in items.values() for item in found),
        lengths=tuple(g.length for g in groups),
        prompts=tuple(len(g.prompts) for g in groups),
    )


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """The batches of a group of clips, by tower and of rows: items are numbered through the group. `used`: tokens without padding."""

    media: Mapping[str, list[Piece]]
    rows: list[RowPlan]
    used: int


def plan_group(sizes: Sequence[ClipSizes], config: ModelConfig, planner: Planner) -> GroupPlan:
    """Returns the batches that clips of these sizes are encoded in; the planner remembers their shapes."""
    lengths = [length for clip in sizes for length in clip.lengths]
    prompts = [count for clip in sizes for count in clip.prompts]
    used = sum(clip.tokens for clip in sizes) + sum(lengths)
    cost = planner.new_cost(used)
    return GroupPlan(
        media={t.name: planner.tower(t, [size for clip in sizes for size in clip.media[t.name]], cost, config) for t in TOWERS},
        rows=planner.rows(lengths, prompts, cost, attention_cost(config.decoder)) if lengths else [],
        used=used,
    )


def attention_cost(config: DecoderConfig) -> float:
    """Returns the operations of attention per token and token of the row, over those of a token's linear maps."""
    width, heads = config.hidden_size, config.num_heads + config.num_kv_heads
    linear = 2 * width * (2 * heads * config.head_dim + 3 * config.intermediate_size)
    return 4 * width / linear


def _items(tower: Tower, clip: TokenizedClip, config: ModelConfig) -> list[Item]:
    """Returns what a tower reads of a clip; nothing where no prompt has its tokens, or the backbone lacks it."""
    source = {"video": SOURCE_VIDEO, "audio": SOURCE_AUDIO}[tower.modality]
    read = tower.runs(config) and any((s.source == source).any() for s in clip.sequences.values())
    return tower.items(clip.features, config) if read else []


def _in_order(parts: Mapping[int, Mapping[str, list[np.ndarray]]]) -> np.ndarray:
    """Returns the rows of the media table with a clip's tokens of one modality, in the order of its prompts."""
    rows = [in_turn([np.concatenate(rows) for rows in of_towers.values()]) for of_towers in parts.values()]
    return np.concatenate([np.zeros(0, np.int32), *rows])
