"""The list of records that a run could not use, each with its reason once, however often the run was resumed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from omni_jax.io import GrowingText, atomic_write_text
from omni_jax.io.messages import as_input_error
from omni_jax.io.remote import StoreError
from omni_jax.train.workdir import skipped_records_name


class SkippedRecords:
    """A JSONL file in a workdir, one for each process: `skipped_records.jsonl` of the first, `skipped_records.N.jsonl` of process N.

    Attributes:
      path: the file; it is there from the first record on.
    """

    def __init__(self, workdir: epath.Path, process: int):
        """Reads what earlier starts of the run have written. Raises InputError when the file cannot be read."""
        self.path = workdir / skipped_records_name(workdir, process)
        with as_input_error(f"{self.path}: cannot be read", "move it away", OSError, UnicodeDecodeError):
            text = self.path.read_text() if self.path.exists() else ""
        rows = [row for line in text.splitlines() if (row := _row(line)) is not None]
        self._seen = {_key(row) for row in rows}
        self._kept = "".join(_line(row) for row in rows)
        self._file: GrowingText | None = None
        if text != self._kept:  # a line was cut off
            atomic_write_text(self.path, self._kept)

    def add(self, row: Mapping[str, Any]) -> bool:
        """Writes a record {"id", ..., "reason"} unless it is there with this reason; returns whether it was new. A reader finds it at once,
        in an object store after `sync` at the latest: what is lost with the process before a checkpoint is found again behind it.

        Raises:
          InputError: when it cannot be written.
        """
        if _key(row) in self._seen:
            return False
        self._seen.add(_key(row))
        with self._writing():
            if self._file is None:
                self._file = GrowingText(self.path, self._kept)
            self._file.write(_line(row))
        return True

    def sync(self) -> None:
        """Returns when a reader finds every record. Raises InputError when they cannot be written."""
        if self._file is not None:
            with self._writing():
                self._file.sync()

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError, StoreError):  # as of a run that ends because of it
                self._file.close()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return as_input_error(f"{self.path}: cannot be written", "free some space and run it again")


def _key(row: Mapping[str, Any]) -> tuple[Any, Any]:
    return row["id"], row["reason"]


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(dict(row)) + "\n"


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        _key(row)
    except (ValueError, KeyError, TypeError):
        return None
    return row
