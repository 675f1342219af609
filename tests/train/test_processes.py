"""Several processes compute what one does."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.objectives.test_losses import SCALARS, all_losses, with_gradients
from tests.tolerances import assert_close
from tests.train.losses_of_processes import SCOPE, inputs
from tests.train.tiny_run import environment, free_port, start


@pytest.mark.slow
def test_losses_and_gradients_of_two_processes_of_four_devices_equal_one_device(tmp_path: Path) -> None:
    out, address = tmp_path / "found.npz", f"127.0.0.1:{free_port()}"
    arguments = [sys.executable, "-m", "tests.train.losses_of_processes", address, "2"]
    around = environment(tmp_path / "cache", devices=4)
    around["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "")  # the compiler as it is here: the last bit counts
    pair = [start([*arguments, str(i), str(out)], around) for i in range(2)]
    try:
        said = [process.communicate(timeout=300)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [0, 0], said
    values, gradients = with_gradients(functools.partial(all_losses, hard_scope=SCOPE, hard_blocks=8))(*inputs(), *SCALARS)
    with np.load(out) as found:
        for way in ("map", "jit"):
            for i, expected in enumerate([values, *gradients]):
                assert_close(found[f"{way}/{i}"], expected, "loss_sharding_gradient" if i else "loss_sharding")
