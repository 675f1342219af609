"""The arguments of the programs as shapes with their places on a mesh: nothing is allocated.

Letters: n micro-batches, B clips of a micro-batch, C copies of a clip, R rows, S tokens, K prompts per row, G blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from omni_jax.config import ConfigError, ModelConfig, Preset
from omni_jax.model import abstract_params
from omni_jax.parallel import batch_axes, batch_shards
from omni_jax.tokens.batching import attention_cost
from omni_jax.tokens.buckets import row_size
from omni_jax.tokens.training import PromptLengths, lay_out
from omni_jax.towers import TOWERS, Tower
from omni_jax.towers.base import multiple_of
from omni_jax.train.batch import TrainBatch
from omni_jax.train.state import TrainState, array_shardings, state_shardings
from omni_jax.train.step import TrainStep
from omni_jax.train.trainable import Arrays
from omni_jax.types import BatchShapes, EncoderBatch, MediaBatch, RowBatch, StepKind

CAPTION_TOKENS = 128
TEMPLATE_TOKENS = 24  # of the chat template with a prefix, a bound
FILLER_TOKENS = 6  # "Please describe the video." and the end token
FRAMES_PER_SECOND = 100  # log-mel and fbank frames


def shape(dimensions: tuple[int, ...], dtype: Any, mesh: Mesh | AbstractMesh | None, spec: PartitionSpec | None = None) -> Any:
    """Returns an array's shape and dtype, placed on the mesh."""
    place = None if mesh is None else NamedSharding(mesh, spec or PartitionSpec())
    return jax.ShapeDtypeStruct(dimensions, dtype, sharding=place)


def abstract_state(step: TrainStep, config: ModelConfig, stored: Any = jnp.bfloat16) -> tuple[TrainState, Arrays]:
    """Returns the shapes of the state and of the frozen weights, as `TrainStep.init` would place them."""
    state, frozen = jax.eval_shape(step.start, abstract_params(config, stored))
    if step.mesh is None:
        return state, frozen
    places = state_shardings(state, config, step.mesh), array_shardings(frozen, config, step.mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), (state, frozen), places)


def planned_batch(
    config: ModelConfig, preset: Preset, kind: StepKind, *, caption_tokens: int = CAPTION_TOKENS, row_multiple: int = 8
) -> tuple[StepKind, BatchShapes]:
    """Returns a kind with the layout of its rows, and its static sizes, for square frames, full audio and captions of so many tokens.

    Args:
      row_multiple: rows are multiples of so many tokens.
    """
    media, video, heard = _media(config, preset)
    heard *= config.audio_repeat
    template = TEMPLATE_TOKENS if config.prompt == "chat" else 0
    text, filler = caption_tokens + 1 + template, FILLER_TOKENS + template
    clip = PromptLengths(video, heard, video, heard, caption=text, positive=text, hard=text, alone=text, filler=filler)
    share = config.shares_prefix
    kind = lay_out(kind, [clip], share_prefix=share, multiple=row_multiple, attention=attention_cost(config.decoder))
    row, hard = (multiple_of(row_multiple, n) for n in (clip.row(kind, share), clip.hard_row(kind, share)))
    kind = dataclasses.replace(kind, reach=clip.reach(kind, share))
    return kind, dataclasses.replace(media, row_tokens=row, hard_tokens=hard)


