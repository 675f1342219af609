"""Metrics of a run: a JSONL file and TensorBoard, each step once however often the run was stopped and resumed."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from omni_jax.io import GrowingText, atomic_write_text
from omni_jax.io.remote import StoreError
from omni_jax.train.board import Board
from omni_jax.train.loop import ALWAYS, COLLAPSED
from omni_jax.types import InputError

JSONL, TENSORBOARD = "metrics.jsonl", "tensorboard"
EARLIER = {"repaired": "mended"}
"""Key in metrics.jsonl -> its earlier name, which is still written in this version."""


class MetricsWriter:
    """Rows of a run, in `metrics.jsonl` and `tensorboard/` of its workdir."""

    def __init__(self, workdir: epath.PathLike, start: int, config: Mapping[str, Any] | None = None, parameters: str = ""):
        """Takes the number of steps made before: rows after them are removed, they will be written again.

        Args:
          config: of the run, as JSON holds it, and `parameters`, a table of what trains: both for TensorBoard.
        """
        folder = epath.Path(workdir)
        path = folder / JSONL
        kept = ""
        if path.exists():
            kept = "".join(f"{line}\n" for line in path.read_text().splitlines() if _step(line) <= start)
            atomic_write_text(path, kept)
        self._file = GrowingText(path, kept)
        self._board = Board(folder / TENSORBOARD, start)
        if config:
            self._board.write_run(config, parameters)

    def write(self, number: int, values: Mapping[str, Any]) -> None:
        """Writes the metrics after `number` steps; values that are not finite become null. A reader finds them at once, in an object store
        within a minute.

        Raises:
          InputError: when they cannot be written.
        """
        with _written(f"of step {number}"):
            row = {"step": number, **{name: _finite(value) for name, value in values.items()}}
            row |= {earlier: row[name] for name, earlier in EARLIER.items() if name in row}
            self._file.write(json.dumps(row) + "\n")
            if not set(values) <= set(ALWAYS):  # which is all that a step has that is not logged
                self._board.write(number, values)

    def sync(self) -> None:
        """Returns when a reader finds every row in `metrics.jsonl`, so that none lies before a checkpoint and is lost with the process.

        Raises:
          InputError: when they cannot be written.
        """
        with _written("of the last steps"):
            self._file.sync()

    def close(self) -> None:
        with contextlib.suppress(OSError, StoreError):  # of a line that is still to be written, about which `write` has complained
            self._file.close()
        self._board.close()


@contextlib.contextmanager
def _written(rows: str) -> Iterator[None]:
    """Makes an InputError of what keeps the metrics from being written."""
    try:
        yield
    except (OSError, StoreError) as e:
        reason = str(e) if isinstance(e, StoreError) else e.strerror or e
        raise InputError(
            f"the metrics {rows} cannot be written: {reason}; check disk space and permissions of the workdir, then start the run again: "
            f"it resumes from its newest checkpoint"
        ) from e


def evaluated(workdir: epath.PathLike, number: int) -> bool:
    """Whether the metrics of a workdir hold figures of the evaluation after `number` steps."""
    return any(name.startswith("eval/") for row in _rows(workdir, number) for name in row)


def collapsed_in_row(workdir: epath.PathLike, number: int) -> int:
    """Returns what the row of a step says under COLLAPSED; 0 where it says nothing."""
    return next((int(row[COLLAPSED]) for row in _rows(workdir, number) if COLLAPSED in row), 0)


def _rows(workdir: epath.PathLike, number: int) -> list[dict[str, Any]]:
    """Returns the rows of a step: of its own metrics, and of an evaluation after it."""
    path = epath.Path(workdir) / JSONL
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if _step(line) == number]


def _step(line: str) -> float:
    """Returns the step of a row, infinity for a line that was cut off."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite(value: Any) -> float | int | None:
    number = np.asarray(value).item()
    return number if math.isfinite(number) else None
