"""Embedding tables in other forms: plain `.npy` with ids, int8 with what it costs, Parquet, FAISS indexes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

from omni_jax.retrieval.directions import possible
from omni_jax.retrieval.embedding_file import IDS, MADE_WITH, SCALE, origin_member, own_ids, read_embeddings
from omni_jax.retrieval.faiss_search import faiss_module
from omni_jax.retrieval.inputs import IDS_FILE, ORIGIN_FILE
from omni_jax.retrieval.metrics import RECALL_AT, direction_metrics, evaluate
from omni_jax.retrieval.npz import check_place, output_file, write_array, write_members
from omni_jax.retrieval.parquet import write_columns
from omni_jax.retrieval.ranks import prepare, rank_pair
from omni_jax.retrieval.rows import quantized
from omni_jax.retrieval.stored_rows import StoredRows
from omni_jax.types import EmbeddingTable, InputError

FACTORY = "Flat"  # exact
BLOCK = 16384  # rows added to an index together
TRAIN = 262_144  # rows that an index learns its cells and codes from
SEED = 0  # of every sample
QUERIES = 4096  # records that ask when the loss of recall is measured


def export_npy(table: EmbeddingTable, folder: str | os.PathLike[str]) -> list[str]:
    """Writes TABLE.npy (N, D) float32 for every table and, where they are known, ids.txt, one a line, and made_with.json, what the vectors
    were made with; returns the file names."""
    _check_whole(table, table.tables)
    target = _folder(folder)
    origin = _write_origin(table, target)
    for name, rows in table.tables.items():
        with output_file(target / f"{name}.npy") as file:
            write_array(file, rows if isinstance(rows, StoredRows) else np.ascontiguousarray(rows, np.float32))
    names = [*(f"{name}.npy" for name in table.tables), *origin]
    if not table.named:  # row numbers are no ids: beside another table they would be taken for them
        (target / IDS_FILE).unlink(missing_ok=True)
        return names
    return [*names, _write_ids(table, target)]


def export_int8(table: EmbeddingTable, path: str | os.PathLike[str]) -> EmbeddingTable:
    """Writes an embedding file of int8 tables, which `eval` and `search` read like any other, and returns what they will read."""
    members: dict[str, Any] = {IDS: np.array(table.ids, dtype=np.str_), **own_ids(table), **origin_member(table)}
    for name, rows in table.tables.items():
        members[name] = _Int8(rows)
        members[name + SCALE] = np.concatenate([quantized(rows[n : n + BLOCK])[1] for n in range(0, max(1, len(rows)), BLOCK)])
    write_members(path, members)
    return dataclasses.replace(table, tables=read_embeddings(path).tables)


class _Int8:
    """The int8 values of a table, made a block at a time."""

    dtype = np.dtype(np.int8)

    def __init__(self, rows: Any) -> None:
        self._rows, self.shape = rows, rows.shape

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, part: slice) -> np.ndarray:
        return quantized(self._rows[part])[0]


def recall_loss(before: EmbeddingTable, after: EmbeddingTable, queries: int = QUERIES) -> dict[str, dict[str, tuple[float, float]]]:
    """Returns direction -> {"R@1": (before, after), "R@5": ..., "R@10": ...}, in percent.

    Args:
      queries: records that ask, at most; more are sampled. Every record answers, so that the work grows with the records, not their square.

    Raises:
      InputError: when the tables allow no direction, or hold NaN or zero vectors.
    """
    if len(before.ids) <= queries:
        found = [evaluate(tables, resamples=0)["directions"] for tables in (before, after)]
    else:
        asking = np.sort(np.random.default_rng(SEED).choice(len(before.ids), queries, replace=False))
        found = [_sampled(tables, asking) for tables in (before, after)]
    return {
        name: {f"R@{k}": (float(metrics[f"R@{k}"]), float(found[1][name][f"R@{k}"])) for k in RECALL_AT}
        for name, metrics in found[0].items()
    }


def _sampled(table: EmbeddingTable, asking: np.ndarray) -> dict[str, dict[str, float | int]]:
    """The metrics of every direction that the tables allow, asked by some records alone (their numbers)."""
    wanted = possible(table.tables)
    if not wanted:
        raise InputError(f"the tables {', '.join(table.tables)} allow no direction; two of text, video, audio are needed")
    held = {name: prepare(table.tables[name], name, table.ids_of(name)) for name in {name for pair in wanted.values() for name in pair}}
    number = {name: n for n, name in enumerate(table.ids)} if table.own else {}
    numbers = {name: np.array([number[i] for i in table.own[name]]) if name in table.own else np.arange(len(table.ids)) for name in held}
    found = {}
    for direction, (query, gallery) in wanted.items():
        asked, rows = held[query], np.flatnonzero(np.isin(numbers[query], asking))
        some = dataclasses.replace(asked, rows=asked.rows[rows], scale=asked.scale[rows], same=asked.same[rows])
        relevance: Any = numbers[query][rows], numbers[gallery]
        found[direction] = direction_metrics(rank_pair(some, held[gallery], relevance)[0])
    return found


def format_loss(loss: dict[str, dict[str, tuple[float, float]]]) -> str:
    """Returns the table of `recall_loss`: after, and the change, for every direction."""
    columns = [f"R@{k}" for k in RECALL_AT]
    lines = ["direction  " + "".join(f"{name:>8}  change  " for name in columns).rstrip()]
    for direction, metrics in loss.items():
        lines.append(
            f"{direction:<11}" + "".join(f"{metrics[c][1]:8.2f}  {metrics[c][1] - metrics[c][0]:+6.2f}  " for c in columns).rstrip()
        )
    return "\n".join(lines)


def export_parquet(
    table: EmbeddingTable, path: str | os.PathLike[str], captions: Mapping[str, str] | None = None, paths: Mapping[str, str] | None = None
) -> None:
    """Writes ids, tables and, where they are given by record id, captions and paths of media as one Parquet file, an embedding file too.

    Raises:
      InputError: when pyarrow is not installed, or for a place that cannot be written.
    """
    given = {"caption": captions, "path": paths}
    texts = {name: [found.get(record) for record in table.ids] for name, found in given.items() if found is not None}
    write_columns(path, table, str(origin_member(table).get(MADE_WITH, "")), texts)


def export_faiss(table: EmbeddingTable, folder: str | os.PathLike[str], factory: str = FACTORY) -> list[str]:
    """Writes TABLE.faiss, an inner-product index of unit rows, for every table, ids.txt and, where it is known what the vectors were
    made with, made_with.json; returns the file names.

    The index answers with record ids where all of them are whole numbers, or else with line numbers of ids.txt, from 0.

    Args:
      factory: what faiss.index_factory makes an index of; one that must be trained is, on at most TRAIN rows.

    Raises:
      InputError: when faiss is not installed, for rows of only zeros, a factory string that faiss does not know, or too few rows for it.
    """
    faiss = faiss_module("export --to npy")
    target = _folder(folder)
    numbers = _numbers(table)
    made = []
    for name in table.tables:
        rows = table.tables[name]
        own = np.array([numbers[record] for record in table.ids_of(name)], np.int64)
        try:
            index = faiss.index_factory(rows.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
            places = np.array_equal(own, np.arange(len(rows)))  # which every index has without a map
            if not places and not isinstance(index, (faiss.IndexIVF, faiss.IndexIDMap)):
                index = faiss.IndexIDMap2(index)
            if not index.is_trained:
                index.train(_unit(table, name, np.sort(np.random.default_rng(SEED).permutation(len(rows))[:TRAIN])))
            for start in range(0, len(rows), BLOCK):
                block = np.arange(start, min(start + BLOCK, len(rows)))
                if isinstance(index, faiss.IndexIDMap) or not places:
                    index.add_with_ids(_unit(table, name, block), own[block])
                else:
                    index.add(_unit(table, name, block))
        except RuntimeError as e:
            reason = " ".join(re.sub(r"^Error in .*?\.cpp:\d+: (Error: '.*?' failed:? ?)?", "", str(e), flags=re.DOTALL).split())
            raise InputError(f"index {factory!r} cannot be made of the {len(rows)} rows of table {name!r}: faiss says {reason}") from e
        with output_file(target / f"{name}.faiss") as file:
            faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
        made.append(f"{name}.faiss")
    return [*made, *_write_origin(table, target), _write_ids(table, target)]


def _numbers(table: EmbeddingTable) -> dict[str, int]:
    """Record id -> the whole number that it is, where all of them are, else its line in ids.txt."""
    whole = [re.fullmatch(r"0|[1-9]\d{0,17}", record) for record in table.ids]
    return {record: int(record) if all(whole) else line for line, record in enumerate(table.ids)}


def _unit(table: EmbeddingTable, name: str, numbers: np.ndarray) -> np.ndarray:
    """Some rows of a table as unit rows. Raises InputError for rows of only zeros, NaN or infinity."""
    rows = np.ascontiguousarray(table.tables[name][numbers], np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    good = np.isfinite(norms) & (norms > 0)
    if not good.all():
        record = table.ids_of(name)[numbers[int(np.argmin(good))]]
        raise InputError(f"table {name!r}: record {record!r} holds NaN, infinity or only zeros; embed it again or drop it")
    return rows / norms


def _folder(path: str | os.PathLike[str]) -> epath.Path:
    target = epath.Path(path)
    if target.is_file():
        raise InputError(f"{path} is a file; name a folder, which will hold one file a table")
    check_place(target / IDS_FILE) if target.is_dir() else check_place(target)
    target.mkdir(exist_ok=True)
    return target


def _check_whole(table: EmbeddingTable, names: Iterable[str]) -> None:
    """Raises InputError for tables of other records than the file's, which one list of ids cannot serve."""
    if lacking := [name for name in names if name in table.own]:
        counts = ", ".join(f"{name} {len(table.own[name])}" for name in lacking)
        raise InputError(
            f"of {len(table.ids)} records some lack a table ({counts}), and ids.txt is of all; embed records that have all tables"
        )


def _write_origin(table: EmbeddingTable, folder: epath.Path) -> list[str]:
    """Writes what the vectors were made with, and returns the file's name; none of an earlier export stays where that is unknown."""
    (folder / ORIGIN_FILE).unlink(missing_ok=True)
    if table.made_with is None:
        return []
    with output_file(folder / ORIGIN_FILE) as file:
        file.write(json.dumps(table.made_with, sort_keys=True).encode() + b"\n")
    return [ORIGIN_FILE]


def _write_ids(table: EmbeddingTable, folder: epath.Path) -> str:
    broken = next((name for name in table.ids if len(name.splitlines()) != 1), None)
    if broken is not None:
        raise InputError(f"id {broken!r} holds a line break; rename the record, since {IDS_FILE} has one id a line")
    with output_file(folder / IDS_FILE) as file:
        file.write("".join(f"{name}\n" for name in table.ids).encode())
    return IDS_FILE
