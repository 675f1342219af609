"""What `eval` and its kin are given: embedding files, single tables from any model, and captions kept beside their clips.

A file is named `PATH`, or `TABLE=PATH` to say which table it is (or which one of a larger file is wanted):
  clips.npz              an embedding file; several are parts of one set. So is clips.parquet
  scores.bin, x.npz      the published scorer's two arrays; `video=x.npz` says that `mllm_embeds` is the video table (default: av)
  text=a.npy video=b.npy one table each; without a name the file's own is used: `text.npy`, `bench-text.npy`
  ids=ids.txt            record ids for tables that carry none, one a line; an `ids.txt` beside an `.npy` file is found by itself,
                         and `made_with.json`, what it was made with
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from etils import epath

from omni_jax.config import TABLES
from omni_jax.config.made_with import ROUNDING
from omni_jax.io.messages import as_input_error, lines_of_text, some
from omni_jax.io.torch_pickle import read_torch_file
from omni_jax.retrieval.embedding_file import (
    IDS,
    MEDIA_TABLE,
    Choose,
    check_alike,
    first_known,
    float32_rows,
    from_two_arrays,
    read_embeddings,
)
from omni_jax.retrieval.npz import PICKLED, load_arrays, read_array
from omni_jax.retrieval.parquet import SUFFIX
from omni_jax.types import EmbeddingTable, InputError

TORCH_SUFFIXES = (".bin", ".pt", ".pth")
CAPTION_MARK = "#"  # `clip7#2` is the third caption of `clip7`
IDS_FILE = "ids.txt"
ORIGIN_FILE = "made_with.json"


def read_inputs(names: Sequence[str], choose: Choose | None = None) -> EmbeddingTable:
    """Returns the tables of all files together, rows brought into the order of the first file that has ids.

    Args:
      names: `PATH` or `TABLE=PATH`, as the head of this file says.
      choose: picks one table by the names of those there are; of plain embedding files no other is read.

    Raises:
      InputError: for a file that cannot be read, a table given twice or not named, ids or numbers of records that differ, files made with
        different models, saying how.
    """
    plain, single, ids_from = [], [], None
    for name in names:
        table, path = _split(name)
        if table == IDS:
            ids_from = path
        elif table is None and PurePath(path).suffix not in (".npy", *TORCH_SUFFIXES):
            plain.append(path)
        else:
            single.append((table, path))
    if not plain and not single:
        raise InputError("no embedding file was given")
    if not single and ids_from is None:
        return read_embeddings(plain, choose)
    parts = [(plain[0], read_embeddings(plain))] if plain else []
    parts += [(path, _read(table, path)) for table, path in single]
    joined = _joined(parts, (ids_from, _read_ids(ids_from)) if ids_from is not None else None)
    if choose is None:
        return joined
    name = choose(joined.tables)
    origin = next(part.made_with for _, part in parts if name in part.tables)
    return dataclasses.replace(joined, tables={name: joined.tables[name]}, made_with=origin)


def with_captions(clips: EmbeddingTable, captions: EmbeddingTable) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Returns tables and relevance for clips with several captions each, as `evaluate(tables, relevance=...)` takes them.

    The text table is that of `captions`, all other tables are those of `clips`. Captions of clips that are not there have no right
    answer and are left out; `captions_left_out` says which.

    Raises:
      InputError: when no caption belongs to a clip, one may belong to two, or there is no text table among the captions.
    """
    if "text" not in captions.tables:
        raise InputError(f"the captions' file holds {', '.join(captions.tables)}, but no text table; embed it with --tables text")
    if not captions.named:
        raise InputError(f"the captions have no ids; give ids CLIP{CAPTION_MARK}NUMBER, as bench-data writes them")
    owners = owners_of(clips, captions)
    kept = [i for i, owner in enumerate(owners) if owner is not None]
    if not kept:
        name = captions.ids_of("text")[0]
        owner = name.rpartition(CAPTION_MARK)[0] or name
        raise InputError(
            f"no caption belongs to a clip: caption {name!r} is of clip {owner!r}, the first clip is {clips.ids[0]!r}; "
            f"write ids CLIP{CAPTION_MARK}NUMBER, as bench-data does"
        )
    tables = {name: rows for name, rows in clips.tables.items() if name != "text"}
    relevance = {name: list(clips.ids_of(name)) for name in tables}
    return {"text": captions.tables["text"][kept], **tables}, {"text": [owner for owner in owners if owner is not None], **relevance}


