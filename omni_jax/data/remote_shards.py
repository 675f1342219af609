"""Records of shards that lie in an object store: ranges of bytes are read ahead of need, and kept in a cache on the local disk.

ArrayRecord's reader takes a local path alone. It is given a file that is as long as the shard and holds its end and one record, the rest
being a hole: the library reads the format, decompresses, and compares its own sums.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Iterable

from omni_jax.data.clip_index import INDEX, ROWS
from omni_jax.data.record_cache import RecordCache
from omni_jax.io import atomic_write
from omni_jax.io.remote import RemoteFolder, StoreError
from omni_jax.types import InputError

READS = 16  # ranges read at once by one process
READER = "readahead_buffer_size:0,max_parallelism:0"  # random access


class RemoteShards:
    """The files of a prepared folder in an object store.

    Attributes:
      index: local folder with `index.json` and `index.arrow`, copies of the store's.
    """

    def __init__(self, location: str, cache: RecordCache) -> None:
        """Copies the index to the cache's folder, where it is not there yet.

        Raises:
          InputError: when there is none, or the store cannot be read.
        """
        self._remote, self._cache = RemoteFolder(location), cache
        try:
            said = self._remote.read(INDEX)
            digest = str(json.loads(said).get("digest"))
        except FileNotFoundError:
            raise InputError(f"{location}: not a prepared folder, or an unfinished one (no {INDEX}); run 'omni-jax prepare'") from None
        except (ValueError, AttributeError) as error:
            raise InputError(f"{location}/{INDEX}: cannot be read ({error}); run 'omni-jax prepare' again") from None
        # Not in one of the folders that the cache empties.
        self._name = hashlib.blake2b(f"{self._remote.location} {digest}".encode(), digest_size=8).hexdigest()
        self.index = cache.folder.with_name(f"{cache.folder.name}.index") / self._name
        self.index.mkdir(parents=True, exist_ok=True)
        if not (self.index / INDEX).is_file() or (self.index / INDEX).read_bytes() != said:
            try:
                with atomic_write(self.index / ROWS, "free some space or set data.cache") as partial:
                    self._remote.fetch(ROWS, partial)
            except FileNotFoundError:
                raise InputError(f"{location}: was prepared by an earlier version; prepare it again to train from a store") from None
            with atomic_write(self.index / INDEX, "free some space or set data.cache") as partial:
                partial.write_bytes(said)
        self._pool = concurrent.futures.ThreadPoolExecutor(READS, "read shards")
        self._coming: dict[str, concurrent.futures.Future[None]] = {}
        self._failed = False  # the run ends with what cannot be read, and would wait for what is still to be read ahead
        self._guard = threading.Lock()

    def sizes(self) -> dict[str, int]:
        """Returns the bytes of each file of the folder."""
        return self._remote.sizes()

    def ahead(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Begins to read (shard, start, stop), those that are not in the cache; what fails is said when it is asked for."""
        with self._guard:
            self._coming = {name: future for name, future in self._coming.items() if not future.done() or future.exception()}
            for shard, start, stop in ranges:
                name = self._key(shard, start)
                if name not in self._coming and not self._cache.has(name):
                    self._coming[name] = self._pool.submit(self._bring, name, shard, start, stop)

    def record(self, shard: str, number: int, extent: tuple[int, int], end: tuple[int, int]) -> bytes:
        """Returns record `number` of a shard.

        Args:
          extent: its bytes [start, stop).
          end: those behind the shard's last record, which say where each record is.

        Raises:
          InputError: when the store cannot be read.
          Exception: whatever ArrayRecord's reader says of damaged bytes, once they were read again.
        """
        for again in (False, True):
            pieces = [(start, self._bytes(shard, start, stop)) for start, stop in (extent, end)]
            try:
                return _read(number, end[1], pieces)
            except Exception:
                if again:
                    raise
                for start, _ in pieces:  # perhaps of the cache alone
                    self._cache.discard(self._key(shard, start))
        raise AssertionError

    def _bytes(self, shard: str, start: int, stop: int) -> bytes:
        name = self._key(shard, start)
        with self._guard:
            coming = self._coming.pop(name, None)
        if coming is not None:
            coming.result()
        data = self._cache.get(name)
        if data is None or len(data) != stop - start:
            data = self._remote.read(shard, start, stop)
            self._cache.put(name, data)
        return data

    def _bring(self, name: str, shard: str, start: int, stop: int) -> None:
        if self._failed:
            return
        try:
            self._cache.put(name, self._remote.read(shard, start, stop))
        except StoreError:
            self._failed = True
            raise

    def _key(self, shard: str, start: int) -> str:
        return f"{self._name}/{shard}.{start}"


def _read(number: int, size: int, pieces: Iterable[tuple[int, bytes]]) -> bytes:
    """Returns a record of a shard of which only these (offset, bytes) are known."""
    from array_record.python.array_record_module import ArrayRecordReader

    with tempfile.NamedTemporaryFile(prefix="omni_jax-shard-") as file:
        os.ftruncate(file.fileno(), size)
        for offset, data in pieces:
            os.pwrite(file.fileno(), data, offset)
        reader = ArrayRecordReader(file.name, READER)
        try:
            (record,) = reader.read([number])
        finally:
            reader.close()
    return record
