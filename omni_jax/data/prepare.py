"""From a manifest to shards of prepared clips, in an order that an interruption does not change.

A shard is written under a temporary name and renamed; then its part of the index is written. A shard without its part is made again, so
that no clip is lost or appears twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omni_jax.config import Preset
from omni_jax.data.clip_index import INDEX, Extents, write_index, write_json, write_rows
from omni_jax.data.loading import load_training_clip, media_name, media_stat
from omni_jax.data.manifest import Problem, write_jsonl_atomic
from omni_jax.data.shards import (
    ShardWriter,
    encode_clip,
    extents,
    index_row,
    media_fields,
    open_shard,
    shard_name,
    stored_fields,
    write_dataset_info,
)
from omni_jax.data.sources import trainable
from omni_jax.io import remove_leftovers
from omni_jax.io.remote import RemoteFolder
from omni_jax.media.workers import run_guarded
from omni_jax.types import ClipError, InputError, Record

STATE, PARTS, ERRORS = "preparation.json", "parts", "errors.jsonl"
CLIPS_PER_SHARD = 256  # some 400 MB at training size: what an interruption costs at most


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One clip on its way into a shard."""

    data: bytes
    row: dict[str, Any]
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """One shard to make: what goes into it, and where it and its part of the index are written."""

    path: Path
    part: Path
    records: tuple[Record, ...]
    preset: Preset

    @property
    def items(self) -> list[tuple[Record, Preset]]:
        """What `prepare_record` takes."""
        return [(record, self.preset) for record in self.records]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a preparation came to.

    Attributes:
      clips: in the shards.
      silent: of them with silence in place of a missing audio track.
      errors: problems in the order of the manifest.
      warnings: one line for each clip in which something was replaced or left out.
    """

    clips: int
    silent: int
    errors: tuple[Problem, ...]
    warnings: tuple[str, ...]


class Preparation:
    """A folder of shards in the making.

    Attributes:
      total, done: usable records, and those of them in shards that are finished.
    """

    def __init__(
        self,
        out: Path,
        records: Sequence[Record],
        problems: Sequence[Problem],
        preset: Preset,
        shards: int | None = None,
        store: RemoteFolder | None = None,
    ) -> None:
        """Begins, or resumes an earlier preparation of the same records.

        Args:
          shards: files to write; default one for every 256 clips.
          store: where the folder is to be; `out` is then an empty folder, from which each file goes there once it is whole.

        Raises:
          InputError: when no record can be trained on, or the folder holds something else.
        """
        usable, unfit = trainable(records)
        self._problems = (*problems, *unfit)
        if not usable:
            first = f"; the first: {self._problems[0].reason}" if self._problems else ""
            if self._problems and store is None and self._is_free(out):
                out.mkdir(parents=True, exist_ok=True)
                write_jsonl_atomic(out / ERRORS, (p.row() for p in self._problems))
                first += f"; {out / ERRORS} lists all"
            raise InputError(f"no record can be prepared: each needs text and video{first}")
        count = min(shards or -(-len(usable) // CLIPS_PER_SHARD), len(usable))
        self._out, self._preset, self._store, self.total = out, preset, store, len(usable)
        self._stored = self._fetch() if store is not None else {}
        self._shards = [usable[i * len(usable) // count : (i + 1) * len(usable) // count] for i in range(count)]
        settings = {
            "preset": media_fields(preset),
            "shards": count,
            "records": hashlib.blake2b(repr(usable).encode(), digest_size=16).hexdigest(),
        }
        self._claim(settings)
        self._left = [i for i in range(count) if not self._finished(i)]
        self.done = self.total - sum(len(self._shards[i]) for i in self._left)

    def begin(self) -> list[ShardJob]:
        """Returns the shards that are missing, each of which `write_shard` makes, in any order and anywhere that sees their folder.

        Where there is a store, `send_shard` follows, and the part must be here in the end.
        """
        if self._left:  # until it is whole again, the folder is not taken for one
            (self._out / INDEX).unlink(missing_ok=True)
            if self._store is not None:
                self._store.remove(INDEX)
        for i in self._left:
            self._part_path(i).unlink(missing_ok=True)
        return [ShardJob(self._path(i), self._part_path(i), tuple(self._shards[i]), self._preset) for i in self._left]

    def run(self, workers: int, timeout_s: float) -> Generator[int]:
        """Makes the shards that are missing; yields the number of records dealt with, one by one.

        Args:
          workers, timeout_s: as in `media.workers.run_guarded`.
        """
        jobs = self.begin()
        items = (item for job in jobs for item in job.items)
        outcomes = run_guarded(prepare_record, items, workers, timeout_s, name=lambda item: media_name(item[0]))
        for job in jobs:
            for _ in write_shard(job, outcomes):
                yield 1
            if self._store is not None:
                send_shard(job, self._store)
        self._left = []

    def finish(self) -> Summary:
        """Writes the index, TFDS's files and the list of errors, and says what came of it all."""
        self._remove_leftovers()  # of a node that was lost meanwhile
        failed: list[Problem] = []
        warnings: list[str] = []

        def shards() -> Iterator[tuple[list[dict[str, Any]], Extents]]:
            for shard in range(len(self._shards)):
                part = self._part(shard)
                failed.extend(Problem(**row) for row in part["errors"])
                warnings.extend(part["warnings"])
                # Parts of earlier versions do not say where the records lie.
                yield part["rows"], Extents(part["bounds"], part["size"]) if "size" in part else extents(self._path(shard))

        said = write_rows(self._out, shards())
        errors = tuple(sorted([*self._problems, *failed], key=lambda p: p.line))
        path = self._out / ERRORS
        path.unlink(missing_ok=True)
        if errors:
            write_jsonl_atomic(path, (p.row() for p in errors))
        stand_ins = [self._path(shard) for shard in range(len(self._shards))] if self._store is not None else []
        for path in stand_ins:  # TensorFlow Datasets looks for their names
            path.touch()
        write_dataset_info(self._out, said["shards"], said["sizes"])
        for path in stand_ins:
            path.unlink()
        write_index(self._out, self._preset, said)
        if self._store is not None:
            self._store.remove(ERRORS)
            made = sorted((path.name for path in self._out.iterdir() if path.is_file()), key=lambda name: name == INDEX)
            for name in made:  # the index last: it makes the folder a whole one
                self._store.put(self._out / name, name)
        return Summary(sum(said["shards"]), said["silent"], errors, tuple(warnings))

    def _claim(self, settings: dict[str, Any]) -> None:
        state = self._out / STATE
        if state.is_file():
            try:
                earlier = json.loads(state.read_text(encoding="utf-8"))
                earlier["preset"] = stored_fields(earlier["preset"])
            except (OSError, ValueError, KeyError, TypeError):
                raise InputError(f"{state}: cannot be read; remove the folder and prepare it again") from None
            if earlier != settings:
                differing = next((name for name in settings if earlier.get(name) != settings[name]), "settings")
                raise InputError(f"{self._out}: was prepared with other {differing}; give the same, or another --out")
            self._remove_leftovers()
            return
        if not self._is_free(self._out):
            raise InputError(f"{self._out}: exists and was not made by 'omni-jax prepare'; give another --out")
        (self._out / PARTS).mkdir(parents=True, exist_ok=True)
        write_json(state, settings)
        if self._store is not None:
            self._store.put(state, STATE)

    def _fetch(self) -> dict[str, int]:
        """Copies what an earlier preparation left in the store, but for shards, and returns the sizes of what is there."""
        assert self._store is not None
        sizes = self._store.sizes()
        if STATE in sizes:
            (self._out / PARTS).mkdir()
            self._store.fetch(STATE, self._out / STATE)
            for name in self._store.sizes(PARTS):
                self._store.fetch(f"{PARTS}/{name}", self._out / PARTS / name)
        elif set(sizes) - {ERRORS}:
            raise InputError(f"{self._store.location}: exists and was not made by 'omni-jax prepare'; give another --out")
        return sizes

    def _remove_leftovers(self) -> None:
        for folder in (self._out, self._out / PARTS):
            remove_leftovers(folder)

    @staticmethod
    def _is_free(folder: Path) -> bool:
        """Whether a folder can be begun: it is not there, is empty, or holds what a preparation of nothing left."""
        return not folder.exists() or (folder.is_dir() and all(path.name == ERRORS for path in folder.iterdir()))

    def _path(self, shard: int) -> Path:
        return self._out / shard_name(shard, len(self._shards))

    def _part_path(self, shard: int) -> Path:
        return self._out / PARTS / f"{shard:05}.json"

    def _part(self, shard: int) -> dict[str, Any]:
        return json.loads(self._part_path(shard).read_text(encoding="utf-8"))

    def _finished(self, shard: int) -> bool:
        try:
            part = self._part(shard)
            sizes = zip(part.get("media", ()), _media_sizes(self._shards[shard]), strict=False)  # earlier versions did not keep them
            if any(before != now and None not in (before, now) for before, now in sizes):
                return False  # made of other files; one that is gone since is no reason
            if self._store is not None:
                return self._stored.get(self._path(shard).name) == part["size"]
            open_shard(self._path(shard), len(part["rows"]))
        except (OSError, ValueError, KeyError, TypeError, InputError):
            return False
        return True


