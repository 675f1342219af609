"""The workdir of a run: what it was started with, and the model that its checkpoints hold.

config.json      the run's config, the architecture, which base weights and clips by digest
base/            base weights, where they were drawn afresh; otherwise they stay where they were
checkpoints/N/   see checkpoint.py
metrics.jsonl, tensorboard/, run.lock
skipped_records.jsonl  records that could not be used; skipped_records.N.jsonl those of process N
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from omni_jax.config import ConfigError, ModelConfig
from omni_jax.config.made_with import differences, listed
from omni_jax.io import atomic_write_text, lock
from omni_jax.io.messages import MALFORMED, as_input_error
from omni_jax.types import InputError

if TYPE_CHECKING:
    from omni_jax.train.run_config import RunConfig

CONFIG, BASE, CHECKPOINTS, LOCK = "config.json", "base", "checkpoints", "run.lock"
FORMAT = 1
_SKIPPED = re.compile(r"(skipped_records|quarantine)(\.\d+)?\.jsonl")  # what `skipped_records_name` gives

FREE = (
    *("mesh", "remat", "checkpoint", "evaluation", "log", "stop", "model.base"),
    *("data.train", "data.media_root", "data.mined", "data.workers", "data.timeout"),
)
"""Config fields that may change when a run is resumed: they do not decide what is computed, or a digest holds what does."""

TOKENIZER_FILES, PRESET_FIELDS, MEDIA_FILES = "tokenizer files", "preset fields", "media files"
MINED = "mined negatives"
LATER = (TOKENIZER_FILES, PRESET_FIELDS, MEDIA_FILES)
"""Digests that the `config.json` of older runs lacks."""


@dataclasses.dataclass(frozen=True)
class WorkdirConfig:
    """What `config.json` says.

    Attributes:
      run: the config, as `RunConfig.to_json` gives it.
      model: the architecture, LoRA included.
      base: folder of the base weights; one inside the workdir is relative to it.
      digests: name -> digest of what the run was started from: "base weights", "adapter weights", "clips", and those of LATER; "media
        files" only where clips are decoded while training, "mined negatives" only where they are trained on.
      total_steps: steps of the whole run.
    """

    run: Mapping[str, Any]
    model: ModelConfig
    base: str
    digests: Mapping[str, str | None]
    total_steps: int

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **dataclasses.asdict(self), "model": self.model.to_json()}


def is_workdir(folder: epath.PathLike) -> bool:
    """Whether a folder is the workdir of a run (and not a converted folder)."""
    folder = epath.Path(folder)
    return (folder / CHECKPOINTS).exists() and (folder / CONFIG).exists()


def read_config(folder: epath.PathLike) -> WorkdirConfig | None:
    """Returns what the run of a workdir was started with; None where none was started. Raises InputError for a file that cannot be read."""
    path = epath.Path(folder) / CONFIG
    if not path.exists():
        return None
    with as_input_error(f"{path}: cannot be read", "start again with another --workdir", OSError, *MALFORMED):
        value = json.loads(path.read_text())
        if value.pop("format") != FORMAT:
            raise ValueError("written by another version of omni_jax")
        return WorkdirConfig(**{**value, "model": ModelConfig.from_json(value["model"])})


def read_workdir(folder: epath.PathLike, step: int | None = None) -> tuple[WorkdirConfig, epath.Path, int]:
    """Returns what a run was started with, its base weights' folder, and the step of its newest whole checkpoint, or `step`.

    Raises:
      InputError: when the folder is no workdir, has no such checkpoint, or its base weights are gone.
    """
    from omni_jax.train.checkpoint import list_steps  # slow: who looks for a run may find none

    folder = epath.Path(folder)
    config = read_config(folder)
    if config is None:
        raise InputError(f"{folder}: not the workdir of a training run ({CONFIG} is missing); make one with omni-jax train")
    steps = list_steps(folder / CHECKPOINTS)
    if not steps:
        raise InputError(f"{folder}: the run has no checkpoint yet; let it train longer")
    if step is not None and step not in steps:
        raise InputError(f"{folder}: no checkpoint of step {step}; choose one of {', '.join(map(str, steps))}")
    chosen = steps[-1] if step is None else step
    base = epath.Path(folder) / config.base
    if not base.exists():
        raise InputError(f"{folder}: its base weights are no longer at {base}; put them back (config.json names the place)")
    return config, base, chosen


def read_trained(folder: epath.PathLike, step: int) -> dict[str, np.ndarray]:
    """Returns path ("head/fc1/kernel") -> float32 array of what trained of the model, layer stacks with their leading axis.

    Raises:
      InputError: when the checkpoint of that step cannot be read.
    """
    from omni_jax.train.checkpoint import read_trainable
    from omni_jax.train.trainable import loss_scalars

    trainable = read_trainable(epath.Path(folder) / CHECKPOINTS, step)
    return {name: array for name, array in trainable.items() if name not in loss_scalars(trainable)}


def trained_fingerprints(folder: epath.PathLike, step: int) -> dict[str, str] | None:
    """Returns path -> fingerprint of what `read_trained` gives, reading none of it; None of a checkpoint of a version that kept none.

    Raises:
      InputError: when the file of fingerprints cannot be read.
    """
    from omni_jax.train.checkpoint import trainable_fingerprints
    from omni_jax.train.trainable import loss_scalars

    found = trainable_fingerprints(epath.Path(folder) / CHECKPOINTS, step)
    return None if found is None else {name: digits for name, digits in found.items() if name not in loss_scalars(found)}


def skipped_records_name(folder: epath.Path, process: int) -> str:
    """Returns the name of the list of records that a process could not use. A run that began under the earlier name keeps it."""
    end = f".{process}.jsonl" if process else ".jsonl"
    return f"quarantine{end}" if (folder / f"quarantine{end}").exists() else f"skipped_records{end}"


def check_workdir_free(folder: epath.PathLike) -> None:
    """Raises InputError when a folder holds other things than a run's: before anything is written there."""
    folder = epath.Path(folder)
    if folder.exists() and read_config(folder) is None:
        names = sorted(p.name for p in folder.iterdir() if p.name not in (LOCK, BASE) and not p.name.startswith("."))
        strange = [name for name in names if not _SKIPPED.fullmatch(name)]  # a start that failed lists records, too
        if strange:
            raise InputError(f"{folder}: is not empty ({strange[0]}) and not the workdir of a run; choose another --workdir")


