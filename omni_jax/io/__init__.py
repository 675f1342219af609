"""Files written whole or not at all, files that grow, and locks that the operating system frees."""

from omni_jax.io.files import GrowingText, WholeFile, atomic_write, atomic_write_text, lock, remove_leftovers, scratch_folder

__all__ = ["GrowingText", "WholeFile", "atomic_write", "atomic_write_text", "lock", "remove_leftovers", "scratch_folder"]
