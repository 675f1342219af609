"""What `eval` and its kin are given: embedding files, single tables from any model, and captions kept beside their clips.

A file is named `PATH`, or `TABLE=PATH` to say which table it is (or which one of a larger file is wanted):
  clips.npz              an embedding file; several are parts of one set
  scores.bin, x.npz      the published scorer's two arrays; `video=x.npz` says that `mllm_embeds` is the video table (default: av)
  text=a.npy video=b.npy one table each; without a name the file's own tells: `text.npy`, `bench-text.npy`
  ids=ids.txt            record ids for tables that carry none, one a line; an `ids.txt` beside an `.npy` file is found by itself
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from etils import epath

from omni_jax.config import TABLES
from omni_jax.retrieval.embedding_file import IDS, MEDIA_TABLE, float32_rows, from_two_arrays, load_arrays, read_array, read_embeddings
from omni_jax.types import EmbeddingTable, InputError

TORCH_SUFFIXES = (".bin", ".pt", ".pth")
CAPTION_MARK = "#"  # `clip7#2` is the third caption of `clip7`
IDS_FILE = "ids.txt"

ReadTorch = Callable[[str], Any]


def read_inputs(names: Sequence[str], read_torch: ReadTorch | None = None) -> EmbeddingTable:
    """Returns the tables of all files together, rows brought into the order of the first file that has ids.

    Args:
      names: `PATH` or `TABLE=PATH`, as the head of this file says.
      read_torch: reads a torch file without running it; None: torch files are refused.

    Raises:
      InputError: for a file that cannot be read, a table given twice or not named, ids or numbers of records that differ, saying how.
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
        return read_embeddings(plain)
    parts = [(plain[0], *_known(read_embeddings(plain)))] if plain else []
    parts += [(path, *_read(table, path, read_torch)) for table, path in single]
    return _joined(parts, (ids_from, _read_ids(ids_from)) if ids_from is not None else None)


