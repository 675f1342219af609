"""What a training step costs without padding, ours and the released program's, for docs/reports/training_cost.md and its tests.

The operations of the compiled programs, padding included, are `omni_jax.planning.step_flops`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from omni_jax.config import ConfigError, ModelConfig
from omni_jax.model.flops import PARTS
from omni_jax.planning.step_flops import ClipCounts, PassFlops, RowCounts, StepFlops, clip_flops, padded_counts, scale
from omni_jax.towers import of_modalities
from omni_jax.towers.audio import audio_terms_of
from omni_jax.towers.beats import beats_terms_of
from omni_jax.towers.vision import vision_terms
from omni_jax.towers.work import Terms, unpadded
from omni_jax.train.plan import LossConfig, step_kind
from omni_jax.train.step import StepConfig
from omni_jax.train.trainable import TrainableConfig, select
from omni_jax.types import BatchShapes, StepKind, VideoGrid

MERGE = 2  # patches on a side of a video token
GRID = VideoGrid((4, 12, 18), 2.0)


@dataclasses.dataclass(frozen=True)
class ClipSizes:
    """One clip and its captions without padding; the defaults are a 4:3 clip of 8 s under the training preset.

    Attributes:
      grid: the video's shape.
      mel_frames: log-mel frames of the audio; a quarter of them are audio tokens.
      caption, filler: tokens of a caption and of the filler text, the end token included.
    """

    grid: VideoGrid = GRID
    mel_frames: int = 800
    caption: int = 40
    filler: int = 6

    @property
    def video_tokens(self) -> int:
        return self.grid.tokens(MERGE)

    @property
    def audio_tokens(self) -> int:
        """Whisper and BEATs tokens together."""
        return self.mel_frames // 4 * 2

    def prompt(self, name: str) -> int:
        """Returns the tokens of a prompt: "text", "audio", "video", or a tuple of all three by any other name."""
        media = {"text": 0, "audio": 2 + self.audio_tokens, "video": 2 + self.video_tokens}
        tokens = 4 + self.video_tokens + self.audio_tokens
        return media.get(name, tokens) + (self.filler if name in ("audio", "video") else self.caption)


def update_flops(
    config: ModelConfig, recipe: StepConfig, micro_batches: Sequence[tuple[StepKind, BatchShapes]], *, clips: int
) -> StepFlops:
    """Returns what the compiled programs of one step multiply, padding included.

    Args:
      micro_batches: the kind of each, with the layout of its rows, and its sizes.
      clips: clips of a micro-batch, all processes together.
    """
    cached = recipe.losses.negatives == "global" and len(micro_batches) > 1
    trains = select(config, recipe.trainable)
    counts_of_all = [padded_counts(config, kind, shapes) for kind, shapes in micro_batches]
    return merge([scale(clip_flops(config, counts, trains, remat=recipe.remat, cached=cached), clips) for counts in counts_of_all])


def per_triple(config: ModelConfig, sizes: ClipSizes, losses: LossConfig, *, remat: str = "layer", cached: bool = False) -> list[StepFlops]:
    """Returns our operations per clip without padding, one count for each of the three step kinds (LoRA and the heads train)."""
    trains = select(config, TrainableConfig())
    counts_of_all = [exact_counts(config, step_kind(count, losses), sizes) for count in range(3)]
    return [clip_flops(config, counts, trains, remat=remat, cached=cached) for counts in counts_of_all]


def released_per_triple(config: ModelConfig, sizes: ClipSizes, losses: LossConfig, *, remat: str = "layer") -> list[StepFlops]:
    """Returns the released program's operations per clip without padding, one count for each of the three step kinds."""
    trains = select(config, TrainableConfig())
    counts_of_all = [released_counts(config, step_kind(count, losses), sizes) for count in range(3)]
    return [clip_flops(config, counts, trains, remat=remat) for counts in counts_of_all]


def merge(counts: Sequence[StepFlops]) -> StepFlops:
    """Returns the sum of counts."""
    return {part: sum((count[part] for count in counts), PassFlops()) for part in PARTS}


def mean(counts: Sequence[StepFlops]) -> StepFlops:
    """Returns the mean of counts."""
    return scale(merge(counts), 1 / len(counts))


def total(count: StepFlops) -> float:
    """Returns all operations of a count."""
    return sum(passes.total for passes in count.values())


