"""Metrics of a run: a JSONL file and TensorBoard, each update once however often the run was gone on with. clu without TensorFlow."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from omni_jax.train.loop import ALWAYS, COLLAPSED, DIGEST
from omni_jax.train.workdir import write_whole
from omni_jax.types import InputError

# clu's package imports TensorFlow for its own TensorBoard writer. Ours, below, stands in that module's place.
_SUMMARY = "clu.metric_writers.summary_writer"
sys.modules.setdefault(_SUMMARY, types.ModuleType(_SUMMARY)).__dict__.setdefault("SummaryWriter", None)

from clu.metric_writers import MultiWriter, interface  # noqa: E402 - after the line above

JSONL, TENSORBOARD = "metrics.jsonl", "tensorboard"


class ScalarWriter(interface.MetricWriter):
    """A clu writer of scalars, which are all that a run has; what else it is asked to write is an error of the caller."""

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        raise TypeError(f"{type(self).__name__} writes nothing")  # a subclass does

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"{type(self).__name__} writes scalars alone")

    write_summaries = write_images = write_videos = write_audios = write_texts = write_histograms = write_hparams = _refuse

    def flush(self) -> None: ...

    def close(self) -> None: ...


class JsonlWriter(ScalarWriter):
    """Adds a line {"step": N, name: value ...} for each update; values that are not finite become null."""

    def __init__(self, path: epath.Path, start: int):
        """Takes the file, whose rows after update `start` are removed: they will be written again."""
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= start]
            write_whole(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a")

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **{name: _finite(value) for name, value in scalars.items()}}) + "\n")
        self._file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a line that is still to be written, about which `write_row` has complained
            self._file.close()


class TensorBoardWriter(ScalarWriter):
    """Writes TensorBoard event files with tensorboard's own writer."""

    def __init__(self, folder: epath.Path, start: int):
        """Takes the folder; TensorBoard will drop what earlier files say about updates after `start`."""
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        Event, SessionLog = event_pb2.Event, event_pb2.SessionLog  # type: ignore[attr-defined]  # generated classes
        self._event = Event
        self._writer = EventFileWriter(str(folder))
        if start:
            self._writer.add_event(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto import summary_pb2

        if set(scalars) <= set(ALWAYS):
            return  # an update that is not logged
        scalars = {name: value for name, value in scalars.items() if name != DIGEST}  # which is no curve
        Summary = summary_pb2.Summary  # type: ignore[attr-defined]  # a generated class
        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in scalars.items()]
        self._writer.add_event(self._event(step=step, summary=Summary(value=values)))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


sys.modules[_SUMMARY].__dict__["SummaryWriter"] = TensorBoardWriter


def metrics_writer(workdir: epath.PathLike, start: int) -> interface.MetricWriter:
    """Returns the writer of a run that goes on after update `start`: `metrics.jsonl` and `tensorboard/` in its workdir."""
    folder = epath.Path(workdir)
    return MultiWriter([JsonlWriter(folder / JSONL, start), TensorBoardWriter(folder / TENSORBOARD, start)])


def write_row(writer: interface.MetricWriter, number: int, values: Mapping[str, Any]) -> None:
    """Writes the metrics of an update where a reader finds them at once.

    Raises:
      InputError: when they cannot be written.
    """
    try:
        writer.write_scalars(number, values)
        writer.flush()
    except OSError as e:
        raise InputError(
            f"the metrics of update {number} cannot be written: {e.strerror or e}; look at the space and the permissions of the "
            f"workdir, then start the run again: it goes on from its newest checkpoint"
        ) from e


def evaluated(workdir: epath.PathLike, number: int) -> bool:
    """Whether the metrics of a workdir hold figures of the evaluation after `number` updates."""
    return any(name.startswith("eval/") for row in _rows(workdir, number) for name in row)


def collapsed_in_row(workdir: epath.PathLike, number: int) -> int:
    """Returns what the row of an update says under COLLAPSED; 0 where it says nothing."""
    return next((int(row[COLLAPSED]) for row in _rows(workdir, number) if COLLAPSED in row), 0)


def _rows(workdir: epath.PathLike, number: int) -> list[dict[str, Any]]:
    """Returns the rows of an update: of its own metrics, and of an evaluation after it."""
    path = epath.Path(workdir) / JSONL
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if _step(line) == number]


def _step(line: str) -> float:
    """Returns the update of a row, infinity for a line that was cut off."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite(value: Any) -> float | int | None:
    number = np.asarray(value).item()
    return number if math.isfinite(number) else None
