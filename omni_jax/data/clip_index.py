"""What is known of each clip of a prepared folder without reading it, mapped into memory: a look costs the same for any number of clips.

`index.json` holds what is said of all clips together, `index.arrow` (Arrow's IPC file format) a row for each clip, see `schema`. Folders of
earlier versions have the columns as lists in `index.json`, which are held in memory.

Letters: N clips.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_jax.config import Preset
from omni_jax.data.clips import ClipInfo, Limits, digest_line
from omni_jax.io import atomic_write
from omni_jax.io.messages import line_of
from omni_jax.types import InputError, VideoGrid

FORMAT, FIRST_FORMAT = "omni_jax.clips/2", "omni_jax.clips/1"
INDEX, ROWS = "index.json", "index.arrow"
COLUMNS = ("id", "caption", "grid", "second_per_grid", "seconds", "frames", "samples", "silent")
AGAIN = "run 'omni-jax prepare' again with the same arguments"
BATCH = 1 << 16  # rows of a record batch
LOOKS = 256  # values read before their pages are given back: they would otherwise stay with this process until memory is short


@dataclasses.dataclass(frozen=True)
class Extents:
    """Where the records of a shard lie.

    Attributes:
      bounds: N + 1 byte offsets: record i fills [bounds[i], bounds[i + 1]).
      size: bytes of the file.
    """

    bounds: tuple[int, ...]
    size: int


class ClipIndex:
    """The index of a prepared folder.

    Attributes:
      preset: fields of the preset that it was prepared with.
      lengths: clips of each shard.
      sizes: bytes of each shard; None in folders of earlier versions.
      limits: the largest clip.
      silent: clips with silence in place of sound.
      digest: of all rows, as `clips.digest_line` makes it; None in folders of earlier versions.
      ids, captions: N texts, each read when it is asked for.
    """

    def __init__(self, folder: Path, rows: Path | None = None) -> None:
        """Opens the index.

        Args:
          rows: the file of rows, where it does not lie in the folder.

        Raises:
          InputError: when there is none, or one that cannot be read.
        """
        import pyarrow as pa  # slow to import; commands that read no shards do without it

        path = folder / INDEX
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            if said["format"] not in (FORMAT, FIRST_FORMAT):
                raise InputError(f"{path}: format {said['format']!r} is not {FORMAT!r}; prepare the clips with this version")
            self.preset: Mapping[str, Any] = said["preset"]
            self.lengths: Sequence[int] = said["shards"]
            self.sizes: Sequence[int] | None = said.get("sizes")
            self.digest: str | None = said.get("digest")
            self._map: mmap.mmap | None = None
            self._looks = 0
            if said["format"] == FORMAT:
                path = rows or folder / ROWS
                with path.open("rb") as file:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._table = pa.ipc.open_file(pa.py_buffer(self._map)).read_all()
                if self._table.schema != schema():
                    raise ValueError("its columns are others")
                self.limits, self.silent = Limits(*said["limits"]), int(said["silent"])
            else:
                found = said["records"]
                if len({len(found[name]) for name in COLUMNS}) != 1:
                    raise ValueError("its columns differ in length")
                self._table = pa.table({name: pa.array(found[name], schema().field(name).type) for name in COLUMNS})
                grids = found["grid"]
                most = (max((t for t, _, _ in grids), default=0), max((h * w for _, h, w in grids), default=0))
                self.limits, self.silent = Limits(*most, max(found["samples"], default=0)), sum(found["silent"])
            if sum(self.lengths) != len(self._table):
                raise ValueError(f"it has {len(self._table)} rows for {sum(self.lengths)} clips")
        except FileNotFoundError:
            if path.name == ROWS:
                raise InputError(f"{path}: not found; {AGAIN}") from None
            unfinished = "its preparation was interrupted" if (folder / "preparation.json").is_file() else "not a prepared folder"
            raise InputError(f"{folder}: {unfinished} (no {INDEX}); run 'omni-jax prepare'") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
            raise InputError(f"{path}: cannot be read ({line_of(error)}); {AGAIN}") from None
        self._columns = {name: self._table.column(name) for name in self._table.column_names}
        self.ids, self.captions = (_Texts(functools.partial(self._value, name), len(self._table)) for name in ("id", "caption"))

    def __len__(self) -> int:
        return len(self._table)

    def info(self, number: int) -> ClipInfo:
        """Returns what is known of a clip."""
        return _info({name: self._value(name, number) for name in COLUMNS})

    def is_silent(self, number: int) -> bool:
        """Returns whether silence stands in for a clip's missing sound."""
        return self._value("silent", number)

    def extent(self, number: int) -> tuple[int, int] | None:
        """Returns the bytes [start, stop) of its shard that hold a clip; None in folders of earlier versions."""
        return (self._value("start", number), self._value("stop", number)) if self.sizes is not None else None

    def numbers_of(self, ids: Iterable[str]) -> Iterator[int]:
        """Yields the numbers of the clips with these ids, by one pass over the column."""
        import pyarrow as pa
        import pyarrow.compute

        pc: Any = pyarrow.compute  # pyarrow makes its functions when it is imported, so their types are not known

        wanted, start = pa.array(list(ids), pa.string()), 0
        for chunk in self._columns["id"].chunks:
            for number in pc.indices_nonzero(pc.is_in(chunk, value_set=wanted)).to_pylist():
                yield start + number
            start += len(chunk)
            self._release()

    def _value(self, name: str, number: int) -> Any:
        self._looks += 1
        if self._looks >= LOOKS:
            self._release()
        return self._columns[name][int(number)].as_py()

    def _release(self) -> None:
        self._looks = 0
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)  # of a file: the pages are read again where they are needed


