"""The loop of a run: updates, and what happens between them. Data, evaluator and signals are passed in."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from omni_jax.parallel import any_process, of_every_process, total_over_processes
from omni_jax.train.batch import UpdateBatch, place_update
from omni_jax.train.checkpoint import Checkpoints
from omni_jax.train.run_config import RunConfig, StopSection
from omni_jax.train.state import TrainState
from omni_jax.train.step import TrainStep
from omni_jax.train.trainable import Arrays
from omni_jax.types import InputError

Row = dict[str, float]

DIGEST = "batch_digest"
"""Name in a row: a number of 48 bits that stands for the record ids of the update's global batch, in order. Every update has it."""

COUNTS = ("silent", "mended", "truncated", "equal_hard", "used_tokens", "total_tokens")
"""Numbers of an update's data, in rows beside "replaced", the records of `errors`; summed over processes."""

COLLAPSED = "collapsed_in_row"
"""Name in a row: updates in a row, up to this one, whose embeddings had collapsed. A run that goes on counts on from it."""

ALWAYS = (DIGEST, *COUNTS, "replaced", COLLAPSED)
"""What the row of every update has, logged or not."""


class Update(Protocol):
    """One update's data of this process, as `omni_jax.data.pipeline.PipelineBatch`."""

    batch: UpdateBatch
    ids: tuple[tuple[str, ...], ...]
    errors: tuple[tuple[str, str], ...]
    silent: int
    mended: int
    truncated: int
    equal_hard: int
    used_tokens: int
    total_tokens: int


