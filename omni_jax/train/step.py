"""The training step: compiled programs from a batch to the next state, one for each kind of step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from clu.metrics import Average, Collection
from flax import struct
from jax.sharding import AbstractMesh, Mesh

from omni_jax.config import ModelConfig
from omni_jax.model.attention import choose, choose_for
from omni_jax.objectives import HEALTH
from omni_jax.parallel import compiler_options as chip_options
from omni_jax.parallel import computing_in
from omni_jax.train import remat
from omni_jax.train.batch import TrainBatch, UpdateBatch
from omni_jax.train.gradients import Forward, Metrics
from omni_jax.train.optimizer import OptimizerConfig, make_optimizer, schedule
from omni_jax.train.plan import LossConfig
from omni_jax.train.state import TrainState, array_shardings, new_state, state_shardings
from omni_jax.train.trainable import Arrays, GroupCount, TrainableConfig, count_groups, group_of, select, split
from omni_jax.types import InputError, StepKind


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Everything that decides what one step computes.

    Attributes:
      remat: what the backward pass computes again of a decoder layer: "none" nothing, "layer" everything, "dots" all but the outputs of
        linear maps and attention, "attention" all but attention's output, "offload" everything, the layers' inputs waiting in the host's
        memory. "layer:22,dots": the first 22 layers, and the rest. "auto" is for a plan (`omni-jax compile`), which finds what fits.
      attention: kernel of the decoder's attention, `model.attention.KERNELS`; "auto" takes the platform's.
      frozen_dtype: dtype name that frozen weights are stored in; None leaves them as they come.
      seed: of LoRA dropout.
      text_head: "last" or "fused", as `Preset.text_head`: what captions alone are embedded by.
      mined: whether batches bring sound and picture of mined hard negatives, as `step_kind` takes it.
    """

    optimizer: OptimizerConfig
    losses: LossConfig = dataclasses.field(default_factory=LossConfig)
    trainable: TrainableConfig = dataclasses.field(default_factory=TrainableConfig)
    remat: str = "layer"
    attention: str = "auto"
    frozen_dtype: str | None = "bfloat16"
    seed: int = 2025
    text_head: str = "last"
    mined: bool = False

    def __post_init__(self) -> None:
        if self.remat != remat.AUTO:
            remat.read(self.remat)
        choose(self.attention, "cpu")