def abstract_batch(
    config: ModelConfig,
    kind: StepKind,
    shapes: BatchShapes,
    *,
    clips: int,
    micro_batches: int,
    blocks: int = 1,
    mesh: Mesh | AbstractMesh | None = None,
) -> TrainBatch:
    """Returns the shapes of one step's batch, as `pack_micro_batch` and `place_batch` make it.

    Args:
      clips: of a micro-batch, on all devices together.
      micro_batches: of one kind.

    Raises:
      ConfigError: where the clips do not divide over the batch shards, or into the blocks.
    """
    n = micro_batches
    ways = 1 if mesh is None else batch_shards(mesh)
    if clips % ways:
        axes = " x ".join(batch_axes(mesh)) if mesh is not None else ""
        raise ConfigError(f"micro-batch of {clips} clips does not divide over {ways} batch shards ({axes}); use a multiple of {ways}")
    if blocks < 1 or clips % blocks:
        raise ConfigError(f"micro-batch of {clips} clips does not divide into {blocks} blocks")

    def array(*dimensions: int, dtype: Any = jnp.int32) -> Any:
        even = dimensions[0] % ways == 0
        spec = PartitionSpec(None, batch_axes(mesh) if even and mesh is not None else None)
        return shape((n, *dimensions), dtype, mesh, spec)

    own = kind.hard is not None and not kind.branches(config.shares_prefix)

    def media(copies: int, modalities: Sequence[str] = ("video", "audio")) -> MediaBatch:
        none = dataclasses.replace(shapes, steps=0, chunks=0, fbank_frames=0)
        sizes = {tower.name: shapes if tower.modality in modalities else none for tower in TOWERS}
        return MediaBatch(**{tower.name: tower.abstract(array, (clips, copies), sizes[tower.name], config) for tower in TOWERS})

    return TrainBatch(
        clips=media(1 + kind.positive),
        rows=_row_batch(array, (clips, len(kind.rows)), shapes.row_tokens, kind.slots(config.shares_prefix)),
        hard=_row_batch(array, (clips, 1), shapes.hard_tokens, 1) if own else None,
        shuffle=array(blocks, clips // blocks),
        hard_media=media(1, [kind.hard or ""]) if kind.hard_media else None,
        kinds=(kind,) * n,
    )


def _media(config: ModelConfig, preset: Preset) -> tuple[BatchShapes, int, int]:
    """Returns the sizes of a clip's media with square frames of the preset's largest area, and its tokens of video and of one audio tower.

    Raises:
      ConfigError: where frames have no bound, or sound has no length.
    """
    if not preset.most_frames:
        raise ConfigError(f"preset field fps={preset.fps:g} without max_frames has no one shape; plan with a limit, as in max_frames=64")
    frames = round(preset.audio_seconds * FRAMES_PER_SECOND)
    if not frames:
        raise ConfigError("preset field audio_seconds=0 (whole tracks) has no one shape; plan with a length, as in audio_seconds=8")
    side = 28 * max(1, round(math.sqrt(preset.areas[1]) / 28)) // config.vision.patch_size
    steps, patches = -(-preset.most_frames // config.vision.temporal_patch_size), side**2
    fbank = multiple_of(config.beats.patch_size, frames) if config.beats else 0
    shapes = BatchShapes(steps, patches, -(-frames // config.audio.chunk_frames), fbank, 0)
    return shapes, steps * patches // config.vision.merge_size**2, ((frames - 1) // 2 + 1) // 2


def _row_batch(array: Callable[..., Any], rows: tuple[int, ...], size: int, slots: int) -> RowBatch:
    ids, media_index, segment, branch = (array(*rows, size) for _ in range(4))
    return RowBatch(ids, media_index, array(*rows, 3, size), segment, branch, array(*rows, slots))


def abstract_encoder_batch(config: ModelConfig, preset: Preset, clips: int, caption_tokens: int = CAPTION_TOKENS) -> EncoderBatch:
    """Returns the shapes of a batch of the embedding pass: the six tables of each clip in two rows."""
    shapes, video, heard = _media(config, preset)
    text = caption_tokens + 1
    # video and tv share a row's prefix, as audio and at do; then av, and the caption alone.
    sound = config.audio_repeat * heard
    tokens = (video + 2 + 6 + text) + (sound + 2 + 6 + text) + (video + sound + 4 + 6) + text
    if not config.shares_prefix:  # each prompt has its own media, and a template
        tokens += video + sound + 6 * TEMPLATE_TOKENS
    rows, size, slots = 2 * clips, row_size(-(-tokens // 2)), 4

    def array(*dimensions: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(dimensions, dtype)

    media: dict[str, Any] = {tower.name: tower.abstract(array, (clips,), shapes, config) for tower in TOWERS}
    media["beats"] = dataclasses.replace(media["beats"], max_tokens=heard)
    batches: dict[str, Any] = {tower.name: (_items(tower, media[tower.name], array),) * tower.runs(config) for tower in TOWERS}
    return EncoderBatch(
        **batches, rows=(_row_batch(array, (rows,), size, slots),), owners=(array(rows, slots, 2),), used_tokens=0, total_tokens=0
    )


def _items(tower: Tower, batch: Any, array: Callable[..., Any]) -> Any:
    """Returns a batch of clips with their items on one axis."""
    flat = {}
    for name, axes in tower.fields.items():
        x = getattr(batch, name)
        lead = len(x.shape) - axes
        flat[name] = array(math.prod(x.shape[:lead]), *x.shape[lead:], dtype=x.dtype)
    return dataclasses.replace(batch, **flat)
