"""The metrics of a run: what a reader finds in the file and in TensorBoard, and what is said when they cannot be written."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata as hparams

from omni_jax.configs import tiny
from omni_jax.train import RunConfig
from omni_jax.train.loop import ALWAYS, DIGEST
from omni_jax.train.metrics import MetricsWriter
from omni_jax.types import InputError
from tests.full_disk import files_of_at_most

UPDATE = {
    **dict.fromkeys(ALWAYS, 0),
    "loss": 3.0,
    "L_T": 1.0,
    "L_D": 0.5,
    "L_A": 1.5,
    "temperature": 0.07,
    "mean_cosine": 0.1,
    "effective_rank": 5.0,
    "grad_norm": 2.0,
    "grad_norm/lora": 1.0,
    "learning_rate": 1e-4,
    "skipped": 0,
    "skipped_in_row": 0,
    "clips_per_second": 8.0,
    "used_tokens": 30,
    "total_tokens": 40,
    DIGEST: 2**47 + 1,
}
EVALUATION = {"eval/AVG-all": 50.0, "eval/t2v": 0.0, "eval/v2t": 100.0, "eval/t2av": 25.0}


def board(folder: Path) -> EventAccumulator:
    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0})
    read.Reload()
    return read


def test_curves_stand_in_groups_with_what_they_mean(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    for number in (1, 2):
        writer.write(number, UPDATE)
    writer.write(2, EVALUATION)
    writer.close()
    read = board(tmp_path)
    assert [(event.step, event.value) for event in read.Scalars("train/loss/L_A")] == [(1, 1.5), (2, 1.5)]
    assert [event.value for event in read.Scalars("perf/padded_share")] == [0.25, 0.25]
    assert read.Scalars("memory/host_peak_gib")[0].value > 0.01
    assert {tag.partition("/")[0] for tag in read.Tags()["scalars"]} == {"train", "data", "perf", "memory", "eval"}
    assert read.Scalars("eval/R@1/t2av")[0].value == 25.0 and read.Scalars("eval/AVG-all")[0].step == 2
    assert len([tag for tag in read.Tags()["scalars"] if not read.SummaryMetadata(tag).summary_description]) == 0
    assert not any("digest" in tag for tag in read.Tags()["scalars"])
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0]) == {"mended": UPDATE["repaired"], "step": 1, **UPDATE}


def test_an_evaluation_is_drawn_as_a_heat_map_of_queries_against_galleries(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    writer.write(3, EVALUATION)
    writer.close()
    (event,) = board(tmp_path).Tensors("eval/R@1")
    width, height, png = event.tensor_proto.string_val
    pixels = np.asarray(Image.open(io.BytesIO(png)))
    assert event.step == 3 and pixels.shape == (int(height), int(width), 3)
    cell = lambda row, column: pixels[40 + 72 * row + 4, 40 + 72 * column + 4].tolist()  # noqa: E731 - beside the number in the middle
    assert (cell(0, 1), cell(1, 0), cell(0, 0)) == ([255, 255, 255], [8, 48, 107], [255, 255, 255])  # t2v, v2t, none
    assert cell(0, 3) == [193, 203, 218]  # t2av, a quarter of the way


def test_a_run_shows_its_config_its_parameters_and_its_hyperparameters(tmp_path: Path) -> None:
    config = RunConfig.from_config(tiny.get_config()).to_json()
    MetricsWriter(tmp_path, 0, config, "| head/fc1 |").close()
    read = board(tmp_path)
    (text,) = read.Tensors("config")[0].tensor_proto.string_val
    assert json.loads(text.decode().strip("`").removeprefix("json")) == config
    assert b"head/fc1" in read.Tensors("parameters")[0].tensor_proto.string_val[0]
    said = {tag: read.SummaryMetadata(tag).plugin_data.content for tag in read.PluginTagToContent(hparams.PLUGIN_NAME)}
    experiment = hparams.parse_experiment_plugin_data(said[hparams.EXPERIMENT_TAG])
    assert [metric.name.tag for metric in experiment.metric_infos] == ["eval/AVG-all"]
    values = hparams.parse_session_start_info_plugin_data(said[hparams.SESSION_START_INFO_TAG]).hparams
    assert values["optimizer.learning_rate"].number_value == config["optimizer"]["learning_rate"]
    assert values["losses.negatives"].string_value == config["losses"]["negatives"]


def test_a_resumed_run_has_each_update_once(tmp_path: Path) -> None:
    for start, last in ((0, 3), (2, 4)):
        writer = MetricsWriter(tmp_path, start)
        for number in range(start + 1, last + 1):
            writer.write(number, UPDATE)
        writer.close()
    assert [event.step for event in board(tmp_path).Scalars("train/loss/total")] == [1, 2, 3, 4]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_no_module_of_clu_is_replaced() -> None:
    """`from clu import metric_writers` of a user with TensorFlow finds clu's own writers, whatever omni_jax has imported."""
    assert "clu.metrics" in sys.modules
    assert [name for name, module in sys.modules.items() if name.split(".")[0] == "clu" and module.__spec__ is None] == []
    assert "clu.metric_writers" not in sys.modules


def test_metrics_on_a_full_disk_stop_a_run_with_one_line(tmp_path: Path) -> None:
    told = r"^the metrics of step 2 cannot be written: File too large; .* start the run again"
    with pytest.raises(InputError, match=told) as said, contextlib.ExitStack() as held:
        writer = MetricsWriter(tmp_path, 0)
        writer.write(1, {"loss": 2.0})
        held.enter_context(files_of_at_most(16))
        held.callback(writer.close)  # while the disk is still full
        writer.write(2, {"loss": 1.0})
    assert "\n" not in str(said.value)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0]) == {"step": 1, "loss": 2.0}
