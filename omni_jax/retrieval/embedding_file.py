"""Embedding files: one `.npz` of ids and tables, written whole or not at all, read without ever unpickling.

Three forms (SPEC section 9). Ours holds `ids` (N,) and one (N, D) array per table; a table of fewer records stands beside its own
`{table}_ids`; a table may be int8 beside a `{table}_scale` (N,), as
`omni-jax export --to int8` writes it. The official one holds one (D,) array per record and table under `{id}__text`, `{id}__video`,
`{id}__audio`, `{id}__av`, `{id}__tv`, `{id}__at`. The published scorer's holds `text_embeds` and `mllm_embeds`, each (N, D).
"""

from __future__ import annotations

import collections
import contextlib
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
from etils import epath

from omni_jax.config import TABLES
from omni_jax.types import EmbeddingTable, InputError

IDS = "ids"
SEPARATOR = "__"
SCALE = "_scale"
OWN_IDS = "_ids"
TEXT_EMBEDS, MEDIA_EMBEDS = "text_embeds", "mllm_embeds"
MEDIA_TABLE = "av"  # what `mllm_embeds` holds unless it is said otherwise
ALIGNMENT = 64  # bytes; a CPU backend reads an array that starts so without copying it
BLOCK = 1 << 20  # bytes read together

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
            f"{record}{SEPARATOR}{name}": row
            for name, rows in table.tables.items()
            for record, row in zip(table.ids_of(name), rows, strict=True)
        }
    else:
        arrays = {IDS: np.array(table.ids, dtype=np.str_), **own_ids(table), **table.tables}
    write_members(
        path, {name: array if array.dtype.kind == "U" else np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()}
    )


def own_ids(table: EmbeddingTable) -> dict[str, np.ndarray]:
    """Returns the members that hold the ids of tables of fewer records."""
    return {name + OWN_IDS: np.array(ids, dtype=np.str_) for name, ids in table.own.items()}


