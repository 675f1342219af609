"""Features of a clip to the tower inputs of a training batch, and the lengths of its prompts before anything is decoded.

Letters: t temporal steps, P patches of a step, c log-mel chunks, F fbank frames, S tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from omni_jax.config import ModelConfig
from omni_jax.towers import TOWERS
from omni_jax.towers.base import multiple_of
from omni_jax.types import ClipError, Features, MediaBatch, StepKind

REACH = 128  # tokens: of a multiple of it a prompt's length is said to be at most, since each value is a compilation
EDGES = 2  # begin and end token around each kind of media


def clip_media(features: Features, config: ModelConfig) -> MediaBatch:
    """Returns the tower inputs of one clip: vision (t, P, 1176), audio (c, 200, 128), BEATs (F, 128), F whole patches.

    Raises:
      ClipError: for a clip that lacks video or audio, or whose audio is longer than one segment (300 s).
    """
    if features.vision is None or features.audio is None:
        raise ClipError(f"record {features.record.id!r}: training needs frames and sound")
    if len(features.audio) != 1:
        raise ClipError(f"record {features.record.id!r}: its audio is longer than 300 s; set the preset's audio_seconds")
    return MediaBatch(**{tower.name: tower.clip(features, config) for tower in TOWERS})


@dataclasses.dataclass(frozen=True)
class PromptLengths:
    """Tokens of one clip's prompts by part.

    Attributes:
      video, audio: media tokens, audio doubled where there is BEATs; those of the hard negative are `hard_video` and `hard_audio`.
      caption, positive, hard: text of the anchor, of the augmented copy and of the hard negative, template and end token included.
      alone: the caption of the prompt that is text alone.
      filler: text of the prompts without a caption, the longest of them.
    """

    video: int
    audio: int
    hard_video: int
    hard_audio: int
    caption: int
    positive: int
    hard: int
    alone: int
    filler: int

    def prompts(self) -> Mapping[str, int]:
        """Returns the tokens of each prompt of a training example, by its name."""
        media = self.video + self.audio + 2 * EDGES
        return {
            "anchor": media + self.caption,
            "positive": media + self.positive,
            "hard": self.hard_video + self.hard_audio + 2 * EDGES + self.hard,
            "text": self.alone,
            "audio": self.audio + EDGES + self.filler,
            "video": self.video + EDGES + self.filler,
            "av": media + self.filler,
            "tv": self.video + EDGES + self.caption,
            "at": self.audio + EDGES + self.caption,
        }

    def loads(self, kind: StepKind, share_prefix: bool) -> dict[str, int]:
        """Returns what each prompt that takes a gradient needs of its row, a hard negative that is the anchor's branch counted there."""
        prompts = self.prompts()
        loads = {name: prompts[name] for name in kind.prompts}
        if kind.branches(share_prefix):
            loads["anchor"] += self.hard
        return loads

    def row(self, kind: StepKind, share_prefix: bool) -> int:
        """Returns the tokens of the longest row that takes a gradient."""
        loads = self.loads(kind, share_prefix)
        return max(sum(loads[name] for name in names) for names in kind.rows)

    def reach(self, kind: StepKind, share_prefix: bool) -> int:
        """Returns `StepKind.reach` for this clip."""
        return multiple_of(REACH, max(self.loads(kind, share_prefix).values()))

    def hard_row(self, kind: StepKind, share_prefix: bool) -> int:
        """Returns the tokens of the hard negative's own row, 0 where it has none."""
        return 0 if kind.hard is None or kind.branches(share_prefix) else self.prompts()["hard"]


def lay_out(kind: StepKind, clips: Sequence[PromptLengths], *, share_prefix: bool, multiple: int, attention: float) -> StepKind:
    """Returns a kind with the layout of rows in which clips of these lengths cost least.

    All rows of a batch have one length. Few long rows pad little, but a query is compared with every key of its row, those of other
    prompts included.

    Args:
      multiple: rows are multiples of so many tokens.
      attention: `tokens.batching.attention_cost`.
    """
    loads = [clip.loads(kind, share_prefix) for clip in clips]
    columns = {name: np.array([load[name] for load in loads]) for name in kind.prompts}

    def cost(laid: StepKind) -> float:
        longest = max(int(np.sum([columns[name] for name in names], axis=0).max()) for names in laid.rows)
        size = multiple_of(multiple, longest)
        return len(laid.rows) * size * (1 + attention * size)

    # The first of equals: the plain layout, where it is as good.
    return min([kind, *(dataclasses.replace(kind, layout=rows) for rows in partitions(kind.prompts))], key=cost)


def partitions(names: Sequence[str]) -> Iterator[tuple[tuple[str, ...], ...]]:
    """Yields every way to put prompts in rows, the first prompt in the first row."""
    if not names:
        yield ()
        return
    *rest, last = names
    for rows in partitions(rest):
        for i, row in enumerate(rows):
            yield (*rows[:i], (*row, last), *rows[i + 1 :])
        yield (*rows, (last,))