def with_captions(clips: EmbeddingTable, captions: EmbeddingTable) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Returns tables and relevance for clips with several captions each, as `evaluate(tables, relevance=...)` takes them.

    The text table is that of `captions`, where the part of an id before its last '#' names the clip; all other tables are those of
    `clips`. Captions of clips that are not there are left out: they have no right answer.

    Raises:
      InputError: when no caption belongs to a clip, or there is no text table among the captions.
    """
    if "text" not in captions.tables:
        raise InputError(f"the captions' file holds {', '.join(captions.tables)}, but no text table; embed it with --tables text")
    owners = [record.rpartition(CAPTION_MARK)[0] or record for record in captions.ids]
    here = set(clips.ids)
    kept = [i for i, owner in enumerate(owners) if owner in here]
    if not kept:
        raise InputError(
            f"no caption belongs to a clip: caption {captions.ids[0]!r} is of clip {owners[0]!r}, the first clip is {clips.ids[0]!r}; "
            f"write ids CLIP{CAPTION_MARK}NUMBER, as bench-data does"
        )
    tables = {name: rows for name, rows in clips.tables.items() if name != "text"}
    relevance = {name: list(clips.ids_of(name)) for name in tables}
    return {"text": captions.tables["text"][kept], **tables}, {"text": [owners[i] for i in kept], **relevance}


def _split(name: str) -> tuple[str | None, str]:
    table, sign, path = name.partition("=")
    return (table, path) if sign and table in (*TABLES, IDS) else (None, name)


def _known(table: EmbeddingTable) -> tuple[dict[str, np.ndarray], tuple[str, ...] | None]:
    numbered = table.ids == tuple(map(str, range(len(table.ids))))
    return dict(table.tables), None if numbered else table.ids


def _read(table: str | None, path: str, read_torch: ReadTorch | None) -> tuple[dict[str, np.ndarray], tuple[str, ...] | None]:
    """(tables, ids or None) of one file."""
    suffix = PurePath(path).suffix
    if suffix == ".npy":
        return _read_npy(table, path)
    if suffix in TORCH_SUFFIXES:
        if read_torch is None:
            raise InputError(f"{path}: torch files are not read here; give an .npz file")
        content = read_torch(path)
        if not isinstance(content, Mapping):
            raise InputError(f"{path}: holds a {type(content).__name__}; expected text_embeds and mllm_embeds by name")
        return _known(from_two_arrays(content, path, table or MEDIA_TABLE))
    arrays = load_arrays(path)
    if "mllm_embeds" in arrays:
        return _known(from_two_arrays(arrays, path, table or MEDIA_TABLE))
    found, ids = _known(read_embeddings(path))
    if table not in found:
        raise InputError(f"{path}: has no table {table!r}; it holds {', '.join(found)}")
    return {table: found[table]}, ids


def _read_npy(table: str | None, path: str) -> tuple[dict[str, np.ndarray], tuple[str, ...] | None]:
    if table is None:
        words = re.split(r"[^a-z]+", PurePath(path).stem.lower())
        table = next((word for word in reversed(words) if word in TABLES), None)
        if table is None:
            raise InputError(f"{path}: which table is it? write text={path}, or one of {', '.join(TABLES)} before the sign")
    file = epath.Path(path)
    if not file.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with file.open("rb") as stream:
            rows = read_array(stream)
    except (ValueError, EOFError, MemoryError) as e:
        raise InputError(f"{path}: cannot be read as an array ({' '.join(str(e).split())}); pickled content is never loaded") from e
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror or e}") from e
    if rows.ndim != 2:
        raise InputError(f"{path}: has shape {rows.shape}; expected (records, width)")
    beside = file.parent / IDS_FILE
    return {table: float32_rows(rows, table, path)}, _read_ids(os.fspath(beside)) if beside.is_file() else None


def _read_ids(path: str) -> tuple[str, ...]:
    try:
        ids = tuple(epath.Path(path).read_text(encoding="utf-8").splitlines())
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: is not UTF-8 text ({e.reason}); write one id a line") from e
    twice = len(ids) - len(set(ids))
    if twice or "" in ids:
        raise InputError(f"{path}: {'an empty line' if '' in ids else f'{twice} ids stand more than once'}; write one id a line, each once")
    return ids


Part = tuple[str, dict[str, np.ndarray], tuple[str, ...] | None]


def _joined(parts: Sequence[Part], given: tuple[str, tuple[str, ...]] | None) -> EmbeddingTable:
    """All parts as one table set; `given` are (file, ids) for the parts that carry none."""
    home, ids = given or next(((path, own) for path, _, own in parts if own is not None), (parts[0][0], None))
    first, first_tables, _ = parts[0]
    rows = len(ids) if ids is not None else len(next(iter(first_tables.values())))
    width = next(iter(first_tables.values())).shape[1]
    tables: dict[str, np.ndarray] = {}
    for path, found, own in parts:
        order = _order(path, own, home, ids)
        for name, table in found.items():
            if name in tables:
                raise InputError(f"{path}: table {name!r} was given already; name each table once")
            if order is None and len(table) != rows:
                raise InputError(f"{path}: table {name!r} has {len(table)} rows, {home} has {rows}; row i must be record i in each")
            if table.shape[1] != width:
                raise InputError(f"{path}: table {name!r} is {table.shape[1]} wide, but {width} in {first}; they must come from one model")
            tables[name] = table if order is None else table[order]
    names = ids if ids is not None else tuple(map(str, range(rows)))
    return EmbeddingTable(names, {name: tables[name] for name in TABLES if name in tables})


def _order(path: str, own: tuple[str, ...] | None, home: str, ids: tuple[str, ...] | None) -> np.ndarray | None:
    """Rows of a part in the order of `ids`; None where they stand in it already or carry no ids."""
    if own is None or ids is None or own == ids:
        return None
    have, want = set(own), set(ids)
    lacking, extra = [i for i in ids if i not in have], [i for i in own if i not in want]
    if lacking or extra:
        told = [f"lacks {len(lacking)} ({', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''})"] if lacking else []
        told += [f"adds {len(extra)} ({', '.join(extra[:3])}{', ...' if len(extra) > 3 else ''})"] if extra else []
        raise InputError(f"{path}: its ids are not those of {home}: it {' and '.join(told)}; score files of the same records")
    place = {name: i for i, name in enumerate(own)}
    return np.array([place[name] for name in ids])
