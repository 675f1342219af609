"""Embedding files: one `.npz` of ids and tables, written whole or not at all, read without ever unpickling.

Three forms (SPEC section 9). Ours holds `ids` (N,) and one (N, D) array per table; a table of fewer records comes with its own
`{table}_ids`; a table may be int8 beside a `{table}_scale` (N,), as
`omni-jax export --to int8` writes it. The official one holds one (D,) array per record and table under `{id}__text`, `{id}__video`,
`{id}__audio`, `{id}__av`, `{id}__tv`, `{id}__at`. The published scorer's holds `text_embeds` and `mllm_embeds`, each (N, D).

A set of parts is one table in several files, `NAME-IIIII-of-NNNNN.npz`, which `NAME.npz` names together. Above STAY bytes the rows of local
files stay on disk and are read a block at a time (`stored_rows`).

What the vectors were made with is kept as JSON in a member `made_with` of ours; in the official form, whose readers may take every member
for a vector, in the archive's comment. A Parquet file (`omni_jax.retrieval.parquet`) is read as ours is.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from etils import epath

from omni_jax.config import TABLES
from omni_jax.config.made_with import ROUNDING, listed, made_otherwise
from omni_jax.io.messages import MALFORMED, as_input_error, some
from omni_jax.io.remote import reaching
from omni_jax.retrieval.npz import PathLike, load_arrays, write_members
from omni_jax.retrieval.parquet import SUFFIX, load_columns
from omni_jax.retrieval.stored_rows import StoredRows
from omni_jax.types import EmbeddingTable, InputError

IDS = "ids"
MADE_WITH = "made_with"
SEPARATOR = "__"
NPZ = ".npz"
SCALE = "_scale"
OWN_IDS = "_ids"
TEXT_EMBEDS, MEDIA_EMBEDS = "text_embeds", "mllm_embeds"
MEDIA_TABLE = "av"  # what `mllm_embeds` holds unless it is said otherwise

STAY = 1 << 30  # bytes of files whose tables are not loaded

_PART = re.compile(r"-(\d{5})-of-(\d{5})$")

Choose = Callable[[Collection[str]], str]


def write_embeddings(path: PathLike, table: EmbeddingTable, official_keys: bool = False, settings: str = "") -> None:
    """Writes `table` as float32 `.npz`, atomically.

    Args:
      path: a local or gs:// file, its name taken as it is.
      official_keys: one array per record and table, as the official scorer reads it.
      settings: a digest of all that the file depends on, for `finished`; not in the official form.

    Raises:
      InputError: for duplicate or empty ids, tables of another shape, or a place that cannot be written.
    """
    _check(table, str(path))
    tables = {n: rows if isinstance(rows, StoredRows) else np.ascontiguousarray(rows, np.float32) for n, rows in table.tables.items()}
    if official_keys:
        rows = {
            f"{record}{SEPARATOR}{name}": row for name, rows in tables.items() for record, row in zip(table.ids_of(name), rows, strict=True)
        }
        write_members(path, rows, _written_origin(table))
    else:
        write_members(path, {IDS: np.array(table.ids, dtype=np.str_), **own_ids(table), **origin_member(table, settings), **tables})


def finished(path: PathLike, settings: str) -> int | None:
    """Returns how many records a file has, where it was written with these settings; None where it was not, or does not exist."""
    try:
        found, _ = load_arrays(path, lambda names: {IDS, MADE_WITH} & set(names), mapped=True)
        return len(found[IDS]) if json.loads(str(found[MADE_WITH]))["settings"] == settings else None
    except (InputError, ValueError, KeyError, TypeError):
        return None


def own_ids(table: EmbeddingTable) -> dict[str, np.ndarray]:
    """Returns the members that hold the ids of tables of fewer records."""
    return {name + OWN_IDS: np.array(ids, dtype=np.str_) for name, ids in table.own.items()}


def origin_member(table: EmbeddingTable, settings: str = "") -> dict[str, np.ndarray]:
    """Returns the member of our form that says what a table was made with, or none."""
    written = _written_origin(table, same=table.same, settings=settings)  # an archive's comment, where other forms have it, holds 64 kB
    return {MADE_WITH: np.array(written)} if written else {}


def read_embeddings(path: PathLike | Sequence[PathLike], choose: Choose | None = None) -> EmbeddingTable:
    """Returns the embeddings of one file, or of several parts of one set joined in the order given, as float32.

    Tables come in the order of `config.TABLES`.

    Args:
      choose: picks one table by the names of those there are; only that one is read, mapped into memory where that is possible.

    The rows of files of over STAY bytes together stay on disk (`stored_rows.StoredRows`), where these are local, uncompressed and `.npz`.

    Raises:
      InputError: for a file that is missing, truncated, no `.npz`, or pickled; ids that are missing, doubled (also across parts) or
        do not fit the tables; parts of different widths, or made with different models or settings.
    """
    paths = whole_set(path)
    if not paths:
        raise InputError("no embedding file was given")
    stay = all("://" not in os.fspath(p) and os.path.isfile(p) for p in paths) and sum(os.path.getsize(p) for p in paths) > STAY
    if choose is not None and len(paths) > 1:
        there = {name for p in paths for name in _tables_in(p)}
        choose = functools.partial(_the, choose([name for name in TABLES if name in there]))
    parts = [_read_one(p, choose, stay) for p in paths]
    first = parts[0]
    other, others = first_known(zip(paths, parts, strict=True))
    home: dict[str, PathLike] = {}
    widths: dict[str, tuple[int, PathLike]] = {}
    for p, part in zip(paths, parts, strict=True):
        for name, rows in part.tables.items():
            width, where = widths.setdefault(name, (rows.shape[1], p))
            if rows.shape[1] != width:
                raise InputError(f"{p}: table {name!r} is {rows.shape[1]} wide, but {width} in {where}; parts must come from one model")
        if part.of != first.of:
            raise InputError(f"{p}: is of a set of {part.of} parts, {paths[0]} of a set of {first.of}; give the parts of one set")
        check_alike(p, part.made_with, other, others, ROUNDING)
        for record in part.ids:
            if record in home:
                raise InputError(
                    f"id {record!r} is in {home[record]} and again in {p}; give each part once, and files of one table each as TABLE=FILE"
                )
            home[record] = p
    if len(parts) == 1:
        return first
    # Of a manifest whose records differ in what they have, a part may have no record for a table.
    having = {name: [part for part in parts if name in part.tables] for name in TABLES if name in widths}
    own = {
        name: tuple(i for part in those for i in part.ids_of(name))
        for name, those in having.items()
        if len(those) < len(parts) or any(name in part.own for part in those)
    }
    joined = EmbeddingTable(
        tuple(home),
        {name: _concatenated([part.tables[name] for part in those]) for name, those in having.items()},
        own=own,
        named=all(part.named for part in parts),
        made_with=first.made_with if all(part.made_with is not None for part in parts) else None,
        parts=tuple(sorted({n for part in parts for n in part.parts})),
        of=first.of,
    )
    for name in joined.tables:
        _one_row_a_prompt(joined, name, parts)
    return joined


def whole_set(path: PathLike | Sequence[PathLike]) -> list[PathLike]:
    """Returns the files of one path or several; the name of a set, `NAME.npz`, stands for its parts where there is no such file."""
    found: list[PathLike] = []
    for given in [path] if isinstance(path, str | os.PathLike) else path:
        file = epath.Path(given)
        with reaching(given):
            known = file.suffix != NPZ or file.exists()
            parts = [] if known else sorted(p for p in file.parent.glob(f"{file.stem}-*-of-*{NPZ}") if _PART.sub("", p.stem) == file.stem)
        found += parts or [given]
    return found


def part_path(path: epath.Path, number: int, of: int) -> epath.Path:
    """Returns the file of a part of a set, numbered from 0; the path itself where there is one part."""
    return path if of == 1 else path.with_name(f"{path.stem}-{number:05}-of-{of:05}{NPZ}")


def _concatenated(tables: Sequence[Any]) -> Any:
    tables = [rows for rows in tables if len(rows)] or tables[:1]
    if all(isinstance(rows, StoredRows) for rows in tables):
        return StoredRows.joined(tables)
    return np.concatenate([np.asarray(rows) for rows in tables])


def _one_row_a_prompt(joined: EmbeddingTable, name: str, parts: Sequence[EmbeddingTable]) -> None:
    """Gives records of several parts that have the same prompt for a table the row of the first of them."""
    same = {record: key for part in parts for record, key in part.same.get(name, {}).items()}
    if not same:
        return
    place = {record: n for n, record in enumerate(joined.ids_of(name))}
    row_of: dict[str, int] = {}
    by = {place[record]: row_of.setdefault(key, place.get(key, place[record])) for record, key in same.items() if record in place}
    tables: dict[str, Any] = joined.tables
    rows = tables[name]
    if isinstance(rows, StoredRows):
        tables[name] = StoredRows.joined([rows], by)
    else:
        rows[list(by)] = rows[list(by.values())]


def first_known(files: Iterable[tuple[PathLike, EmbeddingTable]]) -> tuple[PathLike, Mapping[str, Any] | None]:
    """Returns the first file that says what it was made with, and what that is; ("", None) where none does."""
    return next(((path, table.made_with) for path, table in files if table.made_with is not None), ("", None))


def check_alike(
    path: PathLike, made_with: Mapping[str, Any] | None, other: PathLike, others: Mapping[str, Any] | None, free: Collection[str]
) -> None:
    """Raises InputError where two files that are used together were made with different models or settings; unknown ones pass."""
    if made_with is not None and others is not None and (found := made_otherwise(others, made_with, free)):
        raise InputError(f"{path}: was made otherwise than {other}: {listed(found)}; embed both with one model and the same settings")


def missing_parts(path: PathLike, table: EmbeddingTable) -> str | None:
    """Returns a line that says which parts of its set (`embed --part`) a table lacks; None where it is whole. `path`: of its first file."""
    missing = [number for number in range(table.of) if number not in table.parts]
    if not missing:
        return None
    name = f"{_PART.sub('', PurePath(path).stem)}-*-of-{table.of:05}.npz"
    return (
        f"{path}: is {len(table.parts)} of {table.of} parts of a set, without {some(missing)} (counted from 0); give all of them ({name})"
    )


def _the(name: str, names: Collection[str]) -> str:
    return name  # the same of every part, one that lacks it too


def _tables_in(path: PathLike) -> list[str]:
    """Names of the tables in a file, whatever its form."""
    names: list[str] = []
    _load(path, lambda found: names.extend(found) or (), mapped=False)
    if {MEDIA_EMBEDS, TEXT_EMBEDS} & set(names):
        return ["text", MEDIA_TABLE]
    return [name for name in TABLES if any(name in (found, found.rpartition(SEPARATOR)[2]) for found in names)]


def _load(path: PathLike, wanted: Callable[[list[str]], Collection[str]], mapped: bool) -> tuple[dict[str, Any], str]:
    """The members of an `.npz` file or the columns of a Parquet file, and what is beside them."""
    return load_columns(path, wanted) if PurePath(path).suffix == SUFFIX else load_arrays(path, wanted, mapped)


def _read_one(path: PathLike, choose: Choose | None, stay: bool) -> EmbeddingTable:
    def wanted(names: list[str]) -> list[str]:
        tables = [name for name in TABLES if name in names]
        if choose is None or IDS not in names or not tables or {MEDIA_EMBEDS, TEXT_EMBEDS} & set(names):
            return names
        picked = choose(tables)
        left_out = set(tables) - {picked if picked in tables else tables[0]}
        return [name for name in names if name.removesuffix(SCALE).removesuffix(OWN_IDS) not in left_out]

    arrays, comment = _load(path, wanted, mapped=stay or choose is not None)
    said = _origin(arrays.pop(MADE_WITH) if IDS in arrays and MADE_WITH in arrays else comment, path)
    if MEDIA_EMBEDS in arrays or TEXT_EMBEDS in arrays:
        table = from_two_arrays(arrays, str(path))
    elif IDS in arrays:
        table = _from_ours(arrays, str(path), stay)
    else:
        table = _from_official(arrays, str(path))
    if choose is not None:
        name = choose(table.tables)
        chosen = {name: table.tables[name]} if name in table.tables else {}
        table = dataclasses.replace(table, ids=table.ids_of(name) if chosen else (), tables=chosen, own={})
    _check(table, str(path))
    return dataclasses.replace(table, **(said | {"named": table.named and said["named"]}))


def _written_origin(table: EmbeddingTable, same: Mapping[str, Mapping[str, str]] = types.MappingProxyType({}), settings: str = "") -> str:
    parts = table.parts if table.of > 1 else None
    said = {"vectors": table.made_with, "parts": parts, "named": None if table.named else False, "same": dict(same) or None}
    said["settings"] = settings or None
    said = {name: value for name, value in said.items() if value is not None}
    if "parts" in said:
        said["of"] = table.of
    return json.dumps(said, sort_keys=True) if said else ""


def _origin(written: np.ndarray | str, path: PathLike) -> dict[str, Any]:
    """The fields of an `EmbeddingTable` that a file's own record gives; without one, its name may show that it is a part."""
    text = str(written)
    if isinstance(written, str) and not text.startswith("{"):  # an archive's comment may be anybody's
        found = _PART.search(PurePath(path).stem)
        number, of = map(int, found.groups()) if found else (0, 1)
        return {"named": True, "parts": (number,), "of": of} if number < of else {"named": True}
    with as_input_error(f"{path}: what it was made with cannot be read", "write it again", *MALFORMED):
        said = json.loads(text)
        vectors, parts, of = said.get("vectors"), tuple(map(int, said.get("parts", (0,)))), int(said.get("of", 1))
        same = {str(name): {str(record): str(key) for record, key in pairs.items()} for name, pairs in said.get("same", {}).items()}
        if not (vectors is None or isinstance(vectors, dict)) or not parts or not 0 <= min(parts) <= max(parts) < of < 1 << 20:
            raise ValueError("no record of embeddings")
    return {"named": said.get("named") is not False, "made_with": vectors, "parts": parts, "of": of, "same": same}


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
    table = EmbeddingTable(ids, tables, named=IDS in arrays)
    _check(table, path)
    return table


