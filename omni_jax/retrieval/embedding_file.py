"""Embedding files: one `.npz` of ids and tables, written whole or not at all, read without ever unpickling.

Two forms (SPEC section 9): ours holds `ids` (N,) and one (N, D) array per table; the official one holds one (D,) array per record and table
under `{id}__text`, `{id}__video`, `{id}__audio`, `{id}__av`, `{id}__tv`, `{id}__at`.
"""

from __future__ import annotations

import collections
import contextlib
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np
from etils import epath

from omni_jax.config import TABLES
from omni_jax.types import EmbeddingTable, InputError

IDS = "ids"
SEPARATOR = "__"

PathLike = str | os.PathLike[str]


def check_place(path: PathLike) -> epath.Path:
    """Returns the path, once it is clear that a file can be put there: to be asked before hours of work, not after.

    Raises:
      InputError: when the folder is missing or not writable, or the name is that of a folder.
    """
    target = epath.Path(path)
    if not target.parent.is_dir():
        raise InputError(f"{path}: folder {target.parent} does not exist; create it or choose another output")
    if target.is_dir():
        raise InputError(f"{path} is a folder; name a file")
    if "://" not in str(path) and not os.access(target.parent, os.W_OK):
        raise InputError(f"{path}: folder {target.parent} cannot be written to; choose another output")
    return target


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[IO[bytes]]:
    """Yields a binary file that takes the place of `path` when the block ends well, and leaves nothing behind when it does not.

    Raises:
      InputError: when the folder is missing or cannot be written.
    """
    target = check_place(path)
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(target)
    except OSError as e:
        raise InputError(f"{path}: cannot be written: {e.strerror or e}") from e
    finally:
        partial.unlink(missing_ok=True)


def write_embeddings(path: PathLike, table: EmbeddingTable, official_keys: bool = False) -> None:
    """Writes `table` as float32 `.npz`, atomically.

    Args:
      path: a local or gs:// file, its name taken as it is.
      official_keys: one array per record and table, as the official scorer reads it.

    Raises:
      InputError: for duplicate or empty ids, tables of another shape, or a place that cannot be written.
    """
    _check(table, str(path))
    if official_keys:
        arrays = {
            f"{record}{SEPARATOR}{name}": row for name, rows in table.tables.items() for record, row in zip(table.ids, rows, strict=True)
        }
    else:
        arrays = {IDS: np.array(table.ids, dtype=np.str_), **table.tables}
    # np.savez takes names as keywords and would refuse a record called "file".
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in arrays.items():
            value = array if name == IDS else np.ascontiguousarray(array, dtype=np.float32)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, value, allow_pickle=False)


def read_embeddings(path: PathLike | Sequence[PathLike]) -> EmbeddingTable:
    """Returns the embeddings of one file, or of several parts of one set joined in the order given, as float32.

    Tables come in the order of `config.TABLES`.

    Raises:
      InputError: for a file that is missing, truncated, no `.npz`, or pickled; ids that are missing, doubled (also across parts) or
        do not fit the tables; parts with different tables or widths.
    """
    paths = [path] if isinstance(path, str | os.PathLike) else list(path)
    if not paths:
        raise InputError("no embedding file was given")
    parts = [_read_one(p) for p in paths]
    first = parts[0]
    home: dict[str, PathLike] = {}
    for p, part in zip(paths, parts, strict=True):
        if part.tables.keys() != first.tables.keys():
            raise InputError(
                f"{p} holds the tables {', '.join(part.tables)}, but {paths[0]} holds {', '.join(first.tables)}; parts must agree"
            )
        for name, rows in part.tables.items():
            if rows.shape[1] != first.tables[name].shape[1]:
                width, other = rows.shape[1], first.tables[name].shape[1]
                raise InputError(f"{p}: table {name!r} is {width} wide, but {other} in {paths[0]}; parts must come from one model")
        for record in part.ids:
            if record in home:
                raise InputError(f"id {record!r} stands in {home[record]} and again in {p}; give each part once")
            home[record] = p
    if len(parts) == 1:
        return first
    return EmbeddingTable(tuple(home), {name: np.concatenate([part.tables[name] for part in parts]) for name in first.tables})


def _read_one(path: PathLike) -> EmbeddingTable:
    arrays = _load(path)
    if IDS in arrays:
        table = _from_ours(arrays, str(path))
    else:
        table = _from_official(arrays, str(path))
    _check(table, str(path))
    return table


