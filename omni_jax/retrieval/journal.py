"""What an interrupted embedding pass had finished, kept beside its output until the whole is written.

A journal is a folder of parts. Each part appears whole or not at all, so that a kill at any moment loses one group of clips at most.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
from etils import epath

from omni_jax.config.made_with import listed, made_otherwise
from omni_jax.io import lock
from omni_jax.io.messages import as_input_error
from omni_jax.retrieval.embedding_pass import Part
from omni_jax.retrieval.npz import output_file
from omni_jax.types import InputError

SETTINGS = "settings.json"
LOCK = "lock"
_RECORDS = "records"


class Journal:
    """Parts on disk, bound to the settings they were made with.

    Attributes:
      parts: those of earlier runs, then those added since.
    """

    def __init__(self, folder: epath.PathLike, settings: Mapping[str, Any]):
        """Opens a journal, or begins one.

        Raises:
          InputError: when the folder holds parts made with other settings, or another run is writing to it.
        """
        self._folder = epath.Path(folder)
        self.parts: list[Part] = []
        written = json.dumps(dict(settings), indent=1, sort_keys=True)
        self._lock = _lock(self._folder)
        note, parts = self._folder / SETTINGS, sorted(self._folder.glob("part-*.npz"))
        if parts and (whose := _not_ours(note, json.loads(written))):
            raise InputError(f"{self._folder}: holds the unfinished work of {whose}")
        self.parts = [_read(path) for path in parts]
        if not parts:
            with output_file(note) as file:
                file.write(written.encode())

    def finished(self) -> frozenset[str]:
        """Ids of the records that are embedded or skipped."""
        return frozenset(i for part in self.parts for i in (*part.ids, *(name for name, _ in part.problems)))

    @property
    def shapes(self) -> dict[str, list[tuple[int, ...]]]:
        """Shapes that the planner knew after the last part; {} where there is none."""
        return next((part.shapes for part in reversed(self.parts) if part.shapes), {})

    def add(self, part: Part) -> None:
        """Keeps a part."""
        fields = dataclasses.asdict(part)
        rows = fields.pop("rows")
        with output_file(self._folder / f"part-{len(self.parts):06}.npz") as file:
            np.savez(file, **{_RECORDS: np.array(json.dumps(fields))}, **rows)
        self.parts.append(part)

    def remove(self) -> None:
        """Deletes the folder, once the output is written."""
        if self._lock is None:
            self._folder.rmtree()
            return
        for path in list(self._folder.iterdir()):
            if path.name != LOCK:
                path.unlink()
        # The lock goes last: from then on another run may begin in this folder, which then stays.
        (self._folder / LOCK).unlink()
        with contextlib.suppress(OSError):
            os.rmdir(self._folder)  # epath's looks and then removes the whole tree: what another run wrote in between too
        self._lock.close()


def _not_ours(note: epath.Path, settings: Mapping[str, Any]) -> str:
    """Returns whose work is kept and what to do where it cannot be resumed; "" where it can."""
    again = "run it again as it was, or remove the folder"
    try:
        there = json.loads(note.read_text())
    except (OSError, ValueError) as e:
        return f"a run with other settings ({note.name} cannot be read: {e}); {again}"
    if not isinstance(there, dict) or not settings.keys() <= there.keys():
        return (
            "an earlier version of omni-jax, which recorded less of what embeddings depend on; finish it with that version, or remove "
            "the folder to begin again"
        )
    found = made_otherwise(there, settings)
    return f"a run with other settings ({listed(found)}); {again}" if found else ""


def _lock(folder: epath.Path) -> IO[bytes] | None:
    """Returns a file that holds the folder for this process as long as it lives; None on an object store, which has no locks."""
    if "://" in os.fspath(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return None
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held = lock(folder / LOCK)
        except (FileNotFoundError, FileExistsError):  # a run that has just finished removed the folder
            if folder.exists() and not folder.is_dir():
                raise InputError(f"{folder}: is a file where a folder of unfinished work goes; move it or choose another output") from None
            continue
        if held is None:
            raise InputError(f"{folder}: another run is writing here; wait for it, or choose another output")
        return held


def _read(path: epath.Path) -> Part:
    damaged = as_input_error(f"{path}: cannot be read", f"remove the folder {path.parent} to begin again", OSError, ValueError, KeyError)
    with damaged, path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        fields = json.loads(str(arrays[_RECORDS]))
        rows = {name: arrays[name] for name in arrays.files if name != _RECORDS}
    pairs: dict[str, Any] = {name: tuple((i, line) for i, line in fields[name]) for name in ("problems", "warnings")}
    own = {name: tuple(ids) for name, ids in fields.get("own", {}).items()}
    shapes = {kind: [tuple(shape) for shape in known] for kind, known in fields.get("shapes", {}).items()}
    return Part(**{**fields, **pairs, "ids": tuple(fields["ids"]), "rows": rows, "own": own, "shapes": shapes})
