"""Exact ranks by counting better candidates: query rows over the mesh, gallery in chunks, both directions from one product.

Letters: N rows of the query table, M rows of the gallery table, T rows of a tile, D width, R the most relevant items a query has.

Equal means equal. Every product is a (T, D) x (D, T) tile of one compiled program, whatever the chunk or the device, and the score of
a relevant item is read from the same product as its rivals' scores: a separate dot product differs in the last bit and breaks ties.
Rows that hold the same direction are, besides, found once on the host and count as tied whatever the device rounds.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from omni_jax.retrieval.npz import ALIGNMENT, aligned_empty
from omni_jax.retrieval.relevance import count_up, relevant_pairs
from omni_jax.retrieval.rows import as_rows, lengths, parts
from omni_jax.retrieval.stored_rows import StoredRows
from omni_jax.types import InputError

Item = TypeVar("Item")
Done = TypeVar("Done")

CPU_CHUNK = 640  # rows; a product of this side runs at the full matrix rate of a CPU and takes 1.6 MB
CPU_STREAMS = 3  # tiles in flight on a CPU
ACCELERATOR_CHUNK = 4096  # rows; an accelerator would otherwise wait for the host
TILE_STEP = 16  # rows; the side of a tile is a multiple, so that vector instructions leave no tail
UNSCALED = (1e-9, 1e9)  # rows of such norms are multiplied as they are, without a scaled copy: their products stay far inside float32
PACKED = 1 << 15  # a tile of fewer candidates has both its counts in the halves of one int32

NO_ROW, NO_ITEM = -1, -2  # `same` of a padded row and of an absent relevant item; they differ so that padding matches nothing


@dataclasses.dataclass(frozen=True)
class Vectors:
    """A checked table, ready to be ranked.

    Attributes:
      rows: (N, D) float32 or bfloat16, as given; they may stay on disk.
      scale: (N,) float32, reciprocal norms.
      same: (N,) int32, first row that holds the same direction bit for bit.
      unscaled: whether every norm is within UNSCALED.
    """

    rows: np.ndarray | StoredRows
    scale: np.ndarray
    same: np.ndarray
    unscaled: bool = False


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Ranks of the relevant items, one entry per (query, relevant item), ordered by query.

    Attributes:
      queries: rows of the query table. A query without a relevant item has no entry.
      gallery: rows of the gallery.
      query: (P,) int64, row of the query.
      item: (P,) int64, row of the relevant item.
      better: (P,) int64, candidates with a strictly greater similarity, other relevant items included.
      equal: (P,) int64, other candidates with the same similarity, other relevant items included.
    """

    queries: int
    gallery: int
    query: np.ndarray
    item: np.ndarray
    better: np.ndarray
    equal: np.ndarray


def prepare(rows: np.ndarray | StoredRows, name: str = "embeddings", ids: Sequence[str] | None = None) -> Vectors:
    """Returns the table with its reciprocal norms and its duplicate rows found.

    Args:
      rows: (N, D), any floating type. bfloat16 is kept as it is, at half the memory of float32, which all others become; products and
        sums are float32 for both.
      name: of the table, for the message.
      ids: N record ids, for the message.

    Raises:
      InputError: for a table that is not (N, D) with N, D >= 1, and for rows with NaN, infinity, or no usable norm, naming them.
    """
    rows = as_rows(rows, name)
    norms = lengths(rows, name, ids)
    scale = (1 / norms).astype(np.float32)
    return Vectors(rows, scale, _duplicates(rows, scale), bool(norms.min() >= UNSCALED[0] and norms.max() <= UNSCALED[1]))