class TrainStep:
    """Runs steps on one device or a mesh.

    Attributes:
      config: the recipe.
      mesh: the devices, None for one.
      forward: the encoder as functions of its parameters.
      rate: number of steps made -> learning rate.
      names: paths of the encoder's parameters that train.
      groups: the start-up report.
      optimizer: over the flat dict of trainable arrays.
      programs: compiled programs so far, one string each.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: StepConfig,
        *,
        dtype: Any = jnp.bfloat16,
        mesh: Mesh | AbstractMesh | None = None,
        compiler_options: Mapping[str, Any] | None = None,
    ):
        """Takes the architecture, the recipe, the dtype of activations, the devices, and options of the XLA compiler.

        Raises:
          InputError: when a head that should train would not.
        """
        self.names = select(model, config.trainable)
        config.losses.widths(model.decoder.hidden_size)
        self.groups: tuple[GroupCount, ...] = count_groups(model, self.names)
        self.programs: list[str] = []
        self.config, self.mesh, self.rate = config, mesh, schedule(config.optimizer)
        self._model, self._dtype = model, jnp.dtype(dtype)
        attention = choose_for(config.attention, mesh)
        kept = remat.policies(config.remat, model.decoder.num_layers)
        self.forward = Forward(model, config.losses, self.names, self._dtype, kept, attention, config.text_head)
        self.optimizer = make_optimizer(config.optimizer)
        self._dropout = model.lora is not None and model.lora.dropout > 0
        self._options = chip_options(mesh) | dict(compiler_options or {})
        self._compiled: dict[str, Callable[..., Any]] = {}

    def init(self, params: Mapping[tuple[str, ...], Any]) -> tuple[TrainState, Arrays]:
        """Returns the first state and the frozen weights, both on the devices; `params` stays usable."""
        state, frozen = self.start(params)
        if self.mesh is None:
            return state, frozen
        places = array_shardings(frozen, self._model, self.mesh)
        return jax.device_put(state, state_shardings(state, self._model, self.mesh)), jax.device_put(frozen, places)

    def start(self, params: Mapping[tuple[str, ...], Any]) -> tuple[TrainState, Arrays]:
        """Returns the first state and the frozen weights where the parameters lie."""
        trainable, frozen = split(params, self.names, self.config.frozen_dtype)
        trainable |= {path: jnp.asarray(value, jnp.float32) for path, value in self.config.losses.trained.items()}
        return new_state(trainable, self.optimizer, self.config.seed), frozen

    def __call__(self, state: TrainState, frozen: Arrays, update: UpdateBatch) -> tuple[TrainState, Metrics]:
        """Returns the next state and the metrics, scalars on the devices; `state` is given away.

        Metrics are the mean over micro-batches of "loss", the active losses and their scalars, "mean_cosine", "effective_rank" and HEALTH;
        then "grad_norm" (before clipping, also by group as "grad_norm/lora"), "learning_rate", "skipped" and "skipped_in_row".

        Raises:
          InputError: for batches whose kinds do not fit the recipe.
        """
        batches = update if isinstance(update, tuple) else (update,)
        for batch in batches:
            if len(batch.kinds) != batch.micro_batches:
                raise InputError(f"a batch of {batch.micro_batches} micro-batches lists {len(batch.kinds)} kinds; give each its kind")
        kinds = [kind for batch in batches for kind in batch.kinds]
        pooled = self.config.losses.negatives == "global"
        if pooled and (len(batches) > 1 or len(set(kinds)) > 1):
            raise InputError("with negatives='global' every micro-batch of a step has the same kind; use kinds_of_update")
        # The programs see no kinds in the batch, so that the order of kinds causes no recompilation.
        arrays = [dataclasses.replace(batch, kinds=()) for batch in batches]
        with computing_in(self._dtype, self.mesh):
            if pooled or len(kinds) == 1:
                return self._program("update", self._update)(state, frozen, arrays[0], kind=kinds[0])
            total: tuple[Arrays, Metrics] | None = None
            places = [(batch, place) for batch in arrays for place in range(batch.micro_batches)]
            for index, ((batch, place), kind) in enumerate(zip(places, kinds, strict=True)):
                one = self._program("micro", self._micro)(state, frozen, batch, jnp.int32(place), jnp.int32(index), kind=kind)
                total = one if total is None else self._program("add", _add)(total, one)
            return self._program("apply", self._apply_mean)(state, total, jnp.float32(len(kinds)))

    def lower(
        self, state: TrainState, frozen: Arrays, batch: TrainBatch, platform: str | None = None, *, one_of_several: bool = False
    ) -> jax.stages.Lowered:
        """Returns the lowered program of one step, arguments may be shapes: for compiling ahead and for reading what it needs.

        Args:
          platform: lowers for another one ("tpu") than the mesh's or the default device's.
          one_of_several: lowers the program of one micro-batch that is a pool of its own: a loop over such programs makes the step.
        """
        kind, arrays = batch.kinds[0], dataclasses.replace(batch, kinds=())
        with computing_in(self._dtype, self.mesh):
            program: Any = self._program("micro", self._micro) if one_of_several else self._program("update", self._update)
            number = jax.ShapeDtypeStruct((), jnp.int32)  # an array would need a device, and those of a planned mesh are not there
            which: dict[str, Any] = {"place": number, "index": number} if one_of_several else {}
            traced = program.trace(state, frozen, arrays, kind=kind, **which)
            return traced.lower(lowering_platforms=None if platform is None else (platform,))

    # ------------------------------------------------------------------------------------------------------------ traced functions

    def _update(self, state: TrainState, frozen: Arrays, batch: TrainBatch, kind: StepKind) -> tuple[TrainState, Metrics]:
        count = batch.micro_batches
        if count == 1:
            first = jax.tree.map(lambda x: x[0], batch)
            return self._apply(state, *self.forward.plain(state.trainable, frozen, first, kind, self._key(state, 0)))
        keys = None if not self._dropout else jnp.stack([k for i in range(count) if (k := self._key(state, i)) is not None])
        return self._apply(state, *self.forward.cached(state.trainable, frozen, batch, kind, keys))

    def _micro(
        self, state: TrainState, frozen: Arrays, batch: TrainBatch, place: jax.Array, index: jax.Array, kind: StepKind
    ) -> tuple[Arrays, Collection]:
        """Gradient and metrics of the micro-batch at `place` of a batch, number `index` of the step."""
        one = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, place, keepdims=False), batch)
        gradients, found = self.forward.plain(state.trainable, frozen, one, kind, self._key(state, index))
        # Kinds differ in what they embed: one type of metrics holds all, and a mean is that of the micro-batches which have it.
        found = dict.fromkeys(HEALTH, jnp.full((), jnp.nan, jnp.float32)) | found
        return gradients, _averages(tuple(found)).single_from_model_output(**found)

    def _apply_mean(self, state: TrainState, total: tuple[Arrays, Collection], count: jax.Array) -> tuple[TrainState, Metrics]:
        gradients, averages = total
        return self._apply(state, jax.tree.map(lambda x: x / count, gradients), averages.compute())

    def _apply(self, state: TrainState, gradients: Arrays, metrics: Metrics) -> tuple[TrainState, Metrics]:
        norm = jnp.asarray(optax.tree.norm(gradients))
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.trainable)
        # A finite gradient may have moments that are not.
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"]) & jnp.isfinite(optax.tree.norm(updates))
        trainable = optax.apply_updates(state.trainable, updates)
        made, kept = (trainable, optimizer), (state.trainable, state.optimizer)
        trainable, optimizer = jax.tree.map(lambda new, old: jnp.where(finite, new, old), made, kept)
        missed = (~finite).astype(jnp.int32)
        after = TrainState(
            step=state.step + 1,
            trainable=trainable,
            optimizer=optimizer,
            skipped=state.skipped + missed,
            skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
            key=state.key,
        )
        groups = sorted({group_of(name) for name in gradients})
        by_group = {g: jnp.asarray(optax.tree.norm({n: x for n, x in gradients.items() if group_of(n) == g})) for g in groups}
        metrics = {
            **metrics,
            "grad_norm": norm,
            **{f"grad_norm/{group}": value for group, value in by_group.items()},
            "learning_rate": self.rate(state.step - state.skipped),
            "skipped": after.skipped,
            "skipped_in_row": after.skipped_in_row,
        }
        return after, metrics

    def _key(self, state: TrainState, index: jax.Array | int) -> jax.Array | None:
        """The dropout key of a micro-batch: a function of the seed, the step and its number alone, so that any step can be run again."""
        return jax.random.fold_in(jax.random.fold_in(state.key, state.step), index) if self._dropout else None

    # ----------------------------------------------------------------------------------------------------------------- compilation

    def _program(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the jitted function, made once."""
        if name not in self._compiled:

            def traced(*args: Any, **static: Any) -> Any:
                # Python runs this once per compilation, never when a compiled program is reused.
                self.programs.append(" ".join([name, *map(str, static.values())]))
                out = function(*args, **static)
                return self._pinned(out) if name in ("update", "apply") else out

            given = {"update": 0, "apply": 0, "add": 0}.get(name, ())
            self._compiled[name] = jax.jit(traced, static_argnames=("kind",), donate_argnums=given, compiler_options=self._options)
        return self._compiled[name]

    def _pinned(self, out: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        """Keeps the state where it was: another sharding would compile the next step again."""
        if self.mesh is None:
            return out
        state, metrics = out
        return jax.lax.with_sharding_constraint(state, state_shardings(state, self._model, self.mesh)), metrics


@functools.cache
def _averages(names: tuple[str, ...]) -> type[Collection]:
    """Returns the means over micro-batches of metrics: one type for the same names, which JAX takes for one structure."""
    return Collection.create(**{name: (_AverageOfNumbers if name in HEALTH else Average).from_output(name) for name in names})


@struct.dataclass
class _AverageOfNumbers(Average):
    """The mean over micro-batches that are not NaN."""

    @classmethod
    def from_model_output(cls, values: jax.Array, mask: jax.Array | None = None, **_: Any) -> Average:
        there = ~jnp.isnan(values)  # of one value, which clu's own masks do not take
        made: Any = cls  # the type checker does not see the fields that flax adds
        return made(total=jnp.where(there, values, 0), count=there.astype(jnp.int32))


def _add(a: tuple[Arrays, Collection], b: tuple[Arrays, Collection]) -> tuple[Arrays, Collection]:
    return jax.tree.map(jnp.add, a[0], b[0]), a[1].merge(b[1])
