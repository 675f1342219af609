"""Folders on the local disk for what goes elsewhere once it is whole, of which a killed process leaves none for good."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from omni_jax.io.lock import lock

LOCK = "lock"
FRESH_S = 60.0  # a folder so new may not be locked yet


@contextlib.contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """Yields an empty folder, removed when the block ends. What killed processes left under the same name is removed first.

    Raises:
      OSError: when it cannot be made.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{name}-*"):
        with contextlib.suppress(OSError):  # another user's, or just removed
            if time.time() - left.stat().st_mtime > FRESH_S and (held := lock(left / LOCK)) is not None:
                with held:
                    shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as made:
        held = lock(Path(made) / LOCK)
        assert held is not None
        with held:
            folder = Path(made) / "files"
            folder.mkdir()
            yield folder
