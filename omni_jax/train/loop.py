"""The loop of a run: steps, and what happens between them. Data, evaluator and signals are passed in."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from omni_jax.objectives import HEALTH
from omni_jax.parallel import any_process, process_allgather, process_sum
from omni_jax.train.batch import place_update
from omni_jax.train.checkpoint import Checkpoints
from omni_jax.train.run_config import RunConfig, StopSection
from omni_jax.train.state import TrainState
from omni_jax.train.step import TrainStep
from omni_jax.train.trainable import Arrays
from omni_jax.types import InputError

Row = dict[str, float]

DIGEST = "batch_digest"
"""Name in a row: a number of 48 bits that stands for the record ids of the step's global batch, in order. Every step has it."""

COUNTS = ("silent", "repaired", "truncated", "mined", "equal_hard", "used_tokens", "total_tokens")
"""Numbers of a step's data, in rows beside "replaced", the records of `errors`; summed over processes."""

COLLAPSED = "collapsed_in_row"
"""Name in a row: steps in a row, up to this one, whose embeddings had collapsed. A resumed run continues the count."""

ALWAYS = (DIGEST, *COUNTS, "replaced", COLLAPSED)
"""What the row of every step has, logged or not."""


Batches = Callable[[int, int], Generator[Any]]
"""From start and stop to this process's data of the steps start, start + 1, ..., stop - 1, made ahead, each a record as
`omni_jax.data.pipeline.PipelineBatch`. Closing it ends its workers."""


@dataclasses.dataclass(frozen=True)
class LoopCallbacks:
    """What the training loop reports, and asks.

    Attributes:
      row: called with (steps made, metrics) for each row to keep.
      log: called with each message for the user, one line.
      update: called with (steps made, metrics) after every step, for a progress display.
      replaced: called with (steps made, record id, reason) for each clip of this process that could not be used.
      stopping: whether the run should save and leave.
      saving: called before each checkpoint, with all rows of the steps before it given.
      evaluate: (steps made, trainable arrays) -> figures by name, none where no record is usable; None where it was
        stopped meanwhile. Without it nothing is evaluated.
      evaluated: whether the figures after so many steps are there already; asked for the step from which a run resumes.
      collapsed: what the row of that step says under COLLAPSED; of several processes the first one's word counts.
    """

    row: Callable[[int, Row], None]
    log: Callable[[str], None]
    update: Callable[[int, Row], None]
    replaced: Callable[[int, str, str], None]
    stopping: Callable[[], bool]
    saving: Callable[[], None] = lambda: None
    evaluate: Callable[[int, Arrays], Mapping[str, float] | None] | None = None
    evaluated: Callable[[int], bool] = lambda number: True
    collapsed: Callable[[int], int] = lambda number: 0


