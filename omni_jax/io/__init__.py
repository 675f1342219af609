"""Files written whole or not at all, and locks that the operating system frees."""

from omni_jax.io.lock import lock
from omni_jax.io.whole import WholeFile, replacing, write_whole

__all__ = ["WholeFile", "lock", "replacing", "write_whole"]