def _duplicates(rows: np.ndarray | StoredRows, scale: np.ndarray) -> np.ndarray:
    """(N,) int32: for each row the first row of the same direction. Only rows whose bits have the sum of another's are compared in full."""

    def unit(index: slice | np.ndarray) -> np.ndarray:
        return rows[index].astype(np.float32) * scale[index, None] + np.float32(0)  # -0 becomes 0

    sums = np.empty(len(rows), np.uint32)
    for part in parts(len(rows)):
        sums[part] = unit(part).view(np.uint32).sum(axis=1, dtype=np.uint32)
    _, which, number = np.unique(sums, return_inverse=True, return_counts=True)
    same, seen = np.arange(len(rows), dtype=np.int32), {}
    doubtful = np.flatnonzero(number[which] > 1)
    for part in parts(len(doubtful)):
        for i, row in zip(doubtful[part].tolist(), unit(doubtful[part]), strict=True):
            same[i] = seen.setdefault(hashlib.blake2b(row, digest_size=16).digest(), i)
    return same


def rank_pair(
    a: Vectors, b: Vectors, relevance: tuple[Sequence, Sequence] | None = None, *, chunk: int | None = None, mesh: Mesh | None = None
) -> tuple[Ranks, Ranks]:
    """Returns the ranks of a's rows in gallery b and of b's rows in gallery a, from one pass over the cosine matrix.

    The memory needed beyond the tables is O(chunk * (chunk + D)) per device.

    Args:
      relevance: labels of a's N rows and of b's M rows; a pair is relevant where they are equal. None: the same row is relevant.
      chunk: largest side of a tile, rows.
      mesh: rows of `a` are spread over all its axes; None: one device.

    Raises:
      InputError: for widths that differ, labels of another length, or no relevant pair at all.
    """
    if a.rows.shape[1] != b.rows.shape[1]:
        raise InputError(f"the tables are {a.rows.shape[1]} and {b.rows.shape[1]} wide; they must come from one model")
    if mesh is None:
        mesh = Mesh(np.array(jax.local_devices()[:1]), ("rows",))
    if chunk is None:
        chunk = CPU_CHUNK if mesh.devices.flat[0].platform == "cpu" else ACCELERATOR_CHUNK
    order_a, order_b, rows, columns = relevant_pairs(len(a.rows), len(b.rows), relevance)
    side = _Side(a, order_a, _tile_rows(len(a.rows), chunk) * mesh.size, rows, b.same[order_b][columns])
    other = _Side(b, order_b, _tile_rows(len(b.rows), chunk), columns, a.same[order_a][rows])
    counted = _read_scores(side, other, mesh)
    _count(side, other, counted, mesh)
    return (
        side.ranks(order_a[rows], order_b[columns], len(b.rows)),
        other.ranks(order_b[columns], order_a[rows], len(a.rows)),
    )


