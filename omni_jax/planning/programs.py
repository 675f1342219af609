"""The real programs of a run, lowered and compiled for a topology, and what the compiler says of each."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from omni_jax.config import ModelConfig, Preset
from omni_jax.model import abstract_encoder, abstract_params, param_shardings
from omni_jax.model.runner import Runner
from omni_jax.parallel import batch_shards
from omni_jax.planning.abstract import CAPTION_TOKENS, abstract_batch, abstract_encoder_batch, abstract_state, planned_batch
from omni_jax.planning.advice import OutOfMemory, read_refusal
from omni_jax.planning.chips import Topology
from omni_jax.planning.devices import QUICK
from omni_jax.planning.hlo import Collective, collectives
from omni_jax.planning.timing import Timing, read_timing
from omni_jax.retrieval import ranks
from omni_jax.train.plan import step_kind
from omni_jax.train.step import StepConfig, TrainStep
from omni_jax.train.trainable import over_int8
from omni_jax.types import BatchShapes, StepKind

EVALUATED = (3_782, 100_000)
"""Rows of the tables whose ranking is planned for: of the published benchmark, and of a large gallery."""

Watch = Callable[[str, Callable[[], Any]], Any]
"""Runs a compilation, whose name it is given, and returns what it gives: minutes of it can be shown, and left."""


def unwatched(name: str, work: Callable[[], Any]) -> Any:
    """Returns what `work` gives."""
    return work()


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is planned for.

    Attributes:
      clips, micro_batches: of a micro-batch on all devices together, and of a step.
      mesh: sizes of data, fsdp and tensor within a slice.
      row_multiple: training rows are multiples of so many tokens.
      dtype: of activations and frozen weights.
      weights: how matrices are held, as in `ModelConfig`; a training step holds those that train as they are.
      embed_clips: clips that the embedding pass encodes together.
      options: of the compiler, beside the chip's.
      watch: runs each compilation.
    """

    config: ModelConfig
    recipe: StepConfig
    preset: Preset
    topology: Topology
    mesh: Mapping[str, int]
    clips: int
    micro_batches: int = 1
    blocks: int = 1
    row_multiple: int = 8
    caption_tokens: int = CAPTION_TOKENS
    dtype: str = "bfloat16"
    weights: str = "float"
    embed_clips: int = 16
    options: Mapping[str, Any] = dataclasses.field(default_factory=lambda: QUICK)
    watch: Watch = unwatched

    @property
    def timed(self) -> bool:
        """Whether programs are compiled as a run would, so that the compiler's estimates of time mean something."""
        return not self.options.keys() & QUICK.keys()

    @property
    def trained(self) -> ModelConfig:
        """The architecture of a training step. Raises InputError where every matrix trains and int8 is asked for."""
        return self.config if self.weights == "float" else over_int8(self.config, self.recipe.trainable)

    @property
    def embedded(self) -> ModelConfig:
        """The architecture of the embedding pass."""
        return self.config.with_weights(self.weights)

    @property
    def kernel(self) -> str:
        """Attention kernel: the TPU's, where the recipe leaves it open."""
        return "splash" if self.recipe.attention == "auto" else self.recipe.attention

    @property
    def looped(self) -> int:
        """How often the compiled program runs in a step: once, or for each micro-batch that is a pool of its own."""
        return self.micro_batches if self.recipe.losses.negatives == "micro" else 1


@dataclasses.dataclass(frozen=True)
class Memory:
    """Of one device, GiB, as the compiler counts it.

    Attributes:
      peak: compare it with the limit; of an embedding program with the weights of the others, which stay where they are.
      arguments: weights, optimizer and batch.
      temporaries: what lives within the program.
      host: temporaries in the host's memory (remat "offload").
    """

    peak: float
    limit: float
    arguments: float
    temporaries: float
    host: float = 0.0

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit


