"""The files that one embedding of a manifest writes, each resumed from what an earlier run of the same settings finished of it."""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from omni_jax.api.made_with import media_digest
from omni_jax.config import TABLE_MODALITIES
from omni_jax.data.manifest import Manifest
from omni_jax.io import remove_leftovers
from omni_jax.retrieval.embedding_file import finished, part_path, write_embeddings
from omni_jax.retrieval.embedding_pass import first_of_prompts, same_in_other_parts
from omni_jax.retrieval.journal import Journal
from omni_jax.retrieval.rows import TRUNCATE_DIM, truncated
from omni_jax.types import EmbeddingTable, Record


@dataclasses.dataclass(frozen=True)
class Making:
    """How files are made.

    Attributes:
      tables: names of the tables to fill.
      width: D of the model.
      made_with: what else the vectors depend on; None where that is unknown.
      truncate_dim: dimensions that are kept; None: all.
      official_keys: writes one array a record and table, in one file.
    """

    tables: tuple[str, ...]
    width: int
    made_with: Mapping[str, Any] | None
    truncate_dim: int | None
    official_keys: bool


@dataclasses.dataclass
class EmbeddingFile:
    """One file: number `index` of `of`.

    Attributes:
      manifest: its records.
      several: whether the others are made by the same run.
      firsts: `first_of_prompts` of the records of all files.
    """

    out: epath.Path
    manifest: Manifest
    index: int
    of: int
    several: bool
    firsts: Mapping[str, Mapping[str, str]]
    making: Making

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """All that the embeddings depend on: an unfinished run resumes only under the same."""
        return {
            **(self.making.made_with or {}),
            "tables": self.making.tables,
            "records": _digest(repr(self.manifest.records)),
            "media": media_digest(self.manifest.records),
            **({TRUNCATE_DIM: self.making.truncate_dim} if self.making.truncate_dim else {}),
        }

    @functools.cached_property
    def digest(self) -> str:
        """Of the settings, for files of which an earlier run may have finished some; else ""."""
        return _digest(json.dumps(self.settings, sort_keys=True)) if self.several else ""

    def written(self) -> int | None:
        """Returns how many records the file has, where it is one of several that an earlier run of the same settings wrote; else None."""
        return finished(self.out, self.digest) if self.several else None

    @functools.cached_property
    def journal(self) -> Journal:
        """What is finished of it so far, opened when it is first asked for, as `Journal` says."""
        journal = Journal(self.out.with_name(f".{self.out.stem}.unfinished"), self.settings)
        remove_leftovers(self.out.parent, glob.escape(self.out.name))  # the journal keeps other runs from this file
        return journal

    @functools.cached_property
    def left(self) -> list[Record]:
        """The records that an earlier run neither embedded nor skipped."""
        known = self.journal.finished()
        return [record for record in self.manifest.records if record.id not in known]

    def finish(self, table: EmbeddingTable) -> list[str]:
        """Writes the file, unless it would be empty and alone, and removes the journal; returns the names of its tables."""
        making, rows = self.making, table.tables
        if table.ids or self.several:
            rows = rows or {name: np.zeros((0, making.width), np.float32) for name in making.tables}  # a set has all its files
            same = same_in_other_parts(self.firsts, {*table.ids})
            whole = dataclasses.replace(table, tables=rows, made_with=making.made_with, parts=(self.index,), of=self.of, same=same)
            write_embeddings(self.out, truncated(whole, making.truncate_dim), making.official_keys, self.digest)
        self.journal.remove()
        return list(rows)


def embedding_files(
    out: epath.Path, manifest: Manifest, making: Making, part: tuple[int, int] | None, most_bytes: int
) -> list[EmbeddingFile]:
    """Returns the files to write.

    Args:
      part: (number, count) of the slice that is embedded alone; None embeds all, in files of at most `most_bytes` of vectors, with the
        records in the order of the manifest.
    """
    records, problems = manifest.records, manifest.problems
    if part:
        index, of = part
        slices = {index: (records[index::of], problems[index::of])}
    else:
        width = making.truncate_dim or making.width
        size = 4 * width * sum(TABLE_MODALITIES[name] <= record.modalities for record in records for name in making.tables)
        of = 1 if making.official_keys else min(-(-size // max(1, most_bytes)), len(records))
        slices = {n: (records[len(records) * n // of : len(records) * (n + 1) // of], () if n else problems) for n in range(of)}
    several, firsts = of > 1 and part is None, first_of_prompts(records, making.tables) if of > 1 else {}
    manifests = {n: dataclasses.replace(manifest, records=some, problems=unread) for n, (some, unread) in slices.items()}
    return [EmbeddingFile(part_path(out, n, of), of_file, n, of, several, firsts, making) for n, of_file in manifests.items()]


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
