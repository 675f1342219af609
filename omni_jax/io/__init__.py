"""Files written whole or not at all, files that grow, and locks that the operating system frees."""

from omni_jax.io.growing import GrowingText
from omni_jax.io.lock import lock
from omni_jax.io.scratch import scratch_folder
from omni_jax.io.whole import WholeFile, atomic_write, atomic_write_text

__all__ = ["GrowingText", "WholeFile", "atomic_write", "atomic_write_text", "lock", "scratch_folder"]