@dataclasses.dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
      name: "train", "embed/rows", "evaluate/product" ...
      kind, shapes: of a training step.
      memory, found: what the compiler says; None where it was only lowered or refused.
      refusal: why it does not fit.
      seconds: that compiling took.
      timing: of one run; None where it was not compiled at full effort, or the compiler wrote no estimates.
    """

    name: str
    kind: StepKind | None = None
    shapes: BatchShapes | None = None
    memory: Memory | None = None
    found: Sequence[Collective] | None = None
    refusal: OutOfMemory | None = None
    seconds: float = 0.0
    timing: Timing | None = None

    @property
    def status(self) -> str:
        if self.refusal is not None or (self.memory is not None and not self.memory.fits):
            return "out of memory"
        return "fits" if self.memory is not None else "lowered"


def train_program(setting: Setting, mesh: Mesh | AbstractMesh, count: int) -> Program:
    """Returns the training step at position `count` of the period-3 cycle; compiled where the mesh has devices.

    Raises:
      ConfigError: for a batch that does not divide.
    """
    kind = step_kind(count, setting.recipe.losses, setting.recipe.mined)
    kind, shapes = planned_batch(
        setting.config, setting.preset, kind, caption_tokens=setting.caption_tokens, row_multiple=setting.row_multiple
    )
    recipe = dataclasses.replace(setting.recipe, attention=setting.kernel)
    step = TrainStep(setting.trained, recipe, dtype=setting.dtype, mesh=mesh)
    state, frozen = abstract_state(step, setting.trained, setting.dtype)
    batch = abstract_batch(
        setting.config,
        kind,
        shapes,
        clips=setting.clips,
        micro_batches=1 if setting.looped > 1 else setting.micro_batches,
        blocks=setting.blocks,
        mesh=mesh,
    )
    lowered = step.lower(state, frozen, batch, "tpu", one_of_several=setting.looped > 1)
    waiting = (setting.looped - 1) * sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(batch)) / batch_shards(mesh)
    return _compiled(Program("train", kind, shapes), lowered, mesh, setting, waiting)


def embed_programs(setting: Setting, mesh: Mesh | AbstractMesh) -> list[Program]:
    """Returns the programs of the embedding pass: the towers and the rows of a batch of clips with every table."""
    encoder = abstract_encoder(setting.embedded, param_dtype=jnp.dtype(setting.dtype))
    runner = Runner(encoder, mesh, setting.kernel)
    clips = math.lcm(setting.embed_clips, batch_shards(mesh))
    batch = abstract_encoder_batch(setting.config, setting.preset, clips, setting.caption_tokens)
    lowered = runner.lower(batch, "tpu")
    weights = weight_bytes(setting.embedded, mesh, setting.dtype)
    made = []
    for name, low in lowered.items():
        _, table, *rest = low.args_info[0]
        given = _values(table) + _values(rest) / batch_shards(mesh)
        made.append(_compiled(Program(f"embed/{name}"), low, mesh, setting, beside=lambda read, given=given: weights - (read - given)))
    return made


def weight_bytes(config: ModelConfig, mesh: Mesh | AbstractMesh, dtype: str) -> float:
    """Returns the bytes of all weights on one device of a mesh."""
    places = param_shardings(config, mesh)
    shapes = abstract_params(config, jnp.dtype(dtype))
    return float(sum(math.prod(places[path].shard_shape(leaf.shape)) * leaf.dtype.itemsize for path, leaf in shapes.items()))


def _values(tree: Any) -> int:
    """Bytes of the arrays that a tree of `jax.stages.ArgInfo` speaks of."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def evaluate_programs(setting: Setting, mesh: Mesh) -> list[Program]:
    """Returns the evaluator's programs for tables of EVALUATED rows: one tile of similarities, and the counting of ranks in it."""
    lowered = {
        f"evaluate/{name} {rows:,} rows": low
        for rows in EVALUATED
        for name, low in ranks.lower_tile(mesh, setting.config.decoder.hidden_size, ranks.tile_side(rows)).items()
    }
    return [_compiled(Program(name), low, mesh, setting) for name, low in lowered.items()]


def _compiled(
    program: Program,
    lowered: jax.stages.Lowered,
    mesh: Mesh | AbstractMesh,
    setting: Setting,
    waiting: float = 0.0,
    beside: Callable[[float], float] | None = None,
) -> Program:
    """Compiles where the mesh has devices.

    Args:
      waiting: bytes of a device that the program is not given: of batches still to come.
      beside: from the bytes of the program's arguments those of what stays in memory beside them: weights that it does not read.
    """
    if not isinstance(mesh, Mesh):
        return program
    start = time.monotonic()
    try:
        options = {**dict(setting.topology.chip.compiler), **setting.options}
        compiled = setting.watch(program.name, lambda: lowered.compile(compiler_options=options))
    except jax.errors.JaxRuntimeError as error:
        refusal = read_refusal(
            str(error),
            clips_per_device=setting.clips / batch_shards(mesh),
            micro_batches=setting.micro_batches,
            negatives=setting.recipe.losses.negatives,
            remat=setting.recipe.remat,
        )
        if refusal is None:
            raise
        return dataclasses.replace(program, refusal=refusal, seconds=time.monotonic() - start)
    taken = time.monotonic() - start
    stats: Any = compiled.memory_analysis()
    gib = 2.0**30
    waiting += max(0.0, beside(stats.argument_size_in_bytes)) if beside else 0.0
    memory = Memory(
        peak=(stats.peak_memory_in_bytes + waiting) / gib,
        limit=setting.topology.chip.limit_gib,
        arguments=stats.argument_size_in_bytes / gib,
        temporaries=stats.temp_size_in_bytes / gib,
        host=stats.host_temp_size_in_bytes / gib,
    )
    per_slice = setting.topology.devices // setting.topology.slices if setting.topology.slices > 1 else 0
    text = compiled.as_text() or ""
    causal = setting.config.attention == "causal"
    reach = program.kind.reach if program.kind else 0
    timing = read_timing(text, setting.topology.chip, per_slice, causal, reach) if setting.timed else None
    return dataclasses.replace(program, memory=memory, found=collectives(text, per_slice), seconds=taken, timing=timing)