def table(count: StepFlops, unit: float = 1e12) -> str:
    """Returns a count as text: a line for each part and one for the total, in units of `unit` operations."""
    names = [field.name for field in dataclasses.fields(PassFlops)]
    rows = [*count.items(), ("total", sum(count.values(), PassFlops()))]
    lines = ["part    " + "".join(f"{name:>12}" for name in (*names, "total"))]
    return "\n".join(
        [*lines, *(f"{part:<8}" + "".join(f"{v / unit:>12.2f}" for v in (*dataclasses.astuple(p), p.total)) for part, p in rows)]
    )


def exact_counts(config: ModelConfig, kind: StepKind, sizes: ClipSizes, *, share_prefix: bool = True) -> ClipCounts:
    """Returns the counts of a clip without padding: valid tokens, and the pairs that the decoder's mask lets through.

    Raises:
      ConfigError: for a backbone whose prompts are not those that `ClipSizes` counts.
    """
    if config.beats is None or config.attention != "causal":
        raise ConfigError("the unpadded count is of WAVE's prompts (causal attention, doubled audio tokens); use padded_counts")
    shared = kind.branches(share_prefix)
    with_gradient = sum((_row(sizes.prompt(name), name != "text") for name in kind.prompts), RowCounts())
    if shared:
        prefix = sizes.prompt("anchor") - sizes.caption
        with_gradient += RowCounts(sizes.caption, sizes.caption * prefix + _triangle(sizes.caption), 1, prefix + sizes.caption, 1)
    own = bool(kind.hard) and not shared
    beats, heard = "audio" in kind.media, sizes.audio_tokens // 2
    return ClipCounts(
        towers=_clip_terms(config, kind.media, sizes, 1 + kind.positive),
        bridged=beats * (1 + kind.positive) * heard,
        with_gradient=with_gradient,
        without_gradient=_row(sizes.prompt("hard")) if own else RowCounts(),
        bridged_without_gradient=beats * heard if own else 0,
    )


def released_counts(config: ModelConfig, kind: StepKind, sizes: ClipSizes) -> ClipCounts:
    """Returns the counts of a clip in the released program, which makes six forwards in every step (SPEC section 6).

    The three tuples and all three single modalities are each embedded on their own, the hard negative without gradient; a modality that
    has no loss is embedded too, and no gradient comes back to it. The clip's tower outputs are kept for all streams but the augmented
    tuple, which runs towers and bridge again.
    """
    idle = [name for name in ("text", "audio", "video") if name not in kind.singles]
    with_gradient = [_row(sizes.prompt(name), name != "text", whole=True) for name in ("anchor", "positive", *kind.singles)]
    without_gradient = [_row(sizes.prompt(name), name != "text", whole=True) for name in ("hard", *idle)]
    return ClipCounts(
        towers=_clip_terms(config, ("video", "audio"), sizes, 2),
        bridged=2 * (sizes.audio_tokens // 2),
        with_gradient=sum(with_gradient, RowCounts()),
        without_gradient=sum(without_gradient, RowCounts()),
    )


def _row(tokens: int, fused: bool = True, whole: bool = False) -> RowCounts:
    """A prompt without padding, whose last token is pooled; `whole`: the last layer is computed for all of its tokens."""
    last = (tokens, _triangle(tokens)) if whole else (1, tokens)
    return RowCounts(tokens, _triangle(tokens), *last, int(fused))


def _triangle(tokens: int) -> int:
    """Causal pairs."""
    return tokens * (tokens + 1) // 2


def _clip_terms(config: ModelConfig, modalities: Sequence[str], sizes: ClipSizes, copies: int) -> dict[str, Terms]:
    """Towers over one clip as it is: attention within windows where a layer has them."""
    vision, beats = config.vision, config.beats
    assert beats is not None
    steps, high, wide = sizes.grid.thw
    side = vision.window_tokens * vision.merge_size
    windows = sum(min(side, high - y) ** 2 for y in range(0, high, side)) * sum(min(side, wide - x) ** 2 for x in range(0, wide, side))
    full = len(set(vision.full_attention_layers))
    pairs = steps * (full * (high * wide) ** 2 + (vision.num_layers - full) * windows)
    made = {
        "vision": vision_terms(config, unpadded(copies * steps * high * wide), unpadded(copies * pairs)),
        "audio": audio_terms_of(config, sizes.mel_frames, copies),
        # The fbank has two frames fewer than the log-mel: its frames lie within the waveform.
        "beats": beats_terms_of(beats, sizes.mel_frames - 2, copies),
    }
    return {name: made[name] for name in of_modalities(modalities)}
