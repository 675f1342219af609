"""Operations of a training update, counted from shapes: by part of the encoder and by what they are for (docs/reports/training_cost.md).

A product of (m, k) and (k, n) is 2 m k n; elementwise work, the losses and the optimizer are left out. Sizes in, numbers out: nothing
here holds an array. The released program's way of training is counted beside ours.

Letters: B clips, S tokens, D decoder width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from omni_jax.config import ConfigError, ModelConfig
from omni_jax.model import flops
from omni_jax.model.flops import PARTS, Maps, Terms, Work
from omni_jax.train.batch import PATCHES_PER_TOKEN, BatchShapes
from omni_jax.train.plan import LossConfig, step_kind
from omni_jax.train.remat import names as remat_names
from omni_jax.train.step import StepConfig
from omni_jax.train.streams import TOWERS
from omni_jax.train.trainable import TrainableConfig, select
from omni_jax.types import StepKind

# Maps whose input is data: no gradient goes on to what stands before them.
_FIRST = ("vision/patch_embed", "audio/conv1", "beats/patch_embed")


@dataclasses.dataclass(frozen=True)
class Passes:
    """Operations of one part, by what they are for.

    Attributes:
      forward: the first forward pass.
      again: the second forward pass of gradient caching.
      recomputed: what the remat policy computes a further time within the backward pass.
      activations: gradients of activations; frozen maps pass them on too.
      weights: gradients of the matrices that train.
    """

    forward: float = 0.0
    again: float = 0.0
    recomputed: float = 0.0
    activations: float = 0.0
    weights: float = 0.0

    def __add__(self, other: Passes) -> Passes:
        return Passes(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, factor: float) -> Passes:
        return Passes(*(a * factor for a in dataclasses.astuple(self)))

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


Ledger = dict[str, Passes]
"""Part (those of `flops.PARTS`) -> operations."""


@dataclasses.dataclass(frozen=True)
class ClipSizes:
    """One clip and its captions without padding; the defaults are a 4:3 clip of 8 s under the training preset.

    Attributes:
      grid: (t, h, w) in patches.
      mel_frames: log-mel frames of the audio; a quarter of them are audio tokens.
      caption, filler: tokens of a caption and of the filler text, the end token included.
    """

    grid: tuple[int, int, int] = (4, 12, 18)
    mel_frames: int = 800
    caption: int = 40
    filler: int = 6

    @property
    def video_tokens(self) -> int:
        return int(np.prod(self.grid)) // PATCHES_PER_TOKEN

    @property
    def audio_tokens(self) -> int:
        """Whisper and BEATs tokens together."""
        return self.mel_frames // 4 * 2

    def prompt(self, name: str) -> int:
        """Returns the tokens of a prompt: "text", "audio", "video", or a tuple of all three by any other name."""
        media = {"text": 0, "audio": 2 + self.audio_tokens, "video": 2 + self.video_tokens}
        tokens = 4 + self.video_tokens + self.audio_tokens
        return media.get(name, tokens) + (self.filler if name in ("audio", "video") else self.caption)


@dataclasses.dataclass(frozen=True)
class RowLoad:
    """Decoder rows of one clip.

    Attributes:
      tokens, pairs: their tokens, and the query-key pairs of a layer.
      last_tokens, last_pairs: those for which the last layer computes more than keys and values.
      fused: prompts that go through the fusion head.
    """

    tokens: float = 0
    pairs: float = 0
    last_tokens: float = 0
    last_pairs: float = 0
    fused: float = 0

    def __add__(self, other: RowLoad) -> RowLoad:
        return RowLoad(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def terms(self, config: ModelConfig) -> Terms:
        """Returns the decoder on these rows."""
        last = _same(self.last_tokens), _same(self.last_pairs)
        return flops.decoder_terms(config, _same(self.tokens), _same(self.pairs), last)

    def terms_before_last(self, config: ModelConfig) -> Terms:
        """Returns the decoder's layers but the last on these rows."""
        layers = config.decoder.num_layers
        tokens = _same(self.tokens * (layers - 1) / layers)
        return flops.decoder_terms(config, tokens, _same(self.pairs), (tokens, Work()))


@dataclasses.dataclass(frozen=True)
class Load:
    """What one clip asks of the encoder.

    Attributes:
      towers: tower -> its terms, all copies of the clip together.
      bridged: tokens that go through the bridge, those of every copy.
      graded: rows that take a gradient.
      still: rows without one; `still_bridged` tokens go through the bridge for them.
    """

    towers: Mapping[str, Terms]
    bridged: float
    graded: RowLoad
    still: RowLoad = RowLoad()
    still_bridged: float = 0


