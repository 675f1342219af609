"""Metrics of a run: a JSONL file and TensorBoard, each step once however often the run was stopped and resumed."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from omni_jax.io import atomic_write_text
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
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= start]
            atomic_write_text(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a")
        self._board = Board(folder / TENSORBOARD, start)
        if config:
            self._board.write_run(config, parameters)

    def write(self, number: int, values: Mapping[str, Any]) -> None:
        """Writes the metrics after `number` steps where a reader finds them at once; values that are not finite become null.

        Raises:
          InputError: when they cannot be written.
        """
        try:
            row = {"step": number, **{name: _finite(value) for name, value in values.items()}}
            row |= {earlier: row[name] for name, earlier in EARLIER.items() if name in row}
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            if not set(values) <= set(ALWAYS):  # which is all that a step has that is not logged
                self._board.write(number, values)
        except OSError as e:
            raise InputError(
                f"the metrics of step {number} cannot be written: {e.strerror or e}; check disk space and permissions of the "
                f"workdir, then start the run again: it resumes from its newest checkpoint"
            ) from e

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a line that is still to be written, about which `write` has complained
            self._file.close()
        self._board.close()


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