def id_names(ids: np.ndarray, path: str) -> tuple[str, ...]:
    """Returns record ids as text. Raises InputError when they are neither text nor whole numbers."""
    if ids.ndim != 1 or ids.dtype.kind not in "USiu":
        raise InputError(f"{path}: 'ids' is {ids.dtype} {ids.shape}; expected one text or whole number per record")
    try:
        return tuple(i.decode() if isinstance(i, bytes) else str(i) for i in ids.tolist())
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: 'ids' is not UTF-8 text ({e.reason})") from e


def _from_ours(arrays: dict[str, np.ndarray], path: str, stay: bool = False) -> EmbeddingTable:
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
    stored = {n: StoredRows.of(a, scales.get(n)) for n, a in arrays.items() if stay and isinstance(a, np.memmap)}
    tables: dict[str, Any] = {}
    for name in (name for name in TABLES if name in arrays):
        rows = stored.get(name)
        if rows is None and name in scales:
            rows = arrays[name].astype(np.float32) * scales[name][:, None].astype(np.float32)
        tables[name] = rows if rows is not None else float32_rows(arrays[name], name, path)
    return EmbeddingTable(names, tables, own={name: ids for name, ids in own.items() if name in tables})


def _from_official(arrays: dict[str, np.ndarray], path: str) -> EmbeddingTable:
    rows: dict[str, dict[str, Any]] = {name: {} for name in TABLES}
    for key, value in arrays.items():
        record, separator, name = key.rpartition(SEPARATOR)
        if not separator or name not in TABLES:
            raise InputError(
                f"{path}: no 'ids' array, and {key!r} is not of the form ID__TABLE with one of {', '.join(TABLES)}; add 'ids', one a row"
            )
        rows[name][record] = value.reshape(-1) if value.ndim == 2 and value.shape[0] == 1 else value
    present = {name: found for name, found in rows.items() if found}
    if not present:
        raise InputError(f"{path}: holds no embeddings")
    ids = tuple(dict.fromkeys(record for found in present.values() for record in found))
    tables, own = {}, {}
    width = next(iter(present[next(iter(present))].values())).shape
    for name, found in present.items():
        odd = [record for record, row in found.items() if row.ndim != 1 or row.shape != width]
        if odd:
            raise InputError(
                f"{path}: {odd[0]}{SEPARATOR}{name} has shape {found[odd[0]].shape}; expected one vector of the width of the others"
            )
        having = tuple(record for record in ids if record in found)
        tables[name] = float32_rows(np.stack([found[record] for record in having]), name, path)
        if having != ids:
            own[name] = having
    return EmbeddingTable(ids, tables, own=own)


