"""Operations of a training step, counted from shapes: by part of the encoder and by what they are for (docs/reports/training_cost.md).

A product of (m, k) and (k, n) is 2 m k n; elementwise work, the losses and the optimizer are left out. Sizes in, numbers out: nothing
here holds an array.

Letters: B clips, S tokens, D decoder width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from omni_jax.config import ModelConfig
from omni_jax.model import flops
from omni_jax.model.flops import PARTS
from omni_jax.towers import towers_of
from omni_jax.towers.work import FlopCount, LinearOps, Terms, unpadded
from omni_jax.train.remat import names as remat_names
from omni_jax.types import BatchShapes, StepKind

# Maps whose input is data: no gradient passes to what precedes them.
_FIRST = ("vision/patch_embed", "audio/conv1", "beats/patch_embed")


@dataclasses.dataclass(frozen=True)
class PassFlops:
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

    def __add__(self, other: PassFlops) -> PassFlops:
        return PassFlops(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, factor: float) -> PassFlops:
        return PassFlops(*(a * factor for a in dataclasses.astuple(self)))

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


StepFlops = dict[str, PassFlops]
"""Part (those of `flops.PARTS`) -> operations."""


@dataclasses.dataclass(frozen=True)
class RowCounts:
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

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def terms(self, config: ModelConfig) -> Terms:
        """Returns the decoder on these rows."""
        last = unpadded(self.last_tokens), unpadded(self.last_pairs)
        return flops.decoder_terms(config, unpadded(self.tokens), unpadded(self.pairs), last)

    def terms_before_last(self, config: ModelConfig) -> Terms:
        """Returns the decoder's layers but the last on these rows."""
        layers = config.decoder.num_layers
        tokens = unpadded(self.tokens * (layers - 1) / layers)
        return flops.decoder_terms(config, tokens, unpadded(self.pairs), (tokens, FlopCount()))


@dataclasses.dataclass(frozen=True)
class ClipCounts:
    """What one clip asks of the encoder.

    Attributes:
      towers: tower -> its terms, all copies of the clip together.
      bridged: tokens that go through the bridge, those of every copy.
      with_gradient: rows that take a gradient.
      without_gradient: rows without one.
      bridged_without_gradient: tokens that go through the bridge for those rows.
      towers_without_gradient: the towers that run for those rows alone, as `towers`.
    """

    towers: Mapping[str, Terms]
    bridged: float
    with_gradient: RowCounts
    without_gradient: RowCounts = RowCounts()
    bridged_without_gradient: float = 0
    towers_without_gradient: Mapping[str, Terms] = dataclasses.field(default_factory=dict)


def clip_flops(config: ModelConfig, counts: ClipCounts, trains: frozenset[str], *, remat: str = "layer", cached: bool = False) -> StepFlops:
    """Returns the operations of one clip in a step.

    A tower of which anything trains counts as passing gradients through all its maps but the first: more than is done where only its end
    trains.

    Args:
      trains: paths of the parameters that train (`trainable.select`).
      remat: as `StepConfig.remat`.
      cached: gradient caching: what takes a gradient is computed forward twice.
    """
    made: StepFlops = {part: PassFlops() for part in PARTS}
    for tower, terms in counts.towers.items():
        grad = any(path.startswith(f"{tower}/") for path in trains)
        made[tower] += _passes(config, terms, trains, grad=grad, again=cached and grad)
    for tower, terms in counts.towers_without_gradient.items():
        made[tower] += _passes(config, terms, trains, grad=False)
    decoder = counts.with_gradient.terms(config)
    made["bridge"] += _passes(config, flops.bridge_terms(unpadded(counts.bridged)), trains, again=cached)
    made["decoder"] += _passes(config, decoder, trains, again=cached)
    made["decoder"] += PassFlops(recomputed=_recomputed(config, counts.with_gradient, remat))
    # The second pass needs the states within the head, not what comes out of it.
    head = _passes(config, flops.head_terms(unpadded(counts.with_gradient.fused)), trains, again=cached)
    last = _forward(config, [LinearOps(("head/fc2",), unpadded(counts.with_gradient.fused))]) if cached else 0.0
    made["head"] += dataclasses.replace(head, again=head.again - last)
    for part, terms in (
        ("bridge", flops.bridge_terms(unpadded(counts.bridged_without_gradient))),
        ("decoder", counts.without_gradient.terms(config)),
        ("head", flops.head_terms(unpadded(counts.without_gradient.fused))),
    ):
        made[part] += _passes(config, terms, trains, grad=False)
    return made


