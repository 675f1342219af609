"""What XLA reads from the environment where one CPU stands for several devices."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

DEVICES = "JAX_NUM_CPU_DEVICES"
FLAGS = (
    # XLA's CPU runtime runs what is ready in no fixed order, and a thread that waits in a collective keeps the work behind it waiting: two
    # devices can wait in two collectives for each other, for ever. The order that saves memory leaves little that is ready at a time.
    "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    # XLA ends the process where one device waits 40 s for another, which they do on a busy machine.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)
"""Options of XLA that let simulated devices wait for each other, and not for ever."""


def let_devices_wait(environment: MutableMapping[str, str] = os.environ) -> None:
    """Puts FLAGS before the user's XLA_FLAGS where JAX_NUM_CPU_DEVICES asks for several devices; call it before jax compiles."""
    if environment.get(DEVICES, "1").strip() in ("", "0", "1"):
        return
    set_already = environment.get("XLA_FLAGS", "").split()
    environment["XLA_FLAGS"] = " ".join([*(flag for flag in FLAGS if flag not in set_already), *set_already])