# --------------------------------------------------------------------------------------------------------------------- of an update


def update_ledger(config: ModelConfig, recipe: StepConfig, micro_batches: Sequence[tuple[StepKind, BatchShapes]], *, clips: int) -> Ledger:
    """Returns what the compiled programs of one update multiply, padding included.

    Args:
      micro_batches: the kind of each, with the layout of its rows, and its sizes.
      clips: clips of a micro-batch, all processes together.
    """
    cached = recipe.losses.negatives == "global" and len(micro_batches) > 1
    trains = select(config, recipe.trainable)
    loads = [padded_load(config, kind, shapes) for kind, shapes in micro_batches]
    return merge([scale(clip_ledger(config, load, trains, remat=recipe.remat, cached=cached), clips) for load in loads])


def clip_ledger(config: ModelConfig, load: Load, trains: frozenset[str], *, remat: str = "layer", cached: bool = False) -> Ledger:
    """Returns the operations of one clip in a step.

    A tower of which anything trains counts as passing gradients through all its maps but the first: more than is done where only its end
    trains.

    Args:
      trains: paths of the parameters that train (`trainable.select`).
      remat: as `StepConfig.remat`.
      cached: gradient caching: what takes a gradient is computed forward twice.
    """
    made: Ledger = {part: Passes() for part in PARTS}
    for tower, terms in load.towers.items():
        grad = any(path.startswith(f"{tower}/") for path in trains)
        made[tower] += _passes(config, terms, trains, grad=grad, again=cached and grad)
    decoder = load.graded.terms(config)
    made["bridge"] += _passes(config, flops.bridge_terms(_same(load.bridged)), trains, again=cached)
    made["decoder"] += _passes(config, decoder, trains, again=cached)
    made["decoder"] += Passes(recomputed=_recomputed(config, load.graded, remat))
    # The second pass needs the states within the head, not what comes out of it.
    head = _passes(config, flops.head_terms(_same(load.graded.fused)), trains, again=cached)
    last = _forward(config, [Maps(("head/fc2",), _same(load.graded.fused))]) if cached else 0.0
    made["head"] += dataclasses.replace(head, again=head.again - last)
    for part, terms in (
        ("bridge", flops.bridge_terms(_same(load.still_bridged))),
        ("decoder", load.still.terms(config)),
        ("head", flops.head_terms(_same(load.still.fused))),
    ):
        made[part] += _passes(config, terms, trains, grad=False)
    return made


def per_triple(config: ModelConfig, sizes: ClipSizes, losses: LossConfig, *, remat: str = "layer", cached: bool = False) -> list[Ledger]:
    """Returns our operations per clip without padding, one ledger for each of the three step kinds (LoRA and the heads train)."""
    trains = select(config, TrainableConfig())
    loads = [exact_load(config, step_kind(count, losses), sizes) for count in range(3)]
    return [clip_ledger(config, load, trains, remat=remat, cached=cached) for load in loads]


def released_per_triple(config: ModelConfig, sizes: ClipSizes, losses: LossConfig, *, remat: str = "layer") -> list[Ledger]:
    """Returns the released program's operations per clip without padding, one ledger for each of the three step kinds."""
    trains = select(config, TrainableConfig())
    loads = [released_load(config, step_kind(count, losses), sizes) for count in range(3)]
    return [clip_ledger(config, load, trains, remat=remat) for load in loads]


def merge(ledgers: Sequence[Ledger]) -> Ledger:
    """Returns the sum of ledgers."""
    return {part: sum((ledger[part] for ledger in ledgers), Passes()) for part in PARTS}


def scale(ledger: Ledger, factor: float) -> Ledger:
    """Returns a ledger times a factor."""
    return {part: passes * factor for part, passes in ledger.items()}


def mean(ledgers: Sequence[Ledger]) -> Ledger:
    """Returns the mean of ledgers."""
    return scale(merge(ledgers), 1 / len(ledgers))


def total(ledger: Ledger) -> float:
    """Returns all operations of a ledger."""
    return sum(passes.total for passes in ledger.values())


def table(ledger: Ledger, unit: float = 1e12) -> str:
    """Returns a ledger as text: a line for each part and one for the total, in units of `unit` operations."""
    names = [field.name for field in dataclasses.fields(Passes)]
    rows = [*ledger.items(), ("total", sum(ledger.values(), Passes()))]
    lines = ["part    " + "".join(f"{name:>12}" for name in (*names, "total"))]
    return "\n".join(
        [*lines, *(f"{part:<8}" + "".join(f"{v / unit:>12.2f}" for v in (*dataclasses.astuple(p), p.total)) for part, p in rows)]
    )


