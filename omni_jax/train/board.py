"""What TensorBoard shows of a run, written with tensorboard's own writer, which needs no TensorFlow.

Curves in groups (train/, data/, perf/, memory/, eval/), the config as text and as hyperparameters with AVG-all as their metric, the
parameters that train, and the 12 directions of each evaluation as a heat map.
"""

from __future__ import annotations

import io
import json
import resource
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image, ImageDraw
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.plugins.image.metadata import create_summary_metadata as image_metadata
from tensorboard.plugins.scalar.metadata import create_summary_metadata as scalar_metadata
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util import tensor_util

from omni_jax.config.made_with import flat
from omni_jax.objectives import HEALTH, LOSSES, SCALARS
from omni_jax.train.loop import DIGEST

Event, SessionLog = event_pb2.Event, event_pb2.SessionLog  # type: ignore[attr-defined]  # generated classes
Summary = summary_pb2.Summary  # type: ignore[attr-defined]

EVAL = "eval/"
METRIC = f"{EVAL}AVG-all"

CURVES = {
    "loss": ("train/loss/total", "Weighted sum of the losses, mean over the micro-batches of a step."),
    **{loss.metric: (f"train/loss/{loss.metric}", loss.about) for loss in LOSSES.values()},
    **{name: (f"train/{name}", scalar.about) for name, scalar in SCALARS.items()},
    "learning_rate": ("train/learning_rate", "Learning rate of the step, before the factors of groups."),
    "mean_cosine": ("train/embeddings/mean_cosine", "Mean cosine between embeddings of different clips; near 1 they have collapsed."),
    "effective_rank": ("train/embeddings/effective_rank", "Participation ratio of the embeddings' covariance; near 1 they have collapsed."),
    "collapsed_in_row": ("train/embeddings/collapsed_in_row", "Updates in a row, up to this one, with collapsed embeddings."),
    **{name: (f"train/health/{name}", about) for name, about in HEALTH.items()},
    "grad_norm": ("train/grad_norm/total", "Norm of the gradient before clipping."),
    "skipped": ("train/skipped/total", "Updates so far without a finite loss and gradient, which changed nothing."),
    "skipped_in_row": ("train/skipped/in_row", "Skipped steps in a row, up to this one."),
    "silent": ("data/silent", "Clips of the step with silence in place of a missing audio track."),
    "repaired": ("data/repaired", "Clips of the step that were repaired while decoding."),
    "truncated": ("data/truncated", "Captions of the step that were cut."),
    "mined": ("data/mined", "Hard negatives of the step that are mined."),
    "equal_hard": ("data/equal_hard", "Hard negatives of the step that equal their anchor."),
    "replaced": ("data/replaced", "Clips of the step that could not be used and were replaced by others."),
    "used_tokens": ("data/used_tokens", "Tokens of the step without padding."),
    "total_tokens": ("data/total_tokens", "Tokens of the step with padding."),
    "clips_per_second": ("perf/clips_per_second", "Clips per second, from the start of one step to the start of the next."),
}
"""Metric -> its tag and what it means. Others, the gradient norms of groups and the figures of evaluations, are named by `_curve`."""

_MODALITIES = ("t", "v", "a", "av", "tv", "at")
_CELL, _MARGIN = 72, 40  # pixels