class _Side:
    """One table of a pair, its rows in tile order, with the relevant items of each row and what has been counted for them."""

    def __init__(self, table: Vectors, order: np.ndarray, tile: int, row: np.ndarray, item_same: np.ndarray):
        """`row` (P,) is the row, in tile order, of each relevant pair; `item_same` (P,) the `same` of its item.

        Rows have places 0 .. blocks * tile. The last block ends with the table and overlaps the block before it, so that a tile is a plain
        slice of the table; the places of the rows it repeats are masked.
        """
        self.table, self.order, self.tile = table, order, tile
        self.blocks = -(-len(order) // tile)
        place = np.arange(len(order))
        if self.blocks > 1:
            place[(self.blocks - 1) * tile :] += self.blocks * tile - len(order)
        self.place, self.slot = place[row], count_up(row)
        self.unread = np.bincount(self.place // tile, minlength=self.blocks)  # relevant pairs of each block whose scores are not known yet
        shape = (int(self.slot.max()) + 1, self.blocks * tile)  # relevant items first: the counting loop walks along this axis
        self.score = np.full(shape, np.inf, np.float32)
        self.item_same = np.full(shape, NO_ITEM, np.int32)
        self.item_same[self.slot, self.place] = item_same
        self.same = np.full(shape[1], NO_ROW, np.int32)
        self.same[place] = table.same[order]
        self.counts = np.zeros((2, *shape), np.int64)
        self._in_order = bool(np.array_equal(order, np.arange(len(order))))

    def part(self, block: int) -> slice:
        return slice(block * self.tile, (block + 1) * self.tile)

    def vectors(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows (T, D) and scales (T,) of a block; zeros behind a table of less than one tile."""
        start = min(block * self.tile, max(len(self.order) - self.tile, 0))
        part = slice(start, start + self.tile)
        if self._in_order and self.table.unscaled and len(self.order) >= self.tile:
            return self.table.rows[part], self.table.scale[part]
        index = self.order[part]
        width, kept = self.table.rows.shape[1], self.table.unscaled
        rows = aligned_empty((self.tile, width), self.table.rows.dtype if kept else np.dtype(np.float32))
        rows[len(index) :] = 0
        scale = np.zeros(self.tile, np.float32)
        if self.table.unscaled:
            rows[: len(index)], scale[: len(index)] = self.table.rows[index], self.table.scale[index]
        else:
            rows[: len(index)], scale[: len(index)] = self.table.rows[index].astype(np.float32) * self.table.scale[index, None], 1
        return rows, scale

    def thresholds(self, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores (R, T) and `same` (R, T) of the relevant items, and `same` (T,) of the rows."""
        part = self.part(block)
        return self.score[:, part], self.item_same[:, part], self.same[part]

    def ranks(self, query: np.ndarray, item: np.ndarray, gallery: int) -> Ranks:
        better, equal = self.counts[:, self.slot, self.place]
        order = np.lexsort((item, query))
        return Ranks(len(self.order), gallery, query[order], item[order], better[order], equal[order] - 1)  # an item equals itself


def _read_scores(side: _Side, other: _Side, mesh: Mesh) -> np.ndarray:
    """Reads every relevant pair's similarity from its tile, and returns which tiles (blocks, blocks) were counted on the way.

    Pairs were sorted, so few tiles hold any. A tile that completes what its rows and columns are measured by is counted at once: with the
    same row relevant these are all the tiles that hold pairs, and no product is computed twice.
    """
    run = _programs(mesh)
    rows, columns = side.place, other.place
    tiles = rows // side.tile * other.blocks + columns // other.tile
    by_tile = np.argsort(tiles, kind="stable")
    starts = np.flatnonzero(np.diff(tiles[by_tile], prepend=-1))
    groups = np.split(by_tile, starts[1:])
    length = 1 << (max(len(group) for group in groups) - 1).bit_length()  # a power of two, so that few lengths are compiled
    counted = np.zeros((side.blocks, other.blocks), bool)

    def pick(group: np.ndarray) -> tuple[jax.Array, jax.Array]:
        i, j = divmod(int(tiles[group[0]]), other.blocks)
        where = np.zeros((2, length), np.int32)
        where[:, : len(group)] = rows[group] % side.tile, columns[group] % other.tile
        products = run.product(*run.put_rows(*side.vectors(i)), *run.put(*other.vectors(j)))
        return products, run.pick(products, *run.put(where))

    for group, (products, picked) in _in_flight(pick, groups, mesh):
        i, j = divmod(int(tiles[group[0]]), other.blocks)
        scores = np.asarray(picked)[: len(group)]
        side.score[side.slot[group], rows[group]] = scores
        other.score[other.slot[group], columns[group]] = scores
        side.unread[i] -= len(group)
        other.unread[j] -= len(group)
        if side.unread[i] == other.unread[j] == 0:
            counted[i, j] = True
            done = run.count(products, *run.put_thresholds(*side.thresholds(i)), *run.put(*other.thresholds(j)))
            _add(side, i, other, j, done)
    return counted


def _count(side: _Side, other: _Side, counted: np.ndarray, mesh: Mesh) -> None:
    """Counts better and equal candidates along both axes of the tiles not `counted` yet."""
    run = _programs(mesh)
    in_place: dict[int, list[jax.Array]] = {}

    # Placing takes a third of a product's time: once for a row of tiles, or for all where it is small or a CPU reads the table itself.
    @functools.lru_cache(maxsize=2)
    def rows(i: int) -> tuple[list[jax.Array], list[jax.Array]]:
        return run.put_rows(*side.vectors(i)), run.put_thresholds(*side.thresholds(i))

    @functools.cache
    def levels(j: int) -> list[jax.Array]:
        return run.put(*other.thresholds(j))

    def columns(j: int) -> list[jax.Array]:
        if j not in in_place:
            vectors = other.vectors(j)
            placed = run.put(*vectors)
            whole = isinstance(other.table.rows, np.ndarray)  # and not rows that are read from disk for each tile
            if not whole or not run.reads_in_place(vectors[0]) or not np.may_share_memory(vectors[0], other.table.rows):
                return placed
            in_place[j] = placed
        return in_place[j]

    def tile(place: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        i, j = place
        vectors, thresholds = rows(i)
        return run.count(run.product(*vectors, *columns(j)), *thresholds, *levels(j))

    places = ((i, j) for i in range(side.blocks) for j in range(other.blocks) if not counted[i, j])
    for (i, j), done in _in_flight(tile, places, mesh):
        _add(side, i, other, j, done)


def _in_flight(work: Callable[[Item], Done], items: Iterable[Item], mesh: Mesh) -> Iterator[tuple[Item, Done]]:
    """Yields each item with its work, in order, and has the next ones computing meanwhile: one, or CPU_STREAMS on a CPU alone.

    A CPU runs what one thread hands over one after the other, and a product leaves a core idle at its end; hence threads.
    """
    waiting: collections.deque[tuple[Item, Callable[[], Done]]] = collections.deque()
    threads = CPU_STREAMS if mesh.size == 1 and mesh.devices.flat[0].platform == "cpu" else 0
    with concurrent.futures.ThreadPoolExecutor(max(threads, 1)) as pool:
        for item in items:
            if threads:
                waiting.append((item, pool.submit(lambda item=item: jax.block_until_ready(work(item))).result))
            else:
                waiting.append((item, functools.partial(_same, work(item))))
            if len(waiting) > max(threads, 1):
                first, done = waiting.popleft()
                yield first, done()
        for item, done in waiting:
            yield item, done()


def _same(value: Done) -> Done:
    return value


def _add(side: _Side, i: int, other: _Side, j: int, counts: tuple[jax.Array, jax.Array]) -> None:
    side.counts[:, :, side.part(i)] += np.asarray(counts[0])
    other.counts[:, :, other.part(j)] += np.asarray(counts[1])


@dataclasses.dataclass(frozen=True)
class _Programs:
    """The compiled functions for one mesh, and the placing of their inputs."""

    product: Callable[..., jax.Array]
    pick: Callable[..., jax.Array]
    count: Callable[..., tuple[jax.Array, jax.Array]]
    whole: NamedSharding
    by_row: NamedSharding  # first axis over the mesh
    by_column: NamedSharding  # second axis over the mesh

    def reads_in_place(self, array: np.ndarray) -> bool:
        """Whether `put` makes no copy of an array."""
        cpu = self.whole.mesh.size == 1 and next(iter(self.whole.device_set)).platform == "cpu"
        return cpu and array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0

    def put(self, *arrays: np.ndarray) -> list[jax.Array]:
        return [_place(x, self.whole) for x in arrays]

    def put_rows(self, *arrays: np.ndarray) -> list[jax.Array]:
        return [_place(x, self.by_row) for x in arrays]

    def put_thresholds(self, score: np.ndarray, item_same: np.ndarray, same: np.ndarray) -> list[jax.Array]:
        return [_place(score, self.by_column), _place(item_same, self.by_column), _place(same, self.by_row)]


@functools.lru_cache(maxsize=8)
def _programs(mesh: Mesh) -> _Programs:
    axes = mesh.axis_names
    whole, by_row, by_column = (NamedSharding(mesh, spec) for spec in (P(), P(axes), P(None, axes)))

    def product(q: jax.Array, q_scale: jax.Array, g: jax.Array, g_scale: jax.Array) -> jax.Array:
        """Cosines (T, T), float32. Mapped by hand so that every device multiplies tiles of one shape."""
        dot = jax.lax.dot_general(q, g, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        return dot * q_scale[:, None] * g_scale[None, :]

    def pick(products: jax.Array, where: jax.Array) -> jax.Array:
        return products[where[0], where[1]]

    def count(
        products: jax.Array, score: jax.Array, item: jax.Array, same: jax.Array, g_score: jax.Array, g_item: jax.Array, g_same: jax.Array
    ):
        """(2, R, T) int32 better and equal along the rows, the same along the columns."""
        return (
            _along(1, products, score, item, g_same),
            _along(0, products, g_score, g_item, same),
        )

    return _Programs(
        product=jax.jit(jax.shard_map(product, mesh=mesh, in_specs=(P(axes), P(axes), P(), P()), out_specs=P(axes))),
        pick=jax.jit(pick, out_shardings=whole),
        count=jax.jit(count, out_shardings=whole),
        whole=whole,
        by_row=by_row,
        by_column=by_column,
    )


def lower_tile(mesh: Mesh, width: int, chunk: int = ACCELERATOR_CHUNK) -> dict[str, jax.stages.Lowered]:
    """Returns the lowered programs of one tile by name: its similarities, and the counts of one relevant item for each row and column."""
    run, rows = _programs(mesh), chunk * mesh.size

    def shape(place: NamedSharding, *sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    def sides(level: NamedSharding, label: NamedSharding, length: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        return shape(level, 1, length), shape(level, 1, length, dtype=jnp.int32), shape(label, length, dtype=jnp.int32)

    tables = shape(run.by_row, rows, width), shape(run.by_row, rows), shape(run.whole, chunk, width), shape(run.whole, chunk)
    counted = shape(run.by_row, rows, chunk), *sides(run.by_column, run.by_row, rows), *sides(run.whole, run.whole, chunk)
    programs: Any = run
    return {"product": programs.product.lower(*tables), "count": programs.count.lower(*counted)}


def tile_side(rows: int) -> int:
    """Returns the side of the tiles in which an accelerator ranks tables of so many rows."""
    return _tile_rows(rows, ACCELERATOR_CHUNK)


def _along(axis: int, products: jax.Array, score: jax.Array, item: jax.Array, candidates: jax.Array) -> jax.Array:
    """(2, R, rows) int32: for each relevant item, candidates above its score, and level with it. Candidates lie along `axis`."""
    candidates = jnp.expand_dims(candidates, 1 - axis)
    real = candidates != NO_ROW
    packed = products.shape[axis] < PACKED

    def one(_: None, relevant: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        level, direction = (jnp.expand_dims(x, axis) for x in relevant)
        same = candidates == direction
        better = (products > level) & real & ~same
        equal = (products == level) & real | same
        if packed:  # both counts in one sum: half the time
            both = jnp.sum(jnp.where(better, 1, jnp.where(equal, PACKED, 0)), axis=axis, dtype=jnp.int32)
            return None, jnp.stack([both % PACKED, both // PACKED])
        return None, jnp.stack([jnp.sum(better, axis=axis, dtype=jnp.int32), jnp.sum(equal, axis=axis, dtype=jnp.int32)])

    return jnp.swapaxes(jax.lax.scan(one, None, (score, item))[1], 0, 1)


def _tile_rows(n: int, chunk: int) -> int:
    """Side, at most `chunk`, of the tiles that cut n rows with the least padding; the largest such.

    Knows no devices: a similarity must not change with their number.
    """
    fewest = -(-n // chunk)
    sides = [min(chunk, -(-n // (blocks * TILE_STEP)) * TILE_STEP) for blocks in range(fewest, fewest + fewest // 2 + 1)]
    return min(sides, key=lambda side: -(-n // side) * side)


def _place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