def write_members(path: PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an `.npz` of these arrays, atomically.

    Raises:
      InputError: for a place that cannot be written.
    """
    # np.savez takes names as keywords and would refuse a record called "file".
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


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
    whole = {name: all(name not in part.own for part in parts) for name in first.tables}
    own = {name: tuple(i for part in parts for i in part.ids_of(name)) for name in first.tables if not whole[name]}
    return EmbeddingTable(tuple(home), {name: np.concatenate([part.tables[name] for part in parts]) for name in first.tables}, own=own)


def _read_one(path: PathLike) -> EmbeddingTable:
    arrays = load_arrays(path)
    if MEDIA_EMBEDS in arrays or TEXT_EMBEDS in arrays:
        table = from_two_arrays(arrays, str(path))
    elif IDS in arrays:
        table = _from_ours(arrays, str(path))
    else:
        table = _from_official(arrays, str(path))
    _check(table, str(path))
    return table


def load_arrays(path: PathLike) -> dict[str, np.ndarray]:
    """Returns the arrays of an `.npz` file by name, none of them unpickled.

    Raises:
      InputError: for a file that is missing, truncated, no `.npz`, or pickled, or holds a name twice.
    """
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
                    arrays[name.removesuffix(".npy")] = read_array(member)
            return arrays
    except zipfile.BadZipFile as e:
        raise InputError(f"{path}: truncated or not an .npz file ({e}); write it again") from e
    except (ValueError, EOFError, MemoryError, RuntimeError, zlib.error) as e:
        raise InputError(
            f"{path}: cannot be read as arrays ({' '.join(str(e).split()) or type(e).__name__}); pickled content is never loaded"
        ) from e
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror or e}") from e


def read_array(file: IO[bytes]) -> np.ndarray:
    """Returns the array of an open `.npy` file, its rows aligned for the CPU backend.

    Raises:
      ValueError, EOFError: for a file that holds no plain array, or not all of it.
    """
    version = np.lib.format.read_magic(file)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if header is None:
        raise ValueError(f"array format {version[0]}.{version[1]}")
    shape, by_column, dtype = header(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + ALIGNMENT, np.uint8)
    flat = room[-room.ctypes.data % ALIGNMENT :][:size]
    for start in range(0, size, BLOCK):
        block = flat[start : start + BLOCK]
        data = file.read(len(block))
        if len(data) < len(block):
            raise EOFError("the array ends early")
        block[:] = np.frombuffer(data, np.uint8)
    if file.read(1):  # also makes a zip member check its sum
        raise ValueError("more values than the header says")
    return flat.view(dtype).reshape(shape, order="F" if by_column else "C")


def from_two_arrays(arrays: Mapping[str, Any], path: str, media: str = MEDIA_TABLE) -> EmbeddingTable:
    """Returns the tables of the published scorer's form: `text_embeds` (N, D), `mllm_embeds` (N, D) and, optionally, `ids` (N,).

    Without ids the records are called by their row numbers.

    Args:
      media: table that `mllm_embeds` becomes.

    Raises:
      InputError: for a missing array, arrays of unequal length or no table shape.
    """
    absent = [key for key in (TEXT_EMBEDS, MEDIA_EMBEDS) if key not in arrays]
    if absent:
        raise InputError(f"{path}: has no {absent[0]!r}; a file of two arrays holds {TEXT_EMBEDS!r} and {MEDIA_EMBEDS!r}")
    tables = {}
    for name, key in (("text", TEXT_EMBEDS), (media, MEDIA_EMBEDS)):
        rows = arrays[key]
        if not isinstance(rows, np.ndarray) or rows.ndim != 2:
            raise InputError(f"{path}: {key!r} is {getattr(rows, 'shape', type(rows).__name__)}; expected an array (records, width)")
        tables[name] = float32_rows(rows, key, path)
    (a, b), (width, other) = zip(*(rows.shape for rows in tables.values()), strict=True)
    if a != b or width != other:
        raise InputError(
            f"{path}: {TEXT_EMBEDS!r} is {a} x {width} and {MEDIA_EMBEDS!r} {b} x {other}; row i of both must be record i, of one model"
        )
    ids = id_names(np.asarray(arrays[IDS]), path) if IDS in arrays else tuple(map(str, range(a)))
    table = EmbeddingTable(ids, tables)
    _check(table, path)
    return table


def id_names(ids: np.ndarray, path: str) -> tuple[str, ...]:
    """Returns record ids as text.

    Raises:
      InputError: when they are neither text nor whole numbers.
    """
    if ids.ndim != 1 or ids.dtype.kind not in "USiu":
        raise InputError(f"{path}: 'ids' is {ids.dtype} {ids.shape}; expected one text or whole number per record")
    try:
        return tuple(i.decode() if isinstance(i, bytes) else str(i) for i in ids.tolist())
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: 'ids' is not UTF-8 text ({e.reason})") from e


def _from_ours(arrays: dict[str, np.ndarray], path: str) -> EmbeddingTable:
    names = id_names(arrays.pop(IDS), path)
    own = {name: id_names(arrays.pop(name + OWN_IDS), path) for name in TABLES if name + OWN_IDS in arrays}
    scales = {name: arrays.pop(name + SCALE) for name in TABLES if name in arrays and name + SCALE in arrays}
    unknown = [name for name in arrays if name not in TABLES]
    if unknown:
        raise InputError(f"{path}: unknown table {unknown[0]!r}; the tables are {', '.join(TABLES)}")
    if not arrays:
        raise InputError(f"{path}: no tables beside 'ids'; expected some of {', '.join(TABLES)}")
    for name, scale in scales.items():
        if arrays[name].dtype != np.int8 or scale.dtype.kind != "f" or scale.shape != arrays[name].shape[:1]:
            raise InputError(f"{path}: table {name!r} and its scales do not fit together; export the file again")
        arrays[name] = arrays[name].astype(np.float32) * scale[:, None].astype(np.float32)
    tables = {name: float32_rows(arrays[name], name, path) for name in TABLES if name in arrays}
    return EmbeddingTable(names, tables, own={name: ids for name, ids in own.items() if name in tables})


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
        tables[name] = float32_rows(np.stack([found[record] for record in ids]), name, path)
    return EmbeddingTable(ids, tables)


def float32_rows(array: np.ndarray, name: str, path: str) -> np.ndarray:
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
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
        ids = table.ids_of(name)
        if rows.ndim != 2 or len(rows) != len(ids):
            raise InputError(f"{path}: table {name!r} has shape {rows.shape} for {len(ids)} ids; expected one row per id")
        if ids is not table.ids and (len(set(ids)) != len(ids) or not set(ids) <= set(table.ids)):
            raise InputError(f"{path}: the ids of table {name!r} are no part of those of the file; write it again")


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