def owners_of(clips: EmbeddingTable, captions: EmbeddingTable) -> list[str | None]:
    """Returns the clip of each row of the captions' text table, None where it is not there: the part of its id before the last '#', or else
    its whole id.

    Raises:
      InputError: for a caption whose id and the part before its '#' are both clips, where it is ambiguous which is meant.
    """
    here = set(clips.ids)
    owners = []
    for name in captions.ids_of("text"):
        before, mark, _ = name.rpartition(CAPTION_MARK)
        found = [owner for owner in ((before,) if mark else ()) + (name,) if owner in here]
        if len(found) > 1:
            raise InputError(f"caption {name!r} may be of clip {before!r} or of clip {name!r}; rename one of the clips")
        owners.append(found[0] if found else None)
    return owners


def captions_left_out(clips: EmbeddingTable, captions: EmbeddingTable) -> dict[str, list[str]]:
    """Returns what `with_captions` does not ask for: "captions" that belong to no clip, and "clips" that have no caption."""
    owners = owners_of(clips, captions)
    asked = set(owners)
    return {
        "captions": [name for name, owner in zip(captions.ids_of("text"), owners, strict=True) if owner is None],
        "clips": [name for name in clips.ids if name not in asked],
    }


def _split(name: str) -> tuple[str | None, str]:
    table, sign, path = name.partition("=")
    return (table, path) if sign and table in (*TABLES, IDS) else (None, name)


def _read(table: str | None, path: str) -> EmbeddingTable:
    """The wanted table of one file, or all of a file that has its own names for them."""
    suffix = PurePath(path).suffix
    if suffix == ".npy":
        return _read_npy(table, path)
    if suffix in TORCH_SUFFIXES:
        content = read_torch_file(path)
        if not isinstance(content, Mapping):
            raise InputError(f"{path}: holds a {type(content).__name__}; expected text_embeds and mllm_embeds by name")
        return from_two_arrays(content, path, table or MEDIA_TABLE)
    arrays = load_arrays(path)[0] if suffix != SUFFIX else {}
    if "mllm_embeds" in arrays:
        return from_two_arrays(arrays, path, table or MEDIA_TABLE)
    found = read_embeddings(path)
    if table not in found.tables:
        raise InputError(f"{path}: has no table {table!r}; it holds {', '.join(found.tables)}")
    return dataclasses.replace(found, ids=found.ids_of(table), tables={table: found.tables[table]}, own={})


def _read_npy(table: str | None, path: str) -> EmbeddingTable:
    if table is None:
        words = re.split(r"[^a-z]+", PurePath(path).stem.lower())
        table = next((word for word in reversed(words) if word in TABLES), None)
        if table is None:
            raise InputError(f"{path}: which table is it? write text={path}, or one of {', '.join(TABLES)} before the sign")
    file = epath.Path(path)
    if not file.is_file():
        raise InputError(f"{path}: no such file")
    other = as_input_error(f"{path}: cannot be read as an array", PICKLED, ValueError, EOFError, MemoryError)
    with as_input_error(f"{path}: cannot be read"), other, file.open("rb") as stream:
        rows = read_array(stream)
    if rows.ndim != 2:
        raise InputError(f"{path}: has shape {rows.shape}; expected (records, width)")
    tables = {table: float32_rows(rows, table, path)}
    beside, made_with = file.parent / IDS_FILE, _read_origin(file.parent / ORIGIN_FILE)
    if not beside.is_file():
        return EmbeddingTable(_numbers(len(rows)), tables, named=False, made_with=made_with)
    ids = _read_ids(os.fspath(beside))
    if len(ids) != len(rows):
        raise InputError(f"{path}: table {table!r} has {len(rows)} rows, {beside} has {len(ids)} ids; give one id a row, or move the file")
    return EmbeddingTable(ids, tables, made_with=made_with)