def _load(path: PathLike) -> dict[str, np.ndarray]:
    file = epath.Path(path)
    if file.is_dir():
        raise InputError(f"{path} is a folder; name an .npz file")
    if not file.exists():
        raise InputError(f"{path}: no such file")
    try:
        with file.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            names = archive.namelist()
            doubled = [name for name, times in collections.Counter(names).items() if times > 1]
            if doubled:
                raise InputError(f"{path}: {', '.join(doubled[:3])} stands more than once; write the file again")
            arrays = {}
            for name in names:
                with archive.open(name) as member:
                    arrays[name.removesuffix(".npy")] = np.lib.format.read_array(member, allow_pickle=False)
            return arrays
    except zipfile.BadZipFile as e:
        raise InputError(f"{path}: truncated or not an .npz file ({e}); write it again") from e
    except (ValueError, EOFError, MemoryError, RuntimeError, zlib.error) as e:
        raise InputError(
            f"{path}: cannot be read as arrays ({' '.join(str(e).split()) or type(e).__name__}); pickled content is never loaded"
        ) from e
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror or e}") from e


def _from_ours(arrays: dict[str, np.ndarray], path: str) -> EmbeddingTable:
    ids = arrays.pop(IDS)
    if ids.ndim != 1 or ids.dtype.kind not in "USiu":
        raise InputError(f"{path}: 'ids' is {ids.dtype} {ids.shape}; expected one text or whole number per record")
    unknown = [name for name in arrays if name not in TABLES]
    if unknown:
        raise InputError(f"{path}: unknown table {unknown[0]!r}; the tables are {', '.join(TABLES)}")
    if not arrays:
        raise InputError(f"{path}: no tables beside 'ids'; expected some of {', '.join(TABLES)}")
    try:
        names = tuple(i.decode() if isinstance(i, bytes) else str(i) for i in ids.tolist())
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: 'ids' is not UTF-8 text ({e.reason})") from e
    return EmbeddingTable(names, {name: _float32(arrays[name], name, path) for name in TABLES if name in arrays})


def _from_official(arrays: dict[str, np.ndarray], path: str) -> EmbeddingTable:
    rows: dict[str, dict[str, Any]] = {name: {} for name in TABLES}
    for key, value in arrays.items():
        record, separator, name = key.rpartition(SEPARATOR)
        if not separator or name not in TABLES:
            raise InputError(f"{path}: no 'ids' array, and {key!r} is not of the form ID__TABLE with one of {', '.join(TABLES)}")
        rows[name][record] = value.reshape(-1) if value.ndim == 2 and value.shape[0] == 1 else value
    present = {name: found for name, found in rows.items() if found}
    if not present:
        raise InputError(f"{path}: holds no embeddings")
    ids = tuple(dict.fromkeys(record for found in present.values() for record in found))
    tables = {}
    for name, found in present.items():
        absent = [record for record in ids if record not in found]
        if absent:
            raise InputError(f"{path}: {len(absent)} records have no {name!r} embedding: {_first(absent)}; drop them or embed them again")
        shapes = {record: value.shape for record, value in found.items()}
        odd = [record for record in ids if len(shapes[record]) != 1 or shapes[record] != shapes[ids[0]]]
        if odd:
            raise InputError(
                f"{path}: {odd[0]}{SEPARATOR}{name} has shape {shapes[odd[0]]}; expected one vector of the width of the others"
            )
        tables[name] = _float32(np.stack([found[record] for record in ids]), name, path)
    return EmbeddingTable(ids, tables)


def _float32(array: np.ndarray, name: str, path: str) -> np.ndarray:
    if array.dtype.kind != "f":
        raise InputError(f"{path}: table {name!r} holds {array.dtype}; expected floating point numbers (float32)")
    return np.ascontiguousarray(array, dtype=np.float32)


def _check(table: EmbeddingTable, path: str) -> None:
    if len(set(table.ids)) != len(table.ids):
        seen: set[str] = set()
        twice = list(dict.fromkeys(i for i in table.ids if i in seen or seen.add(i)))
        raise InputError(f"{path}: {len(twice)} ids stand more than once: {_first(twice)}; every record may be given once")
    if "" in table.ids:
        raise InputError(f"{path}: record {table.ids.index('')} has an empty id")
    for name, rows in table.tables.items():
        if name not in TABLES:
            raise InputError(f"{path}: unknown table {name!r}; the tables are {', '.join(TABLES)}")
        if rows.ndim != 2 or len(rows) != len(table.ids):
            raise InputError(f"{path}: table {name!r} has shape {rows.shape} for {len(table.ids)} ids; expected one row per id")


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