def _media_sizes(records: Iterable[Record]) -> list[int | None]:
    """Returns the sizes of the files of video and sound, two a record; None as `media_stat`."""
    found = (media_stat(media) for record in records for media in (record.video, record.audio))
    return [one.st_size if one else None for one in found]


def write_shard(job: ShardJob, outcomes: Iterator[tuple[Any, Any]]) -> Iterator[dict[str, int]]:
    """Writes a shard, then its part of the index; yields what to count of each record: `silent`, `skipped` and `bytes`.

    Args:
      outcomes: (item, `Prepared` or ClipError) of the job's items in order, and perhaps of others behind them.

    Raises:
      InputError: when it cannot be written.
    """
    rows, errors, warnings = [], [], []
    sizes = _media_sizes(job.records)
    writer = ShardWriter(job.path)
    try:
        for _ in job.records:
            (record, _), outcome = next(outcomes)
            if isinstance(outcome, ClipError):
                errors.append(Problem(record.id, record.line, str(record.video), str(outcome)).row())
                yield {"skipped": 1}
            else:
                writer.write(outcome.data)
                rows.append(outcome.row)
                warnings += outcome.warnings
                yield {"silent": int(outcome.row["silent"]), "bytes": len(outcome.data)}
        found = writer.finish()
    finally:
        writer.discard()
    lies = {"bounds": found.bounds, "size": found.size, "media": sizes}
    write_json(job.part, {"rows": rows, "errors": errors, "warnings": warnings, **lies})


def send_shard(job: ShardJob, store: RemoteFolder) -> None:
    """Puts a shard, and then its part, where the store is, and removes the shard here."""
    store.put(job.path, job.path.name)
    store.put(job.part, f"{PARTS}/{job.part.name}")
    job.path.unlink()


def prepare_record(item: tuple[Record, Preset]) -> Prepared:
    """Returns a record as a shard holds it. Raises ClipError when its media cannot be used."""
    clip = load_training_clip(item)
    return Prepared(encode_clip(clip), index_row(clip), clip.warnings)
