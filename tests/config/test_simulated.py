"""XLA's options where one CPU stands for several devices."""

from __future__ import annotations

import pytest

from omni_jax.config.simulated import FLAGS, let_devices_wait


def test_several_devices_get_the_options_before_the_user_s() -> None:
    environment = {"JAX_NUM_CPU_DEVICES": "4", "XLA_FLAGS": "--xla_dump_to=a"}
    for _ in range(2):  # commands that a command starts
        let_devices_wait(environment)
        assert environment["XLA_FLAGS"].split() == [*FLAGS, "--xla_dump_to=a"]


def test_the_user_s_own_value_comes_last_and_counts() -> None:
    own = "--xla_cpu_collective_call_terminate_timeout_seconds=5"
    environment = {"JAX_NUM_CPU_DEVICES": "2", "XLA_FLAGS": own}
    let_devices_wait(environment)
    assert environment["XLA_FLAGS"].split() == [*FLAGS, own]


@pytest.mark.parametrize("environment", [{}, {"JAX_NUM_CPU_DEVICES": "1"}, {"JAX_NUM_CPU_DEVICES": ""}])
def test_one_device_runs_as_xla_would(environment: dict[str, str]) -> None:
    before = dict(environment)
    let_devices_wait(environment)
    assert environment == before