class Board:
    """The event files of a run."""

    def __init__(self, folder: epath.Path, start: int):
        """Takes the folder; TensorBoard drops what earlier files say about steps after `start`."""
        self._writer, self._start, self._described = EventFileWriter(str(folder)), start, set[str]()
        if start:
            self._writer.add_event(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))

    def write_run(self, config: Mapping[str, Any], parameters: str) -> None:
        """Writes the config of a run and a table of its parameters."""
        self._add(self._start, text_pb("config", f"```json\n{json.dumps(config, indent=1)}\n```", "What the run was started with."))
        self._add(self._start, text_pb("parameters", f"```\n{parameters}\n```", "What trains: clu's parameter overview."))
        settings = {name: value for name, value in flat(config) if isinstance(value, bool | int | float | str)}
        metric = hparams.Metric(METRIC, display_name="AVG-all", description="Mean R@1 over the 12 directions of held-out clips, in %.")
        self._add(self._start, hparams.hparams_config_pb([hparams.HParam(name) for name in settings], [metric]))
        self._add(self._start, hparams.hparams_pb(settings))

    def write(self, number: int, values: Mapping[str, Any]) -> None:
        """Writes the metrics after `number` steps, and of an evaluation its heat map as well."""
        curves = dict(_curve(name, value) for name, value in values.items() if name != DIGEST)
        if "clips_per_second" in values:
            curves |= _memory()
            if values.get("total_tokens"):
                share = 1 - values["used_tokens"] / values["total_tokens"]
                curves["perf/padded_share"] = (share, "Share of the step's tokens that are padding.")
        found = [self._scalar(tag, float(value), text) for tag, (value, text) in curves.items()]
        directions = {name.removeprefix(EVAL): value for name, value in values.items() if name.startswith(EVAL) and _pair(name)}
        if directions:
            found.append(_picture(f"{EVAL}R@1", directions))
        self._add(number, Summary(value=found))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _scalar(self, tag: str, value: float, text: str) -> Any:
        """A value of a curve; the first of each curve carries the description."""
        described = {} if tag in self._described else {"metadata": scalar_metadata(display_name="", description=text)}
        self._described.add(tag)
        return Summary.Value(tag=tag, simple_value=value, **described)

    def _add(self, number: int, summary: Any) -> None:
        self._writer.add_event(Event(step=number, summary=summary))


def _curve(name: str, value: Any) -> tuple[str, tuple[Any, str]]:
    """Returns a metric's tag, its value and what it means."""
    if name in CURVES:
        tag, text = CURVES[name]
        return tag, (value, text)
    loss, _, width = name.rpartition("_")
    if loss in CURVES and width.isdigit():
        return f"{CURVES[loss][0]}_{width}", (value, f"{CURVES[loss][1]} On the first {width} dimensions.")
    group, _, rest = name.partition("/")
    if group == "grad_norm":
        return f"train/{name}", (value, f"Norm of the gradient of the parameters of {rest}, before clipping.")
    if pair := _pair(name):
        return f"{EVAL}R@1/{rest}", (value, f"R@1 of held-out clips in %: query {pair[0]}, gallery {pair[1]}.")
    if group == "eval":
        return name, (value, "Mean R@1 over directions of held-out clips, in %.")
    return f"train/{name}", (value, "")


def _pair(name: str) -> tuple[str, str] | None:
    """Returns the query and the gallery of a direction ("eval/t2av" is t and av), None for another name."""
    query, _, gallery = name.rpartition("/")[2].partition("2")
    return (query, gallery) if query in _MODALITIES and gallery in _MODALITIES else None


def _memory() -> dict[str, tuple[float, str]]:
    """Returns peaks of this process in GiB: of the host, and of its fullest device where the platform counts."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found = {"memory/host_peak_gib": (peak / 2**30, "Largest resident size of this process so far, without its data workers.")}
    devices = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    if max(devices) > 0:
        found["memory/device_peak_gib"] = (max(devices) / 2**30, "Most memory in use so far on the fullest device of this process.")
    return found


def _picture(tag: str, directions: Mapping[str, float]) -> Any:
    """Returns R@1 by direction as a heat map: rows are queries, columns galleries, white is 0 % and dark blue 100 %."""
    side = _MARGIN + _CELL * len(_MODALITIES)
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    for n, name in enumerate(_MODALITIES):
        middle = _MARGIN + _CELL * n + _CELL // 2
        draw.text((middle, _MARGIN // 2), f"to {name}", fill="black", anchor="mm")
        draw.text((_MARGIN // 2, middle), name, fill="black", anchor="mm")
    for name, value in directions.items():
        row, column = (_MODALITIES.index(one) for one in _pair(name) or ())
        left, top = _MARGIN + _CELL * column, _MARGIN + _CELL * row
        share = float(np.clip(value / 100, 0, 1))
        colour = tuple(round(255 + (dark - 255) * share) for dark in (8, 48, 107))
        draw.rectangle((left, top, left + _CELL - 2, top + _CELL - 2), fill=colour, outline="grey")
        draw.text((left + _CELL // 2, top + _CELL // 2), f"{value:.1f}", fill="white" if share > 0.5 else "black", anchor="mm")
    file = io.BytesIO()
    image.save(file, "png")
    pixels = [str(side).encode(), str(side).encode(), file.getvalue()]  # the plugin's form: width, height, images
    metadata = image_metadata(display_name="", description="R@1 of held-out clips in %: rows are queries, columns galleries.")
    return Summary.Value(tag=tag, tensor=tensor_util.make_tensor_proto(pixels), metadata=metadata)