class Data(Protocol):
    """What makes updates by number."""

    def batches(self, start: int, stop: int) -> Generator[Any]:
        """Yields the `Update` of start, start + 1, ..., stop - 1, made ahead. Closing it ends its workers."""
        ...


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What a loop tells and asks.

    Attributes:
      row: called with (updates made, metrics) for each row to keep.
      tell: called with a line for the person who watches.
      update: called with (updates made, metrics) after every update, for a progress display.
      replaced: called with (updates made, record id, reason) for each clip of this process that could not be used.
      stopping: whether the run should save and leave.
      evaluate: (updates made, trainable arrays) -> figures by name, none where no record is usable; None where it was
        stopped meanwhile. Without it nothing is evaluated.
      evaluated: whether the figures after so many updates are there already; asked for the update where a run that goes on begins.
      collapsed: what the row of that update says under COLLAPSED; of several processes the first one's word counts.
    """

    row: Callable[[int, Row], None]
    tell: Callable[[str], None]
    update: Callable[[int, Row], None]
    replaced: Callable[[int, str, str], None]
    stopping: Callable[[], bool]
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
    data: Data,
    checkpoints: Checkpoints,
    around: Surroundings,
) -> tuple[TrainState, bool]:
    """Makes the updates that are left of `total`, saving on the way and at the end.

    When `around.stopping()` says so it saves and returns early. Where the data of one process fail, all of them save before they raise.

    Returns:
      The last state, which is saved, and whether everything is done: all updates, and the evaluation after the last one.

    Raises:
      InputError: when updates are skipped or embeddings stay collapsed too often in a row, a checkpoint cannot be written, or data fail.
    """
    start = int(state.step)
    # Of several processes one reads it: they must stop at the same update.
    collapsed = around.collapsed(start) if start and jax.process_index() == 0 else 0
    watch = Watch(run.stop, around.tell, total_over_processes([collapsed])[0])
    pending: _Pending | None = None
    began = time.monotonic()
    stopped = any_process(around.stopping())
    due = start > 0 and (start == total or (run.evaluation.every > 0 and start % run.evaluation.every == 0))
    missing = due and around.evaluate is not None and not any_process(around.evaluated(start))
    if missing and not stopped:
        missing = not _evaluate(start, state, around)  # a run that was killed in the midst of it had saved before
        began = time.monotonic()
    if start == total or stopped:
        checkpoints.save(state)
        checkpoints.wait()
        return state, start == total and not missing
    with contextlib.closing(data.batches(start, total)) as made:
        for number in range(start + 1, total + 1):
            update, failure = _next(made)
            # All processes leave together: the others would wait for this one's part of the update.
            stopped, failed = np.any(of_every_process(np.array([around.stopping(), failure is not None])), axis=0)
            if stopped or failed:
                if pending is not None:
                    pending.settle(watch, around)
                checkpoints.save(state)
                checkpoints.wait()
                if failed:
                    raise failure or InputError(
                        f"the data of another process failed, whose own message says why; update {number - 1} is saved"
                    )
                return state, False
            state, metrics = step(state, frozen, place_update(update.batch, mesh))
            if pending is not None:
                pending.settle(watch, around)
            elapsed, began = time.monotonic() - began, time.monotonic()
            pending = _Pending(
                number, metrics, update, run.batch.clips / max(elapsed, 1e-9), number % run.log.every == 0 or number == total
            )
            due = number == total or (run.evaluation.every > 0 and number % run.evaluation.every == 0)
            if due or number % run.checkpoint.every == 0:
                pending = pending.settle(watch, around)
                checkpoints.save(state)
            missing = due and around.evaluate is not None
            if missing and not any_process(around.stopping()):
                missing = not _evaluate(number, state, around)
                began = time.monotonic()
    checkpoints.wait()
    return state, not missing


@dataclasses.dataclass(frozen=True)
class _Pending:
    """An update whose metrics are still on the devices: they are read when the next update has been started."""

    number: int
    metrics: Mapping[str, jax.Array]
    update: Any
    clips_per_second: float
    logged: bool

    def settle(self, watch: Watch, around: Surroundings) -> None:
        row: Row = {name: np.asarray(value).item() for name, value in jax.device_get(dict(self.metrics)).items()}
        counts = {name: getattr(self.update, name) for name in COUNTS} | {"replaced": len(self.update.errors)}
        counts = dict(zip(counts, total_over_processes(list(counts.values())), strict=True))
        row |= counts | {"clips_per_second": self.clips_per_second, DIGEST: digest_of(self.update.ids), COLLAPSED: watch.count(row)}
        for name, reason in self.update.errors:
            around.replaced(self.number, name, reason)
        around.row(self.number, row if self.logged else {name: row[name] for name in ALWAYS})
        around.update(self.number, row)
        watch(self.number, row)


class Watch:
    """Looks for updates that were skipped and embeddings that have collapsed, in a row; `collapsed` of them before the first it sees."""

    def __init__(self, limits: StopSection, tell: Callable[[str], None], collapsed: int = 0):
        self._limits, self._tell, self._collapsed, self._warned = limits, tell, collapsed, False

    def count(self, row: Row) -> int:
        """Returns the updates in a row whose embeddings have collapsed, the one of these metrics included."""
        limits = self._limits
        collapsed = row["mean_cosine"] > limits.max_mean_cosine or row["effective_rank"] < limits.min_effective_rank
        self._collapsed = self._collapsed + 1 if collapsed and math.isfinite(row["loss"]) else 0
        return self._collapsed

    def __call__(self, number: int, row: Row) -> None:
        """Warns of the metrics of update `number`, COLLAPSED among them.

        Raises:
          InputError: when the run is not worth going on with.
        """
        limits = self._limits
        if row["skipped_in_row"]:
            reason = f"loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g}"
            self._tell(f"update {number} was skipped: {reason}; {row['skipped']:.0f} in all, {row['skipped_in_row']:.0f} in a row")
        if row["skipped_in_row"] >= limits.skipped_in_row:
            raise InputError(
                f"{limits.skipped_in_row} updates in a row up to update {number} had no finite loss and gradient and were skipped; lower "
                f"optimizer.learning_rate, or look for broken clips; the last checkpoint is as it was"
            )
        count = row[COLLAPSED]
        self._warned = self._warned and count > 0
        # Beyond the limit, too: a run may have resumed with a higher count, or with a lower limit.
        if count >= limits.collapsed_in_row and not self._warned:
            figures = f"mean cosine {row['mean_cosine']:.3f}, effective rank {row['effective_rank']:.2f}"
            text = f"embeddings have been collapsed for {count} updates up to update {number} ({figures})"
            if limits.collapse == "stop":
                raise InputError(f"{text}; lower optimizer.learning_rate or raise losses.temperature, or stop.collapse=warn goes on")
            self._tell(f"warning: {text}")
            self._warned = True


def _evaluate(number: int, state: TrainState, around: Surroundings) -> bool:
    """Keeps the figures of an evaluation; returns whether it came to its end, with figures or without, in every process."""
    assert around.evaluate is not None
    figures = around.evaluate(number, state.trainable)
    if figures is not None:
        around.row(number, {f"eval/{name}": value for name, value in figures.items()})
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
    whole = np.moveaxis(of_every_process(np.array(each)), 0, 1)  # (micro-batch, process, clip, 2): the processes' slices in order
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(whole).tobytes(), digest_size=6).digest(), "big")