class _Texts(Sequence[str]):
    """A column of texts."""

    def __init__(self, value: Callable[[int], str], length: int) -> None:
        self._value, self._length = value, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self._value(i) for i in range(*number.indices(self._length))]
        place = int(number) + self._length * (number < 0)
        if not 0 <= place < self._length:
            raise IndexError(number)
        return self._value(place)


def write_rows(folder: Path, shards: Iterable[tuple[Sequence[Mapping[str, Any]], Extents]]) -> dict[str, Any]:
    """Writes the rows of all clips, and returns what is said of all together, as `write_index` takes it.

    Args:
      shards: of each shard what is known of its clips, by the names of COLUMNS, and where they lie. One at a time is held.

    Raises:
      InputError: when the file cannot be written.
    """
    import pyarrow as pa

    lengths: list[int] = []
    sizes: list[int] = []
    most = (0, 0, 0)
    silent, digest = 0, hashlib.blake2b(digest_size=16)

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal most, silent
        for known, extents in shards:
            lengths.append(len(known))
            sizes.append(extents.size)
            for row, start, stop in zip(known, extents.bounds, extents.bounds[1:], strict=False):
                t, h, w = row["grid"]
                most = max(most[0], t), max(most[1], h * w), max(most[2], row["samples"])
                silent += row["silent"]
                digest.update(digest_line(_info(row)))
                yield {**row, "start": start, "stop": stop}

    write_batches(folder, (pa.RecordBatch.from_pylist(some, schema=schema()) for some in _batched(rows())))
    return {"shards": lengths, "sizes": sizes, "limits": most, "silent": silent, "digest": digest.hexdigest()}


def write_index(folder: Path, preset: Preset, said: Mapping[str, Any]) -> None:
    """Writes what is said of all clips together, which makes the folder a whole one. Raises InputError where it cannot be written."""
    write_json(folder / INDEX, {"format": FORMAT, "preset": dataclasses.asdict(preset), **said})


def write_batches(folder: Path, batches: Iterable[Any]) -> None:
    """Writes record batches of `schema` as the file of rows. Raises InputError where it cannot be written."""
    import pyarrow as pa

    with atomic_write(folder / ROWS, "check that the disk has space") as partial, pa.ipc.new_file(str(partial), schema()) as writer:
        for batch in batches:
            writer.write_batch(batch)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file that appears whole or not at all. Raises InputError where it cannot be written."""
    with atomic_write(path, "check that the disk has space") as partial, partial.open("w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False)


def _info(row: Mapping[str, Any]) -> ClipInfo:
    t, h, w = row["grid"]
    return ClipInfo(row["id"], row["caption"], VideoGrid((t, h, w), row["second_per_grid"]), row["samples"], row["silent"])


def _batched(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while some := list(itertools.islice(rows, BATCH)):
        yield some


def schema() -> Any:
    """Returns the columns of the file of rows."""
    import pyarrow as pa

    kinds = {
        "id": pa.string(),
        "caption": pa.string(),
        "grid": pa.list_(pa.int32(), 3),
        "second_per_grid": pa.float64(),
        "seconds": pa.float64(),
        "frames": pa.int64(),
        "samples": pa.int64(),
        "silent": pa.bool_(),
        "start": pa.int64(),
        "stop": pa.int64(),
    }
    return pa.schema(list(kinds.items()))
