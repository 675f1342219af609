"""A run as one frozen record, built from an ml_collections config: what is trained, on what, how long, and what is kept and watched."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from omni_jax.config import ConfigError, LoraConfig, Preset
from omni_jax.config import preset as preset_named
from omni_jax.config.batches import AUGMENT, AugmentConfig, BatchSection
from omni_jax.config.errors import check_choices, check_fields
from omni_jax.train.config_parsing import record_of
from omni_jax.train.optimizer import OptimizerConfig
from omni_jax.train.plan import LossConfig, renamed
from omni_jax.train.step import StepConfig
from omni_jax.train.trainable import TrainableConfig

DTYPES = ("bfloat16", "float32")
WEIGHTS = ("keep", "int8")
COLLAPSE = ("warn", "stop")
HARD_NEGATIVES = ("shuffle", "mined", "both")


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """Where the weights come from.

    Attributes:
      base: folder that `omni-jax convert to-jax` wrote; "" draws fresh weights.
      architecture: of fresh weights, as `conversion.fresh.write_fresh` takes it.
      lora: LoRA matrices to add to a base that has none; None adds none.
      dtype: of activations and of frozen weights, "bfloat16" or "float32".
      weights: "keep", or "int8": matrices that stay are rounded to int8 while they are read; what trains is not.
    """

    base: str = ""
    architecture: Mapping[str, Any] | None = None
    lora: LoraConfig | None = None
    dtype: str = "bfloat16"
    weights: str = "keep"

    def __post_init__(self) -> None:
        check_choices(self, "config field model.", dtype=DTYPES, weights=WEIGHTS)
        if bool(self.base) == bool(self.architecture):
            raise ConfigError("config fields model.base and model.architecture: give one, a converted folder or the shape of fresh weights")


@dataclasses.dataclass(frozen=True)
class DataSection:
    """What is trained on.

    Attributes:
      train: folder that `omni-jax prepare` wrote, local or at gs:// or s3://, or a manifest whose media are decoded while training.
      media_root: folder that relative media paths start from; "" for the manifest's own.
      preset, preset_fields: how clips and captions become tokens, and fields that differ from the named preset.
      negatives: where a hard negative takes its caption, sound or picture from. "shuffle": from another clip of the step, as released.
        "mined": from a clip that `omni-jax mine` found hard, where the record has one. "both": so for half of the records of each step.
      mined: manifest that `omni-jax mine` wrote; "" where `train` is one.
      distinct: what a step holds once only: "caption", "id_prefix" or "none".
      workers: decoding processes; 0 decodes in this one.
      timeout: seconds one clip may take to decode.
      cache: local folder for clips that are read from gs:// or s3://; "" for `clips` in the cache of omni_jax (OMNI_JAX_CACHE).
      cache_gb: gigabytes of clips in it, at most; all processes of a host share it.
      augment: of the positive tuple.
    """

    train: str
    media_root: str = ""
    preset: str = "training"
    preset_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    negatives: str = "shuffle"
    mined: str = ""
    distinct: str = "caption"
    workers: int = 2
    timeout: float = 120.0
    cache: str = ""
    cache_gb: float = 16.0
    augment: AugmentConfig = AUGMENT

    def __post_init__(self) -> None:
        if not self.train:
            raise ConfigError("config field data.train: empty; give a folder of shards or a manifest (--config.data.train=...)")
        if self.workers < 0 or not self.timeout > 0:
            raise ConfigError("config fields data.workers and data.timeout: must not be negative, timeout must be positive")
        check_fields(self, "config field data.", "cache_gb", lambda value: value > 0, "must be positive")
        check_choices(self, "config field data.", negatives=HARD_NEGATIVES)
        if self.mined and self.negatives == "shuffle":
            raise ConfigError('config field data.mined: is not read with data.negatives="shuffle"; set data.negatives to "mined" or "both"')
        self.resolved_preset()

    def resolved_preset(self) -> Preset:
        """Returns the preset with its changed fields."""
        fields = dict(self.preset_fields)
        made = record_of(Preset, preset_named(self.preset).merged(fields), "data.preset_fields")
        made.check_effect(fields)
        return made


@dataclasses.dataclass(frozen=True)
class MeshSection:
    """Sizes of the mesh axes within a slice.

    Attributes:
      data: devices that hold copies of the weights and take different clips.
      fsdp: devices that the weights are split over, each with clips of its own; 0 takes all devices that the other axes leave.
      tensor: devices that share each matrix product.
      slices: slices of a pod, which data parallelism joins.
    """

    data: int = 1
    fsdp: int = 0
    tensor: int = 1
    slices: int = 1

    def __post_init__(self) -> None:
        if min(self.data, self.tensor, self.slices) < 1 or self.fsdp < 0:
            raise ConfigError(f"config field mesh={dataclasses.asdict(self)}: data, tensor and slices must be at least 1, fsdp at least 0")


@dataclasses.dataclass(frozen=True)
class CheckpointSection:
    """When checkpoints are written.

    Attributes:
      every: steps between two checkpoints; the last step is always saved.
      keep: how many of the newest checkpoints are kept.
    """

    every: int = 500
    keep: int = 3

    def __post_init__(self) -> None:
        if min(self.every, self.keep) < 1:
            raise ConfigError("config fields checkpoint.every and checkpoint.keep: must be at least 1")


@dataclasses.dataclass(frozen=True)
class EvaluationSection:
    """The 12 directions on clips that are not trained on.

    Attributes:
      manifest: of those clips, or a folder of them that `omni-jax prepare` wrote; "" evaluates nothing.
      media_root: as in the data section.
      every: steps between two evaluations; 0 evaluates at the end alone.
      batch_size: clips encoded together.
      truncate_dims: numbers of leading dimensions that are scored as well, each on its own.
    """

    manifest: str = ""
    media_root: str = ""
    every: int = 0
    batch_size: int = 16
    truncate_dims: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.every < 0 or self.batch_size < 1:
            raise ConfigError("config fields evaluation.every and evaluation.batch_size: must be at least 0 and 1")
        if min(self.truncate_dims, default=1) < 1 or len(set(self.truncate_dims)) < len(self.truncate_dims):
            raise ConfigError(
                f"config field evaluation.truncate_dims={self.truncate_dims}: must be different positive numbers of dimensions"
            )


@dataclasses.dataclass(frozen=True)
class LogSection:
    """When metrics are written.

    Attributes:
      every: steps between two rows with all metrics; the rows of other steps hold the clip digest, the data counts and `collapsed_in_row`.
    """

    every: int = 10

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError("config field log.every: must be at least 1")


@dataclasses.dataclass(frozen=True)
class StopSection:
    """Early-stopping thresholds. Consecutive counters are restored on resume.

    Attributes:
      skipped_in_row: steps in a row without a finite loss and gradient that end the run.
      max_mean_cosine: mean cosine between embeddings of different clips above which they count as collapsed.
      min_effective_rank: effective rank below which they do.
      collapsed_in_row: steps in a row of that kind before anything happens; fresh weights start so.
      collapse: "warn" says so, "stop" ends the run.
    """

    skipped_in_row: int = 10
    max_mean_cosine: float = 0.99
    min_effective_rank: float = 1.5
    collapsed_in_row: int = 50
    collapse: str = "warn"

    def __post_init__(self) -> None:
        if min(self.skipped_in_row, self.collapsed_in_row) < 1:
            raise ConfigError("config fields stop.skipped_in_row and stop.collapsed_in_row: must be at least 1")
        check_choices(self, "config field stop.", collapse=COLLAPSE)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run.

    Attributes:
      model: where the weights come from.
      data: the training clips.
      batch: clips of a step.
      losses: the losses and their negatives.
      optimizer: its `total_steps` comes from `steps` or `epochs`.
      trainable: which parameters train.
      mesh: sizes of the device mesh.
      checkpoint: when checkpoints are written.
      evaluation: held-out clips.
      log: when metrics are written.
      stop: thresholds for skipped steps and collapsed embeddings.
      remat: what the backward pass computes again, as `StepConfig.remat` says.
      seed: of everything drawn: fresh weights, LoRA, dropout, order, augmentation.
      steps: number of steps; 0 takes `epochs`.
      epochs: passes over the clips; 0 takes `steps`.
    """

    model: ModelSection
    data: DataSection
    batch: BatchSection
    losses: LossConfig
    optimizer: OptimizerConfig
    trainable: TrainableConfig
    mesh: MeshSection
    checkpoint: CheckpointSection
    evaluation: EvaluationSection
    log: LogSection
    stop: StopSection
    remat: str = "layer"
    seed: int = 2025
    steps: int = 0
    epochs: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.epochs < 0 or (self.steps > 0) == (self.epochs > 0):
            raise ConfigError("config fields steps and epochs: give one of them, a positive number")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"config field seed={self.seed}: must be from 0 to 2^32 - 1")

    @classmethod
    def from_config(cls, config: Any) -> RunConfig:
        """Reads an ml_collections ConfigDict, or a plain nested dict as `to_json` gives it. Sections left out take their
        defaults, and fields of the losses may have the names that `plan.RENAMED` lists.

        Raises:
          ConfigError: naming the field that is unknown, missing, of the wrong type or out of range.
        """
        values = dict(config.to_dict() if hasattr(config, "to_dict") else config)
        for name in SECTIONS:
            values.setdefault(name, {})
        if isinstance(values["losses"], Mapping):
            values["losses"] = renamed(values["losses"])
        optimizer = values.pop("optimizer")
        made = record_of(OptimizerConfig, optimizer, "optimizer", total_steps=max(1, _whole(values.get("steps", 0))))
        whole = record_of(cls, values, optimizer=made)
        whole.step_config(1)
        return whole

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON-ready dict that `from_config` reads back to an equal record."""
        value = dataclasses.asdict(self)
        del value["optimizer"]["total_steps"]
        return json.loads(json.dumps(value))

    def total_steps(self, updates_per_epoch: int) -> int:
        """Returns the steps of the whole run."""
        return self.steps or max(1, math.floor(self.epochs * updates_per_epoch))

    def step_config(self, total_steps: int) -> StepConfig:
        """Returns what decides a step, for a run of so many."""
        return StepConfig(
            optimizer=dataclasses.replace(self.optimizer, total_steps=total_steps),
            losses=self.losses,
            trainable=self.trainable,
            remat=self.remat,
            frozen_dtype=self.model.dtype,
            seed=self.seed,
            text_head=self.data.resolved_preset().text_head,
            mined=self.data.negatives != "shuffle",
        )


SECTIONS = tuple(f.name for f in dataclasses.fields(RunConfig) if f.default is dataclasses.MISSING)


TrainConfig = RunConfig
"""The same under its public name, `omni_jax.TrainConfig`."""


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0
