"""What a run does when its metrics cannot be written."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from omni_jax.train.metrics import metrics_writer, write_row
from omni_jax.types import InputError
from tests.full_disk import files_of_at_most


def test_metrics_on_a_full_disk_stop_a_run_with_one_line(tmp_path: Path) -> None:
    told = r"^the metrics of update 2 cannot be written: File too large; .* start the run again"
    with pytest.raises(InputError, match=told) as said, contextlib.ExitStack() as held:
        writer = metrics_writer(tmp_path, 0)
        write_row(writer, 1, {"loss": 2.0})
        held.enter_context(files_of_at_most(16))
        held.callback(writer.close)  # while the disk is still full
        write_row(writer, 2, {"loss": 1.0})
    assert "\n" not in str(said.value)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0]) == {"step": 1, "loss": 2.0}