# ------------------------------------------------------------------------------------------------------------------ of a clip


def padded_load(config: ModelConfig, kind: StepKind, shapes: BatchShapes) -> Load:
    """Returns the load of a clip in a batch of static shapes: every row, step, chunk and frame full."""
    shared = kind.branches(config.shares_prefix)
    heard = shapes.chunks * config.audio.chunk_tokens
    copies = 1 + kind.positive

    def row(tokens: int, pooled: int) -> RowLoad:
        pairs = flops.row_pairs(tokens, config.attention == "causal")
        return RowLoad(tokens, pairs, pooled, pooled * tokens) if config.has_head else RowLoad(tokens, pairs, tokens, pairs)

    tuples = kind.anchor + kind.positive + (1 if shared else 0)
    fused = tuples + sum(name != "text" for name in kind.singles)
    graded = sum((row(shapes.row_tokens, kind.slots(shared)) for _ in kind.rows), RowLoad(fused=fused))
    beats = "beats" in kind.towers and config.beats is not None
    own = bool(kind.hard) and not shared
    return Load(
        towers=_tower_terms(config, kind.towers, shapes, copies),
        bridged=beats * copies * heard,
        graded=graded,
        still=row(shapes.hard_tokens, 1) + RowLoad(fused=1) if own else RowLoad(),
        still_bridged=beats * heard if own else 0,
    )


def exact_load(config: ModelConfig, kind: StepKind, sizes: ClipSizes, *, share_prefix: bool = True) -> Load:
    """Returns the load of a clip without padding: valid tokens, and the pairs that the decoder's mask lets through.

    Raises:
      ConfigError: for a backbone whose prompts are not those that `ClipSizes` counts.
    """
    if config.beats is None or config.attention != "causal":
        raise ConfigError("the unpadded ledger counts WAVE's prompts (causal attention, doubled audio tokens); use padded_load")
    shared = kind.branches(share_prefix)
    graded = sum((_row(sizes.prompt(name), name != "text") for name in kind.prompts), RowLoad())
    if shared:
        prefix = sizes.prompt("anchor") - sizes.caption
        graded += RowLoad(sizes.caption, sizes.caption * prefix + _triangle(sizes.caption), 1, prefix + sizes.caption, 1)
    own = bool(kind.hard) and not shared
    beats, heard = "beats" in kind.towers, sizes.audio_tokens // 2
    return Load(
        towers=_clip_terms(config, kind.towers, sizes, 1 + kind.positive),
        bridged=beats * (1 + kind.positive) * heard,
        graded=graded,
        still=_row(sizes.prompt("hard")) if own else RowLoad(),
        still_bridged=beats * heard if own else 0,
    )


