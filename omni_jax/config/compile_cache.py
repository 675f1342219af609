"""Compiled programs are kept from one start to the next, beside the user's other caches."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import sys
import time
import warnings
from pathlib import Path

VARIABLE = "OMNI_JAX_CACHE"
"""Environment variable: the folder, in place of `~/.cache/omni_jax`; "", "0" or "off" for none."""

LARGEST = 4 * 2**30  # bytes; what was used longest ago goes first
WRITTEN_S = 60.0  # seconds; nothing takes longer to write
SHORTEST_S = 0.2  # seconds; what compiles faster is not kept


def use_compile_cache() -> None:
    """Makes jax keep compiled programs, unless a folder is set already; does not import it.

    A folder that cannot be written, or is full, is done without: nothing depends on it.
    """
    jax = sys.modules.get("jax")
    if os.environ.get("JAX_COMPILATION_CACHE_DIR") or (jax is not None and jax.config.jax_compilation_cache_dir):
        return
    folder = cache_folder()
    if folder is None:
        return
    settings = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": SHORTEST_S}
    if importlib.util.find_spec("filelock") is not None:  # jax needs it to keep to a size
        settings["jax_compilation_cache_max_size"] = LARGEST
        _sweep(folder)
    for name, value in settings.items():
        if "jax" in sys.modules:
            sys.modules["jax"].config.update(name, value)
        else:
            os.environ.setdefault(name.upper(), str(value))
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")


def _sweep(folder: Path) -> None:
    """Removes what a process that was killed, or a full disk, left half-written: jax would keep nothing more beside it."""
    with contextlib.suppress(OSError):
        for path in folder.glob("*-cache"):
            if not path.with_name(f"{path.name.removesuffix('-cache')}-atime").exists() and time.time() - path.stat().st_mtime > WRITTEN_S:
                path.unlink()


def cache_root() -> Path | None:
    """Returns the folder that OMNI_JAX_CACHE names, or `~/.cache/omni_jax`, made or not; None where it is switched off.

    Raises:
      RuntimeError: where there is no home.
    """
    named = os.environ.get(VARIABLE)
    if named is not None and named.strip().lower() in ("", "0", "off"):
        return None
    return (Path(named) if named else Path.home() / ".cache" / "omni_jax").absolute()


def cache_folder() -> Path | None:
    """Returns the folder of this kind of processor, made where it was missing; None where it is switched off or cannot be written."""
    try:
        root = cache_root()
        if root is None:
            return None
        folder = root / _processor()
        folder.mkdir(parents=True, exist_ok=True)
        return folder if os.access(folder, os.W_OK) else None
    except (OSError, RuntimeError, ValueError):  # RuntimeError: no home
        return None


def _processor() -> str:
    """Programs for a CPU use what it can do: machines that share a home folder, but no processor, share no programs."""
    known = platform.machine()
    with contextlib.suppress(OSError):
        known += next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))), "")
    return hashlib.blake2b(known.encode(), digest_size=6).hexdigest()
