"""A training run from Python, as `omni-jax train` makes it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from etils import epath

from omni_jax.config.extras import lacking
from omni_jax.types import InputError

if TYPE_CHECKING:
    from omni_jax.api.training import Outcome
    from omni_jax.train import RunConfig


def train(
    config: RunConfig | Mapping[str, Any],
    workdir: epath.PathLike,
    *,
    log: Callable[[str], None] | None = None,
    show_progress: bool | None = None,
) -> Outcome:
    """Trains until the end and returns where the run stands; a run that was stopped in this workdir resumes.

    Args:
      config: a `TrainConfig`, or a mapping or ConfigDict of its fields, as the `get_config()` of a config file gives.
      workdir: checkpoints, metrics and evaluations; `OmniRetriever.from_pretrained(workdir)` loads what was trained.
      log: called with each message; None writes to stderr.
      show_progress: whether to show a bar (tqdm); None: on a terminal and in a notebook.

    Raises:
      InputError, ConfigError: for anything in the config, the data or the workdir that cannot be used, and where packages that training
        needs are not installed.
    """
    if advice := lacking():
        raise InputError(advice)

    from tqdm.auto import tqdm

    from omni_jax.api.training import TrainCallbacks, run_training
    from omni_jax.train import RunConfig

    run = config if isinstance(config, RunConfig) else RunConfig.from_config(config)
    bar: tqdm | None = None

    def say(line: str) -> None:
        tqdm.write(line, file=sys.stderr)

    def begin(done: int, total: int, clips: int) -> None:
        nonlocal bar
        shown = sys.stderr.isatty() if show_progress is None else show_progress
        bar = tqdm(total=total, initial=done, desc="train", unit="step", disable=not shown)

    def update(step: int, row: Mapping[str, float]) -> None:
        if bar is not None:
            bar.set_postfix({"loss": f"{row['loss']:.3f}"}, refresh=False)
            bar.update(step - bar.n)

    try:
        return run_training(run, workdir, TrainCallbacks(log or say, begin, update, lambda: False))
    finally:
        if bar is not None:
            bar.close()