def scale(count: StepFlops, factor: float) -> StepFlops:
    """Returns a count times a factor."""
    return {part: passes * factor for part, passes in count.items()}


def padded_counts(config: ModelConfig, kind: StepKind, shapes: BatchShapes) -> ClipCounts:
    """Returns the counts of a clip in a batch of static shapes: every row, step, chunk and frame full."""
    shared = kind.branches(config.shares_prefix)
    heard = shapes.chunks * config.audio.chunk_tokens
    copies = 1 + kind.positive

    def row(tokens: int, pooled: int) -> RowCounts:
        pairs = flops.row_pairs(tokens, config.attention == "causal")
        return RowCounts(tokens, pairs, pooled, pooled * tokens) if config.has_head else RowCounts(tokens, pairs, tokens, pairs)

    tuples = kind.anchor + kind.positive + (1 if shared else 0)
    fused = tuples + sum(name != "text" for name in kind.singles) + len(kind.duals)
    with_gradient = sum((row(shapes.row_tokens, kind.slots(shared)) for _ in kind.rows), RowCounts(fused=fused))
    beats = "audio" in kind.media and config.beats is not None
    own = bool(kind.hard) and not shared
    return ClipCounts(
        towers={tower.name: tower.terms(shapes, config, copies) for tower in towers_of(config) if tower.modality in kind.media},
        bridged=beats * copies * heard,
        with_gradient=with_gradient,
        without_gradient=row(shapes.hard_tokens, 1) + RowCounts(fused=1) if own else RowCounts(),
        bridged_without_gradient=beats * heard if own else 0,
        towers_without_gradient={
            tower.name: tower.terms(shapes, config, 1) for tower in towers_of(config) if kind.hard_media and tower.modality == kind.hard
        },
    )


def _forward(config: ModelConfig, terms: Terms, only: frozenset[str] | None = None) -> float:
    sizes = flops.matrix_sizes(config, only)
    return sum(flops.term_operations(sizes, term).computed for term in terms)


def _passes(config: ModelConfig, terms: Terms, trains: frozenset[str], *, grad: bool = True, again: bool = False) -> PassFlops:
    """A map costs as much again for the gradient of its input, and for that of its matrix where it trains; attention twice as much."""
    forward = _forward(config, terms)
    if not grad:
        return PassFlops(forward)
    maps = [term for term in terms if isinstance(term, LinearOps)]
    attention = [term for term in terms if not isinstance(term, LinearOps)]
    passing = [term for term in maps if term.paths[0] not in _FIRST]
    activations = _forward(config, passing) + 2 * _forward(config, attention)
    return PassFlops(forward, forward if again else 0.0, 0.0, activations, _forward(config, maps, trains))


def _recomputed(config: ModelConfig, rows: RowCounts, remat: str) -> float:
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
        return _forward(config, [term for term in decoder if not isinstance(term, LinearOps)])
    # Nothing reads a layer's output within its backward pass, so that the product which makes it is left out.
    mlp, down = "decoder/layers/mlp", "decoder/layers/mlp/down"
    last = [
        LinearOps((f"{down}/kernel", f"{down}/lora_b"), term.tokens)
        for term in decoder
        if isinstance(term, LinearOps) and mlp in term.paths
    ]
    return _forward(config, decoder) - _forward(config, last)