def train(
    step: TrainStep,
    state: TrainState,
    frozen: Arrays,
    *,
    mesh: Mesh | None,
    run: RunConfig,
    total: int,
    data: Batches,
    checkpoints: Checkpoints,
    callbacks: LoopCallbacks,
) -> tuple[TrainState, bool]:
    """Makes the steps that are left of `total`, saving on the way and at the end.

    When `callbacks.stopping()` says so it saves and returns early. Where the data of one process fail, all of them save before they raise.

    Returns:
      The last state, which is saved, and whether everything is done: all steps, and the evaluation after the last one.

    Raises:
      InputError: when steps are skipped or embeddings stay collapsed too often in a row, a checkpoint cannot be written, or data fail.
    """
    start = int(state.step)
    # Of several processes one reads it: they must stop at the same step.
    collapsed = callbacks.collapsed(start) if start and jax.process_index() == 0 else 0
    watch = Watch(run.stop, callbacks.log, process_sum([collapsed])[0])
    pending: _Pending | None = None
    began = time.monotonic()

    def save(state: TrainState) -> None:
        callbacks.saving()
        checkpoints.save(state)

    stopped = any_process(callbacks.stopping())
    due = start > 0 and (start == total or (run.evaluation.every > 0 and start % run.evaluation.every == 0))
    missing = due and callbacks.evaluate is not None and not any_process(callbacks.evaluated(start))
    if missing and not stopped:
        missing = not _evaluate(start, state, callbacks)  # a run that was killed in the midst of it had saved before
        began = time.monotonic()
    if start == total or stopped:
        save(state)
        checkpoints.wait()
        return state, start == total and not missing
    with contextlib.closing(data(start, total)) as made:
        for number in range(start + 1, total + 1):
            update, failure = _next(made)
            # All processes leave together: the others would wait for this one's part of the step.
            stopped, failed = np.any(process_allgather(np.array([callbacks.stopping(), failure is not None])), axis=0)
            if stopped or failed:
                if pending is not None:
                    pending.settle(watch, callbacks)
                save(state)
                checkpoints.wait()
                if failed:
                    raise failure or InputError(f"the data of another process failed, see its own message; step {number - 1} is saved")
                return state, False
            state, metrics = step(state, frozen, place_update(update.batch, mesh))
            if pending is not None:
                pending.settle(watch, callbacks)
            elapsed, began = time.monotonic() - began, time.monotonic()
            pending = _Pending(
                number, metrics, update, run.batch.clips / max(elapsed, 1e-9), number % run.log.every == 0 or number == total
            )
            due = number == total or (run.evaluation.every > 0 and number % run.evaluation.every == 0)
            if due or number % run.checkpoint.every == 0:
                pending = pending.settle(watch, callbacks)
                save(state)
            missing = due and callbacks.evaluate is not None
            if missing and not any_process(callbacks.stopping()):
                missing = not _evaluate(number, state, callbacks)
                began = time.monotonic()
    checkpoints.wait()
    return state, not missing


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A step whose metrics are still on the devices: they are read when the next step has been started."""

    number: int
    metrics: Mapping[str, jax.Array]
    update: Any
    clips_per_second: float
    logged: bool

    def settle(self, watch: Watch, callbacks: LoopCallbacks) -> None:
        row: Row = {name: np.asarray(value).item() for name, value in jax.device_get(dict(self.metrics)).items()}
        row = {name: value for name, value in row.items() if name not in HEALTH or math.isfinite(value)}  # some step kinds lack some
        counts = {name: self.update.counts[name] for name in COUNTS} | {"replaced": len(self.update.errors)}
        counts = dict(zip(counts, process_sum(list(counts.values())), strict=True))
        row |= counts | {"clips_per_second": self.clips_per_second, DIGEST: digest_of(self.update.ids), COLLAPSED: watch.count(row)}
        for name, reason in self.update.errors:
            callbacks.replaced(self.number, name, reason)
        callbacks.row(self.number, row if self.logged else {name: row[name] for name in ALWAYS})
        callbacks.update(self.number, row)
        watch(self.number, row)


class Watch:
    """Looks for steps that were skipped and embeddings that have collapsed, in a row; `collapsed` of them before the first it sees."""

    def __init__(self, limits: StopSection, log: Callable[[str], None], collapsed: int = 0):
        self._limits, self._log, self._collapsed, self._warned = limits, log, collapsed, False

    def count(self, row: Row) -> int:
        """Returns the steps in a row whose embeddings have collapsed, the one of these metrics included."""
        limits = self._limits
        collapsed = row["mean_cosine"] > limits.max_mean_cosine or row["effective_rank"] < limits.min_effective_rank
        self._collapsed = self._collapsed + 1 if collapsed and math.isfinite(row["loss"]) else 0
        return self._collapsed

    def __call__(self, number: int, row: Row) -> None:
        """Warns of the metrics of step `number`, COLLAPSED among them. Raises InputError when a limit of `StopSection` is reached."""
        limits = self._limits
        if row["skipped_in_row"]:
            reason = f"loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g}"
            self._log(f"step {number} was skipped: {reason}; {row['skipped']:.0f} in all, {row['skipped_in_row']:.0f} in a row")
        if row["skipped_in_row"] >= limits.skipped_in_row:
            raise InputError(
                f"{limits.skipped_in_row} steps in a row, up to step {number}, had no finite loss and gradient and were skipped; lower "
                f"optimizer.learning_rate, or look for broken clips; the last checkpoint is as it was"
            )
        count = row[COLLAPSED]
        self._warned = self._warned and count > 0
        # Beyond the limit, too: a run may have resumed with a higher count, or with a lower limit.
        if count >= limits.collapsed_in_row and not self._warned:
            figures = f"mean cosine {row['mean_cosine']:.3f}, effective rank {row['effective_rank']:.2f}"
            text = f"embeddings have been collapsed for {count} steps, up to step {number} ({figures})"
            if limits.collapse == "stop":
                raise InputError(f"{text}; lower optimizer.learning_rate or raise losses.temperature, or set stop.collapse=warn")
            self._log(f"warning: {text}")
            self._warned = True


def _evaluate(number: int, state: TrainState, callbacks: LoopCallbacks) -> bool:
    """Keeps the figures of an evaluation; returns whether it came to its end, with figures or without, in every process."""
    assert callbacks.evaluate is not None
    figures = callbacks.evaluate(number, state.trainable)
    if figures is not None:
        callbacks.row(number, {f"eval/{name}": value for name, value in figures.items()})
    return not any_process(figures is None)


def _next(made: Iterator[Any]) -> tuple[Any, Exception | None]:
    """Returns the next of `made`, or the error that came in its place."""
    try:
        return next(made), None
    except Exception as error:
        return None, error


def digest_of(ids: Sequence[Sequence[str]]) -> int:
    """Returns a number for the ordered record ids of a global batch: the same in every process, and for every number of them.

    Args:
      ids: of this process: micro-batches of clips. All processes must call it, in the same order.
    """
    each = [[np.frombuffer(hashlib.blake2b(name.encode(), digest_size=8).digest(), np.uint32) for name in micro] for micro in ids]
    whole = np.moveaxis(process_allgather(np.array(each)), 0, 1)  # (micro-batch, process, clip, 2): the processes' slices in order
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(whole).tobytes(), digest_size=6).digest(), "big")
