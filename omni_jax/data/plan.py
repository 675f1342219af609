"""What a step holds before anything is read: its clips, its hard negatives, the length of its rows. The same in every process.

Letters: M micro-batches, B clips of a micro-batch over all processes, G blocks that exchange features.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from omni_jax.config import BeatsConfig, ConfigError, ModelConfig, Preset
from omni_jax.config.batches import AugmentConfig, BatchSection
from omni_jax.config.errors import check_choices
from omni_jax.data.augment import augment_text
from omni_jax.data.clips import same_as
from omni_jax.data.negatives import MinedNegatives
from omni_jax.data.order import RngStream, apart, derangement, epoch_order, generator, numbered, other_captions, window_updates
from omni_jax.data.sources import ClipSource, fbank_frames, tokens_of
from omni_jax.features.audio import HOP
from omni_jax.tokens.batching import attention_cost
from omni_jax.tokens.buckets import round_up
from omni_jax.tokens.prompts import text_tokens
from omni_jax.tokens.tokenizer import Tokenizer
from omni_jax.tokens.training import PromptLengths, lay_out
from omni_jax.towers.base import multiple_of
from omni_jax.types import PATCHES_PER_TOKEN, BatchShapes, InputError, StepKind

DISTINCT = ("none", "caption", "id_prefix")
SAMPLED_UPDATES = 32  # steps whose lengths decide on the sizes of rows
WORTH = 0.9  # a second size must save a tenth of the tokens: it costs a compilation


@dataclasses.dataclass(frozen=True)
class BatchConfig(BatchSection):
    """The making of batches.

    Attributes:
      distinct: what a step holds once only, as far as there are others: "caption": no caption twice; "id_prefix": no two ids that agree
        up to their last "-"; "none".
      seed: of every draw.
    """

    distinct: str = "caption"
    seed: int = 2025

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, "data field ", distinct=DISTINCT)
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must not be negative")


@dataclasses.dataclass(frozen=True)
class UpdatePlan:
    """One step before anything is read.

    Attributes:
      update: its number, from 0.
      kinds: of its micro-batches, with the layout of their rows.
      clips: (M, B) int64, numbers of the source's clips.
      texts: (M, B) int64, the clip whose caption each clip's hard negative has; the clip itself where no text is exchanged.
      mined: (M, B) int64, the clip whose caption, sound or picture each hard negative takes; -1: none is mined.
      shuffles: M of (G, B / G) int32.
      shapes: static sizes of each micro-batch's arrays, equal for equal kinds.
    """

    update: int
    kinds: tuple[StepKind, ...]
    clips: np.ndarray
    texts: np.ndarray
    mined: np.ndarray
    shuffles: tuple[np.ndarray, ...]
    shapes: tuple[BatchShapes, ...]

    def taken(self, micro: int) -> np.ndarray:
        """Returns for each place of a micro-batch the place whose features it takes."""
        shuffle = self.shuffles[micro]
        return (shuffle + np.arange(0, shuffle.size, shuffle.shape[1])[:, None]).ravel()


class Planner:
    """Plans of steps, each a pure function of the seed and its number. Nothing is held that grows with N beyond `order.WHOLE` clips.

    Attributes:
      source, batch: as given.
      updates_per_epoch: whole steps in one pass over the clips.
      negatives: mined hard negatives; None takes all from the other clips of a step.
    """

    def __init__(
        self,
        source: ClipSource,
        batch: BatchConfig,
        kinds: Callable[[int], tuple[StepKind, ...]],
        tokenizer: Tokenizer,
        config: ModelConfig,
        preset: Preset,
        augment: AugmentConfig,
        negatives: MinedNegatives | None = None,
    ) -> None:
        """Checks that the clips allow what the step kinds ask.

        Raises:
          InputError: for fewer clips than a step takes, blocks of one clip where features are exchanged, captions that are all equal.
        """
        self.source, self.batch, self.negatives, self._kinds = source, batch, negatives, kinds
        self._tokenizer, self._config, self._preset, self._augment = tokenizer, config, preset, augment
        self.updates_per_epoch = len(source) // batch.clips
        played = [kind for update in range(3) for kind in kinds(update)]
        if batch.micro_batch == batch.blocks and any(kind.shuffles for kind in played):
            raise InputError(
                f"hard negatives exchange audio or video within a block, and a micro-batch of {batch.micro_batch} in {batch.blocks} blocks "
                f"has blocks of one clip; raise batch.micro_batch or lower batch.blocks"
            )
        alike = all(caption == source.captions[0] for caption in source.captions)
        if alike and any(kind.hard == "text" for kind in played):
            raise InputError("all captions are equal, so that none can be a hard negative; give clips captions of their own")
        self._windows: dict[tuple[int, int], np.ndarray] = {}
        self._text_tokens = functools.lru_cache(maxsize=1 << 17)(self._count_text)
        self.clips(0)
        self._layouts: dict[StepKind, StepKind] = {}
        self._sizes: dict[StepKind, list[int]] = {}
        self._hard_sizes: dict[StepKind, int] = {}
        self._reaches: dict[StepKind, int] = {}
        self._survey()

    def plan(self, update: int) -> UpdatePlan:
        """Returns the plan of a step."""
        plan, lengths = self._drawn(update)
        sized = {kind: self._sized(kind, clips) for kind, clips in lengths.items()}
        kinds, shapes = zip(*(sized[kind] for kind in plan.kinds), strict=True)
        return dataclasses.replace(plan, kinds=kinds, shapes=shapes)

    def positive_caption(self, update: int, clip: int) -> str:
        """Returns the caption of a clip's augmented copy."""
        caption = self.source.captions[clip]
        return augment_text(caption, self.streams(update, clip)[0]) if self._augment.text else caption

    def streams(self, update: int, clip: int) -> tuple[np.random.Generator, np.random.Generator]:
        """Returns the random streams of a clip's augmented copy in a step: of its caption, of its media."""
        text, media = generator(self.batch.seed, RngStream.AUGMENT, update, clip).spawn(2)
        return text, media

    def lengths(self, plan: UpdatePlan, micro: int, place: int, clip: int) -> PromptLengths:
        """Returns the prompts' lengths, or bounds of them, of a clip at a place of a micro-batch."""
        taken = plan.clips[micro, plan.taken(micro)[place]] if plan.kinds[micro].shuffles else clip
        video, audio = self.media_tokens(clip)
        other_video, other_audio = self.media_tokens(taken)
        if (mined := int(plan.mined[micro, place])) >= 0:  # space for both: the clip of the shuffle stands in for one that cannot be read
            other_video, other_audio = (max(pair) for pair in zip((other_video, other_audio), self.media_tokens(mined), strict=True))
        caption, kind = self.source.captions[clip], plan.kinds[micro]
        own = self._text_tokens("tva", caption)
        return PromptLengths(
            video=video,
            audio=audio,
            hard_video=other_video if kind.hard == "video" else video,
            hard_audio=other_audio if kind.hard == "audio" else audio,
            caption=own,
            positive=self._text_tokens("tva", self.positive_caption(plan.update, clip)) if kind.positive else 0,
            hard=self._text_tokens("tva", self.source.captions[int(plan.texts[micro, place])]) if kind.hard == "text" else own,
            alone=self._text_tokens("text", caption),
            filler=max(self._text_tokens(table, "") for table in ("video", "audio", "av")),
        )

    def media_tokens(self, clip: int) -> tuple[int, int]:
        """Returns a clip's video tokens and audio tokens in its prompt, or the most it can have where only reading shows it."""
        info, limits = self.source.record(clip), self.source.limits
        patches = int(np.prod(info.grid.thw)) if info.grid else limits.steps * limits.patches
        return patches // PATCHES_PER_TOKEN, self._config.audio_repeat * tokens_of(info.samples or limits.samples)

    def media_shapes(self) -> BatchShapes:
        """Returns the sizes of tower inputs, which are those of the largest clip in every step."""
        limits = self.source.limits
        frames = self._config.audio.chunk_frames
        mel = -(-limits.samples // HOP)
        return BatchShapes(
            steps=limits.steps,
            patches=limits.patches,
            chunks=-(-mel // frames),
            fbank_frames=max(BeatsConfig.patch_size, fbank_frames(limits.samples)),
            row_tokens=0,
        )

    def _drawn(self, update: int) -> tuple[UpdatePlan, dict[StepKind, list[PromptLengths]]]:
        """Returns a plan whose rows are not laid out yet, and the lengths of the clips of each kind."""
        batch = self.batch
        clips = self.clips(update)
        kinds = self._kinds(update)
        if len(kinds) != batch.micro_batches:
            raise ValueError(f"{len(kinds)} step kinds for {batch.micro_batches} micro-batches")
        texts, shuffles, mined = clips.copy(), [], np.full(clips.shape, -1, np.int64)
        for m, kind in enumerate(kinds):
            number = update * batch.micro_batches + m
            shuffle = derangement(batch.seed, number, batch.micro_batch, batch.blocks)
            shuffles.append(apart(shuffle, self.alike(kind.hard, clips[m])) if kind.shuffles else shuffle)
            if kind.hard == "text":
                texts[m] = other_captions(batch.seed, number, clips[m], self.source.captions)
            if self.negatives is not None and kind.hard is not None:
                mined[m] = self.negatives.drawn(batch.seed, number, kind.hard, clips[m])
                if kind.hard == "text":
                    texts[m] = np.where(mined[m] >= 0, mined[m], texts[m])
        plan = UpdatePlan(update, kinds, clips, texts, mined, tuple(shuffles), ())
        lengths: dict[StepKind, list[PromptLengths]] = {}
        for m, kind in enumerate(kinds):
            lengths.setdefault(kind, []).extend(self.lengths(plan, m, b, int(clip)) for b, clip in enumerate(clips[m]))
        return plan, lengths

    def _sized(self, kind: StepKind, clips: list[PromptLengths]) -> tuple[StepKind, BatchShapes]:
        """Returns a kind with its layout, and the sizes that hold these clips: a surveyed one where it does."""
        laid, multiple, share = self._layouts.get(kind, kind), self.batch.row_multiple, self._config.shares_prefix
        row, hard = max(clip.row(laid, share) for clip in clips), max(clip.hard_row(laid, share) for clip in clips)
        row_tokens = next((size for size in self._sizes.get(kind, ()) if size >= row), round_up(row, multiple))
        known = self._hard_sizes.get(kind, 0)
        hard_tokens = known if hard <= known else round_up(hard, multiple)
        laid = dataclasses.replace(laid, reach=max(self._reaches.get(kind, 0), *(clip.reach(kind, share) for clip in clips)))
        return laid, dataclasses.replace(self.media_shapes(), row_tokens=row_tokens, hard_tokens=hard_tokens)

    def clips(self, update: int) -> np.ndarray:
        """Returns the clips of a step (M, B) int64."""
        epoch, place = divmod(update, max(1, self.updates_per_epoch))
        length = window_updates(len(self.source), self.batch.clips)
        at = epoch, place // length
        if at not in self._windows:
            groups = None if self.batch.distinct == "none" else self.groups
            order = epoch_order(self.batch.seed, epoch, len(self.source), self.batch.clips, groups, at[1])
            self._windows = {**dict(list(self._windows.items())[-1:]), at: order}
        return self._windows[at][place % length].reshape(self.batch.micro_batches, self.batch.micro_batch)

    def groups(self, clips: np.ndarray) -> np.ndarray:
        """Returns (n,) int of clips (n,), equal for those that do not share a step if that can be helped."""
        if self.batch.distinct == "none":
            return numbered(clips.tolist())
        if self.batch.distinct == "caption":
            return numbered(self.source.captions[clip] for clip in clips.tolist())
        names = [self.source.ids[int(clip)] for clip in clips]
        return numbered(name.rpartition("-")[0] or name for name in names)

    def alike(self, modality: str | None, clips: np.ndarray) -> np.ndarray:
        """Returns (n,) int, equal for clips whose sound, or picture, is known to be equal: one part of a file, or no sound."""
        return numbered(same_as(self.source, modality, clip) for clip in clips.tolist())

    def _count_text(self, table: str, caption: str) -> int:
        return text_tokens(self._tokenizer, self._config, self._preset, table, caption)

    def _survey(self) -> None:
        """Chooses, from the first steps, for each kind the layout of its rows, one or two lengths of them (few sizes are few
        compilations), the length of the rows that hard negatives have to themselves, and the reach of prompts."""
        drawn: dict[StepKind, list[list[PromptLengths]]] = {}
        for update in range(SAMPLED_UPDATES):
            for kind, clips in self._drawn(update)[1].items():
                drawn.setdefault(kind, []).append(clips)
        share, multiple, attention = self._config.shares_prefix, self.batch.row_multiple, attention_cost(self._config.decoder)
        for kind, updates in drawn.items():
            every = [clip for clips in updates for clip in clips]
            laid = lay_out(kind, every, share_prefix=share, multiple=multiple, attention=attention)
            self._layouts[kind] = laid
            self._sizes[kind] = row_sizes([max(clip.row(laid, share) for clip in clips) for clips in updates], multiple)
            self._reaches[kind] = max(clip.reach(kind, share) for clip in every)
            self._hard_sizes[kind] = multiple_of(multiple, max(clip.hard_row(kind, share) for clip in every))

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_text_tokens"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._text_tokens = functools.lru_cache(maxsize=1 << 17)(self._count_text)


def row_sizes(needs: list[int], multiple: int) -> list[int]:
    """Returns the row length for rows of these needs, or two where the smaller saves a tenth of the tokens."""
    rounded = [multiple_of(multiple, need) for need in needs]
    top = max(rounded)
    costs = {size: sum(size if need <= size else top for need in rounded) for size in set(rounded)}
    best = min(costs, key=lambda size: (costs[size], -size))
    return [best, top] if costs[best] < WORTH * costs[top] else [top]
