"""Compiled programs that turn an `EncoderBatch` into embeddings.

Each tower and the decoder is one program per static shape. Tower outputs are written into a media table on the device, which the decoder
programs read; the table's capacity is a power of two that only grows, so that it does not multiply the number of programs.

Letters: N items, R rows, K prompts per row, D LLM width, M media tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh

from omni_jax.config import TABLES
from omni_jax.model.attention import choose_for
from omni_jax.model.encoder import Encoder
from omni_jax.parallel import compiler_options, computing_in, sharding
from omni_jax.towers import Tower, towers_of
from omni_jax.types import EncoderBatch, RowBatch

ROWS = tuple(field.name for field in dataclasses.fields(RowBatch))

# Host or device arrays of one tower batch, in the order of its record.
Arrays = tuple[jax.Array, ...]


class Runner:
    """Runs batches through an encoder on one device or a mesh.

    Attributes:
      programs: compiled programs so far, one string each: what and which shapes.
      compiling: called with a program's name before it is compiled; None: nothing is called.
    """

    def __init__(self, encoder: Encoder, mesh: Mesh | AbstractMesh | None = None, attention: str = "auto"):
        kernel = choose_for(attention, mesh)
        graph, params = nnx.split(encoder)
        self._mesh = mesh
        self._params = params if mesh is None else place_params(params, mesh)
        self._width = encoder.config.decoder.hidden_size
        self._dtype = encoder.dtype
        self._table: jax.Array | None = None
        self._no_media: jax.Array | None = None
        self.programs: list[str] = []
        self.compiling: Callable[[str], None] | None = None

        def program(name: str, function: Callable[..., Any], **options: Any) -> Any:
            def traced(params: Any, *args: Any, **kwargs: Any) -> Any:
                # Python runs this once per compilation, never when a compiled program is reused.
                self.programs.append(f"{name} {[tuple(x.shape) for x in jax.tree.leaves(args)]}")
                if self.compiling is not None:
                    self.compiling(name)
                model: Encoder = nnx.merge(graph, params)
                return function(model, *args, **kwargs)

            return jax.jit(traced, compiler_options=compiler_options(mesh), **options)

        def write(table: jax.Array, offset: jax.Array, tokens: jax.Array) -> jax.Array:
            rows = tokens.reshape(-1, tokens.shape[-1]).astype(table.dtype)
            return jax.lax.dynamic_update_slice(table, rows, (offset, jnp.zeros((), offset.dtype)))

        def media(tower: Tower) -> Any:
            def run(model: Encoder, table: jax.Array, offset: jax.Array, batch: Arrays, tokens: int) -> jax.Array:
                return write(table, offset, tower.media_tokens(model, batch, tokens))

            return program(tower.name, run, donate_argnums=1, static_argnames="tokens")

        def rows(model: Encoder, table: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return model.embed_rows(RowBatch(**batch), table, attention=kernel)

        self._media = {tower: media(tower) for tower in towers_of(encoder.config)}
        self._rows = program("rows", rows)

    @property
    def params(self) -> dict[Any, jax.Array]:
        """Every parameter, as placed on the devices."""
        return {tuple(path): slot.get_raw_value() for path, slot in nnx.to_flat_state(self._params)}

    def assign(self, params: Mapping[Any, jax.Array]) -> None:
        """Takes other parameters of the same shapes, types and places; nothing is compiled again."""
        flat = nnx.to_flat_state(self._params)
        self._params = nnx.from_flat_state([(path, slot.replace(params[path])) for path, slot in flat])

    def embed(self, batch: EncoderBatch, text_head: str = "last") -> Iterator[tuple[int, str, np.ndarray]]:
        """Starts every program of a batch; the iterator yields (clip of the batch, table name, embedding (D,) float32, not normalised).

        Devices work while the caller prepares and starts the next batch; only reading the iterator waits.

        Args:
          text_head: "last" takes the `text` table from the last layer, "fused" from the fusion head.
        """
        table = self._filled_table(batch)
        return _collect(batch.owners, [self._run_rows(rows, table) for rows in batch.rows], text_head)

    def lower(self, batch: EncoderBatch, platform: str | None = None) -> dict[str, jax.stages.Lowered]:
        """Returns the lowered programs of a batch by name, arrays may be shapes: for compiling ahead and for reading what they need.

        Args:
          platform: lowers for another one ("tpu") than the mesh's or the default device's.
        """
        calls = self._calls(batch)
        tokens = sum(arrays[0].shape[0] * each for _, arrays, each in calls)
        table, offset = self._shape((_capacity(tokens), self._width), self._dtype, (None, None)), jax.ShapeDtypeStruct((), np.int32)

        def split(*arrays: Any) -> tuple[Any, ...]:
            return tuple(self._shape(a.shape, a.dtype, ("batch", *[None] * (a.ndim - 1))) for a in arrays)

        with computing_in(self._dtype, self._mesh):
            platforms = None if platform is None else (platform,)
            traced = {t.name: self._media[t].trace(self._params, table, offset, split(*arrays), tokens=each) for t, arrays, each in calls}
            for rows in batch.rows:
                arrays = dict(zip(ROWS, split(*(getattr(rows, name) for name in ROWS)), strict=True))
                traced["rows"] = self._rows.trace(self._params, table, arrays)
            return {name: one.lower(lowering_platforms=platforms) for name, one in traced.items()}

    def _filled_table(self, batch: EncoderBatch) -> jax.Array:
        """Runs the towers, and returns the table with the batch's media tokens in `EncoderBatch` order.

        Captions alone have one that does not grow with the media of other batches, so that their programs are compiled once.
        """
        calls = self._calls(batch)
        if not calls:
            self._no_media = self._zeros(0) if self._no_media is None else self._no_media
            return self._no_media
        self._reserve(sum(arrays[0].shape[0] * each for _, arrays, each in calls))
        offset = 0
        with computing_in(self._dtype, self._mesh):
            for tower, arrays, each in calls:
                self._table = self._media[tower](self._params, self._table, np.int32(offset), self._place(arrays), tokens=each)
                offset += arrays[0].shape[0] * each
        assert self._table is not None
        return self._table

    def _calls(self, batch: EncoderBatch) -> list[tuple[Tower, tuple[Any, ...], int]]:
        """Returns (tower, what its program takes, tokens of each item) of every tower batch, in the order of the media table."""
        return [(tower, tower.arrays(one), tower.made(one)) for tower in self._media for one in getattr(batch, tower.name)]

    def _run_rows(self, rows: RowBatch, table: jax.Array) -> tuple[jax.Array, jax.Array]:
        arrays = dict(zip(ROWS, self._place(tuple(getattr(rows, name) for name in ROWS)), strict=True))
        with computing_in(self._dtype, self._mesh):
            return self._rows(self._params, table, arrays)

    def _reserve(self, tokens: int) -> None:
        if self._table is None or self._table.shape[0] < tokens:
            # A larger table compiles every program of media again: the first batch gets one with room for others twice its size.
            self._table = self._zeros(tokens)

    def _zeros(self, tokens: int) -> jax.Array:
        return self._put(np.zeros((_capacity(tokens), self._width), self._dtype), (None, None))

    def _place(self, arrays: tuple[np.ndarray, ...]) -> tuple[jax.Array, ...]:
        """Puts arrays on the devices, split along their first axis."""
        return tuple(self._put(a, ("batch", *[None] * (a.ndim - 1))) for a in arrays)

    def _put(self, array: np.ndarray, axes: tuple[str | None, ...]) -> jax.Array:
        return jnp.asarray(array) if self._mesh is None else jax.device_put(array, sharding(axes, array.shape, self._mesh))

    def _shape(self, shape: tuple[int, ...], dtype: Any, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=None if self._mesh is None else sharding(axes, shape, self._mesh))


def _capacity(tokens: int) -> int:
    """Rows of a media table for a first batch of so many tokens."""
    return 1 << max(6, (2 * tokens - 1).bit_length())


def place_params(params: nnx.State, mesh: Mesh | AbstractMesh) -> nnx.State:
    """Returns the parameters on the devices of a mesh, split by their logical axes; of shapes, shapes that say so."""

    def place(p: nnx.Variable) -> Any:
        where = sharding(p.get_metadata()["axes"], p.shape, mesh)
        value = p.get_raw_value()
        if isinstance(value, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=where)
        return jax.device_put(value, where)

    return nnx.from_flat_state([(path, p.replace(place(p))) for path, p in nnx.to_flat_state(params)])


def _on_host(array: jax.Array) -> np.ndarray:
    """Returns the whole array, also where other processes hold parts of it."""
    if not array.is_fully_addressable and not array.is_fully_replicated:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def _collect(
    owners: tuple[np.ndarray, ...], results: list[tuple[jax.Array, jax.Array]], text_head: str
) -> Iterator[tuple[int, str, np.ndarray]]:
    for owner, (fused, last) in zip(owners, results, strict=True):
        fused, last = _on_host(fused), _on_host(last)
        for r, k in np.argwhere(owner[..., 0] >= 0):
            clip, table = owner[r, k]
            name = TABLES[table]
            yield int(clip), name, (last if name == "text" and text_head == "last" else fused)[r, k]