def _read_origin(path: epath.Path) -> dict[str, Any] | None:
    """Returns what an export's vectors were made with; None where it does not say."""
    if not path.is_file():
        return None
    with as_input_error(f"{path}: cannot be read", "export the tables again, or remove it", OSError, ValueError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds a {type(found).__name__}, an object is expected; export the tables again, or remove it")
    return found


def _numbers(rows: int) -> tuple[str, ...]:
    return tuple(map(str, range(rows)))


def _read_ids(path: str) -> tuple[str, ...]:
    with as_input_error(f"{path}: cannot be read"), as_input_error(f"{path}: is not UTF-8 text", "write one id a line", UnicodeDecodeError):
        ids = tuple(lines_of_text(epath.Path(path).read_bytes()))
    twice = len(ids) - len(set(ids))
    if twice or "" in ids:
        raise InputError(f"{path}: {'an empty line' if '' in ids else f'{twice} ids appear more than once'}; one unique id a line")
    return ids


def _joined(parts: Sequence[tuple[str, EmbeddingTable]], given: tuple[str, tuple[str, ...]] | None) -> EmbeddingTable:
    """All parts, with the paths they were read from, as one table set; `given` are (file, ids) for the parts that carry none."""
    first, head = parts[0]
    other, others = first_known(parts)
    home, ids = given or next(((path, part.ids) for path, part in parts if part.named), (first, None))
    rows = len(ids) if ids is not None else len(head.ids)
    width = next(iter(head.tables.values())).shape[1]
    tables: dict[str, np.ndarray] = {}
    for path, part in parts:
        if part.own:
            raise InputError(
                f"{path}: table {next(iter(part.own))!r} lacks some of the records; name the wanted tables (text={path}) instead"
            )
        order = _order(path, part, home, ids)
        for name, table in part.tables.items():
            if name in tables:
                raise InputError(f"{path}: table {name!r} was given already; name each table once")
            if not part.named and len(table) != rows:
                raise InputError(f"{path}: table {name!r} has {len(table)} rows, {home} has {rows}; row i must be record i in each")
            if table.shape[1] != width:
                raise InputError(f"{path}: table {name!r} is {table.shape[1]} wide, but {width} in {first}; they must come from one model")
            tables[name] = table if order is None else table[order]
        # A preset decides for each table by itself; the model must be one.
        check_alike(path, part.made_with, other, others, (*ROUNDING, "preset", "normalize"))
    # Several parts of a set are joined row by row, not table by table: what one file lacks, all of them lack.
    known = head.made_with if all(part.made_with == head.made_with for _, part in parts) else None
    lacking = next((part for _, part in parts if len(part.parts) < part.of), head)
    ordered = {name: tables[name] for name in TABLES if name in tables}
    return EmbeddingTable(ids or _numbers(rows), ordered, named=ids is not None, made_with=known, parts=lacking.parts, of=lacking.of)


def _order(path: str, part: EmbeddingTable, home: str, ids: tuple[str, ...] | None) -> np.ndarray | None:
    """Rows of a part in the order of `ids`; None where they have that order already or carry no ids."""
    if not part.named or ids is None or part.ids == ids:
        return None
    own = part.ids
    have, want = set(own), set(ids)
    lacking, extra = [i for i in ids if i not in have], [i for i in own if i not in want]
    if lacking or extra:
        differences = [f"lacks {len(lacking)} ({some(lacking)})"] if lacking else []
        differences += [f"adds {len(extra)} ({some(extra)})"] if extra else []
        raise InputError(f"{path}: its ids are not those of {home}: it {' and '.join(differences)}; score files of the same records")
    place = {name: i for i, name in enumerate(own)}
    return np.array([place[name] for name in ids])
