"""Embedding tables as Parquet: a column of ids, a column of fixed-size lists for each table, captions and paths, what made the vectors.

A record that a table lacks is null there. What the vectors were made with is in the metadata of the file under `omni_jax`, as JSON.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from omni_jax.config import TABLES
from omni_jax.io.messages import line_of
from omni_jax.retrieval.npz import PathLike, output_file
from omni_jax.types import EmbeddingTable, InputError

SUFFIX = ".parquet"
ID, METADATA = "id", b"omni_jax"
BLOCK = 8192  # rows of a row group


def write_columns(path: PathLike, table: EmbeddingTable, made_with: str, texts: Mapping[str, Sequence[str | None]]) -> None:
    """Writes tables as float32, atomically, a block of rows at a time.

    Args:
      made_with: kept as it is, for `load_columns`.
      texts: name -> a text or None of each record, columns of their own.

    Raises:
      InputError: when pyarrow is not installed, or for a place that cannot be written.
    """
    pa, pq = _pyarrow()
    widths = {name: rows.shape[1] for name, rows in table.tables.items()}
    fields = [pa.field(ID, pa.string(), nullable=False), *(pa.field(name, pa.string()) for name in texts)]
    fields += [pa.field(name, pa.list_(pa.float32(), width)) for name, width in widths.items()]
    schema = pa.schema(fields, {METADATA: made_with.encode()} if made_with else None)
    rows_of = {name: {record: n for n, record in enumerate(ids)} for name, ids in table.own.items()}
    # Vectors are noise to a compressor, and no two of them are the same.
    with output_file(path) as file, pq.ParquetWriter(file, schema, compression="none", use_dictionary=False) as writer:
        for start in range(0, len(table.ids), BLOCK):
            ids = table.ids[start : start + BLOCK]
            columns = [pa.array(ids, pa.string())]
            columns += [pa.array(column[start : start + BLOCK], pa.string()) for column in texts.values()]
            for name, rows in table.tables.items():
                if name in rows_of:
                    numbers = np.array([rows_of[name].get(record, -1) for record in ids])
                    block, lacking = rows[numbers], pa.array(numbers < 0)
                else:
                    block, lacking = rows[start : start + BLOCK], None
                flat = pa.array(np.ascontiguousarray(block, np.float32).reshape(-1))
                columns.append(pa.FixedSizeListArray.from_arrays(flat, widths[name], mask=lacking))
            writer.write_batch(pa.record_batch(columns, schema=schema))


def load_columns(path: PathLike, wanted: Callable[[list[str]], Collection[str]] | None = None) -> tuple[dict[str, Any], str]:
    """Returns what `npz.load_arrays` does of our own form: ids, tables and `TABLE_ids` by name, and what the vectors were made with.

    Columns of other names than `id` and those of the tables are not read. Lists may be of any size that is the same in all rows, and of
    any floating point type.

    Raises:
      InputError: when pyarrow is not installed, or for a file that is missing, truncated, no Parquet file, or has no such columns.
    """
    pa, pq = _pyarrow()
    source = epath.Path(path)
    if not source.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with source.open("rb") as stream, pq.ParquetFile(stream) as file:
            names = [ID, *(name for name in TABLES if name in file.schema_arrow.names)]
            if ID not in file.schema_arrow.names:
                raise InputError(f"{path}: has no column {ID!r}; it has {', '.join(file.schema_arrow.names[:8])}")
            if wanted is not None:
                chosen = wanted(["ids", *names[1:]])
                names = [name for name in names if name == ID or name in chosen]
            made_with = (file.schema_arrow.metadata or {}).get(METADATA, b"").decode()
            return _arrays(path, names, file.iter_batches(BLOCK, columns=names)), made_with
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeDecodeError, ValueError) as e:
        raise InputError(f"{path}: truncated or not a Parquet file of embeddings ({line_of(e)})") from e
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror or line_of(e)}") from e


def _arrays(path: PathLike, names: Sequence[str], batches: Iterator[Any]) -> dict[str, Any]:
    ids: list[Any] = []
    rows: dict[str, list[np.ndarray]] = {name: [] for name in names if name != ID}
    having: dict[str, list[np.ndarray]] = {name: [] for name in rows}
    for batch in batches:
        ids += batch.column(ID).to_pylist()
        for name in rows:
            column = batch.column(name)
            there = np.asarray(column.is_valid())
            having[name].append(there)
            if there.any():
                rows[name].append(_block(path, name, column.drop_null()))
    if None in ids:
        raise InputError(f"{path}: row {ids.index(None)} has no {ID}; every record needs one")
    found: dict[str, Any] = {"ids": np.array(ids) if ids else np.array([], np.str_)}
    for name, blocks in rows.items():
        if len({block.shape[1] for block in blocks}) > 1:
            raise InputError(f"{path}: the lists of column {name!r} differ in size; a table has one width")
        if not blocks:
            continue
        found[name] = np.concatenate(blocks)
        there = np.concatenate(having[name])
        if not there.all():
            found[f"{name}_ids"] = found["ids"][there]
    return found


def _block(path: PathLike, name: str, column: Any) -> np.ndarray:
    """The lists of a column as rows (N, D)."""
    if not str(column.type).startswith(("fixed_size_list", "list", "large_list")):
        raise InputError(f"{path}: column {name!r} is {column.type}; a table is a column of lists of floating point numbers")
    values = column.flatten().to_numpy(zero_copy_only=False)
    width, rest = divmod(len(values), len(column))
    sizes = column.value_lengths()
    if rest or not width or any(size != width for size in set(np.asarray(sizes).tolist())):
        raise InputError(f"{path}: the lists of column {name!r} differ in size; a table has one width")
    return values.reshape(len(column), width)


def _pyarrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as e:
        raise InputError("pyarrow is not installed; run pip install 'omni-jax[parquet]', or use .npz files") from e
