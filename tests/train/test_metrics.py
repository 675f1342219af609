"""What a run does when its metrics cannot be written."""

from __future__ import annotations

import contextlib
import json
import resource
from pathlib import Path

import pytest

from omni_jax.train.metrics import metrics_writer, write_row
from omni_jax.types import InputError


def test_metrics_on_a_full_disk_stop_a_run_with_one_line(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    told = r"^the metrics of update 2 cannot be written: File too large; .* start the run again"
    try:
        with pytest.raises(InputError, match=told) as said, contextlib.ExitStack() as held:
            writer = metrics_writer(tmp_path, 0)
            held.callback(writer.close)  # while the disk is still full
            write_row(writer, 1, {"loss": 2.0})
            resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))  # Python ignores SIGXFSZ: writes fail as on a full disk
            write_row(writer, 2, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(said.value)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0]) == {"step": 1, "loss": 2.0}