def claim_workdir(folder: epath.PathLike, config: WorkdirConfig) -> None:
    """Makes the workdir this run's own: writes `config.json`, or checks that the one there is of the same run.

    Raises:
      InputError: when another run is there, saying what differs, or the folder holds other things.
    """
    folder = epath.Path(folder)
    there = read_config(folder)
    if there is not None:
        if different := list(_differences(there, config)):
            raise InputError(f"{folder}: holds another run: {listed(different, 3)}; choose another --workdir")
    else:
        check_workdir_free(folder)
    atomic_write_text(folder / CONFIG, json.dumps(config.to_json(), indent=1) + "\n")


def run_of(config: WorkdirConfig) -> RunConfig:
    """Returns the config of a workdir's run as a record. Raises ConfigError when this version does not know it."""
    from omni_jax.train.run_config import RunConfig

    try:
        return RunConfig.from_config(config.run)
    except ConfigError as e:
        raise ConfigError(f"{CONFIG}: {e}") from None


def _differences(there: WorkdirConfig, here: WorkdirConfig) -> Iterator[str]:
    # A digest that is recorded only since a later version says nothing about a run that began before it.
    for name in sorted({*there.digests, *here.digests}):
        if there.digests.get(name) != here.digests.get(name) and (name in there.digests or name not in LATER):
            yield f"its {name} differ (digest mismatch)"
    # Read and written again: a field that a later version added has its default in an older run, one that it renamed its new name.
    old, new = ({**run_of(c).to_json(), "architecture": c.model.to_json()} for c in (there, here))
    yield from differences(old, new, FREE)
    if there.total_steps != here.total_steps:
        yield f"it has {there.total_steps} steps, this one has {here.total_steps}"


@contextlib.contextmanager
def run_lock(workdir: epath.PathLike) -> Iterator[None]:
    """Holds the workdir, made where it is not there, while the block runs. Object stores have no locks: there it only makes the folder.

    Raises:
      InputError: when another process holds it, or it cannot be written.
    """
    folder = epath.Path(workdir)
    with as_input_error(f"{folder}: cannot be written", "choose another --workdir"):
        folder.mkdir(parents=True, exist_ok=True)
        if "://" in os.fspath(folder):
            yield
            return
        held = lock(folder / LOCK)
    if held is None:
        raise InputError(f"{folder}: another run is training here; wait for it, or choose another --workdir")
    with held:
        yield