def released_load(config: ModelConfig, kind: StepKind, sizes: ClipSizes) -> Load:
    """Returns the load of a clip in the released program, which makes six forwards in every step (SPEC section 6).

    The three tuples and all three single modalities are each embedded on their own, the hard negative without gradient; a modality that
    has no loss is embedded too, and no gradient comes back to it. The clip's tower outputs are kept for all streams but the augmented
    tuple, which runs towers and bridge again.
    """
    idle = [name for name in ("text", "audio", "video") if name not in kind.singles]
    graded = [_row(sizes.prompt(name), name != "text", whole=True) for name in ("anchor", "positive", *kind.singles)]
    still = [_row(sizes.prompt(name), name != "text", whole=True) for name in ("hard", *idle)]
    return Load(
        towers=_clip_terms(config, TOWERS, sizes, 2),
        bridged=2 * (sizes.audio_tokens // 2),
        graded=sum(graded, RowLoad()),
        still=sum(still, RowLoad()),
    )


def _row(tokens: int, fused: bool = True, whole: bool = False) -> RowLoad:
    """A prompt without padding, whose last token is pooled; `whole`: the last layer is computed for all of its tokens."""
    last = (tokens, _triangle(tokens)) if whole else (1, tokens)
    return RowLoad(tokens, _triangle(tokens), *last, int(fused))


def _triangle(tokens: int) -> int:
    """Causal pairs."""
    return tokens * (tokens + 1) // 2


def _tower_terms(config: ModelConfig, towers: Sequence[str], shapes: BatchShapes, copies: int) -> dict[str, Terms]:
    """Towers over full static shapes: `full` windows, every step padded to all patches."""
    vision, beats = config.vision, config.beats
    pairs = vision.num_layers * shapes.steps * shapes.patches**2
    fbank = shapes.fbank_frames // beats.patch_size * beats.frequency_patches if beats else 0
    frames = shapes.chunks * config.audio.chunk_frames
    return _terms(config, towers, copies, shapes.steps * shapes.patches, pairs, frames, fbank)


def _clip_terms(config: ModelConfig, towers: Sequence[str], sizes: ClipSizes, copies: int) -> dict[str, Terms]:
    """Towers over one clip as it is: attention within windows where a layer has them."""
    vision, beats = config.vision, config.beats
    steps, high, wide = sizes.grid
    side = vision.window_tokens * vision.merge_size
    windows = sum(min(side, high - y) ** 2 for y in range(0, high, side)) * sum(min(side, wide - x) ** 2 for x in range(0, wide, side))
    full = len(set(vision.full_attention_layers))
    pairs = steps * (full * (high * wide) ** 2 + (vision.num_layers - full) * windows)
    # The fbank has two frames fewer than the log-mel: its frames lie within the waveform.
    fbank = (sizes.mel_frames - 2) // beats.patch_size * beats.frequency_patches if beats else 0
    return _terms(config, towers, copies, steps * high * wide, pairs, sizes.mel_frames, fbank)


def _terms(
    config: ModelConfig, towers: Sequence[str], copies: int, patches: int, vision_pairs: int, frames: int, fbank_patches: int
) -> dict[str, Terms]:
    chunk, layers = config.audio.chunk_frames, config.audio.num_layers
    whole, rest = divmod(frames, chunk)
    pairs = layers * (whole * (chunk // 2) ** 2 + (-(-rest // 2)) ** 2)
    seen = whole * chunk // 2 + -(-rest // 2)
    c, beats = copies, config.beats
    made = {
        "vision": flops.vision_terms(config, _same(c * patches), _same(c * vision_pairs)),
        "audio": flops.audio_terms(config, _same(c * frames), _same(c * seen), _same(c * (seen // 2)), _same(c * pairs)),
    }
    if beats is not None:
        taps = flops.kernel_taps(fbank_patches, beats.conv_pos)
        beats_pairs = beats.num_layers * fbank_patches**2
        made["beats"] = flops.beats_terms(beats, _same(c * fbank_patches), _same(c * taps), _same(c * beats_pairs))
    return {tower: made[tower] for tower in towers if tower in made}


# ------------------------------------------------------------------------------------------------------------------ of a part


def _same(count: float) -> Work:
    return Work(count, count)


def _forward(config: ModelConfig, terms: Terms, only: frozenset[str] | None = None) -> float:
    sizes = flops.matrix_sizes(config, only)
    return sum(flops.term_operations(sizes, term).computed for term in terms)


def _passes(config: ModelConfig, terms: Terms, trains: frozenset[str], *, grad: bool = True, again: bool = False) -> Passes:
    """A map costs as much again for the gradient of its input, and for that of its matrix where it trains; attention twice as much."""
    forward = _forward(config, terms)
    if not grad:
        return Passes(forward)
    maps = [term for term in terms if isinstance(term, Maps)]
    attention = [term for term in terms if not isinstance(term, Maps)]
    passing = [term for term in maps if term.paths[0] not in _FIRST]
    activations = _forward(config, passing) + 2 * _forward(config, attention)
    return Passes(forward, forward if again else 0.0, 0.0, activations, _forward(config, maps, trains))


def _recomputed(config: ModelConfig, rows: RowLoad, remat: str) -> float:
    """What the layers' policies compute again."""
    *before, last = remat_names(remat, config.decoder.num_layers)
    every, most = rows.terms(config), rows.terms_before_last(config)
    spent = _recomputed_by(config, every, last) - _recomputed_by(config, most, last)
    return spent + sum(_recomputed_by(config, most, name) * before.count(name) / len(before) for name in dict.fromkeys(before))


def _recomputed_by(config: ModelConfig, decoder: Terms, policy: str) -> float:
    """What a policy of `remat.REMAT` computes again of the decoder's layers.

    Attention is the plain kernel's, which needs its logits again even where its output is kept ("attention"): there as under "layer".
    """
    if policy == "none":
        return 0.0
    if policy == "dots":
        return _forward(config, [term for term in decoder if not isinstance(term, Maps)])
    # Nothing reads a layer's output within its backward pass, so that the product which makes it is left out.
    mlp, down = "decoder/layers/mlp", "decoder/layers/mlp/down"
    last = [Maps((f"{down}/kernel", f"{down}/lora_b"), term.tokens) for term in decoder if isinstance(term, Maps) and mlp in term.paths]
    return _forward(config, decoder) - _forward(config, last)