def float32_rows(array: np.ndarray, name: str, path: str) -> np.ndarray:
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise InputError(f"{path}: table {name!r} holds {array.dtype}; expected floating point numbers (float32)")
    return np.ascontiguousarray(array, dtype=np.float32)


def _check(table: EmbeddingTable, path: str) -> None:
    if len(set(table.ids)) != len(table.ids):
        seen: set[str] = set()
        twice = list(dict.fromkeys(i for i in table.ids if i in seen or seen.add(i)))
        raise InputError(f"{path}: {len(twice)} ids appear more than once: {some(twice, 5)}; every record may be given once")
    if "" in table.ids:
        raise InputError(f"{path}: record {table.ids.index('')} has an empty id")
    for name, rows in table.tables.items():
        if name not in TABLES:
            raise InputError(f"{path}: unknown table {name!r}; the tables are {', '.join(TABLES)}")
        ids = table.ids_of(name)
        if rows.ndim != 2 or len(rows) != len(ids):
            raise InputError(f"{path}: table {name!r} has shape {rows.shape} for {len(ids)} ids; expected one row per id")
        if ids is not table.ids and (len(set(ids)) != len(ids) or not set(ids) <= set(table.ids)):
            raise InputError(f"{path}: the ids of table {name!r} are not among those of the file; write it again")
