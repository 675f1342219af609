"""`Index.open`: a table mapped from its file, its norms kept beside it."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest

import omni_jax
from omni_jax.retrieval import write_embeddings
from omni_jax.retrieval.search import search
from omni_jax.types import EmbeddingTable, InputError

N, WIDTH = 500, 24


@pytest.fixture
def table() -> EmbeddingTable:
    rows = np.random.default_rng(0).normal(size=(2, N, WIDTH)).astype(np.float32)
    return EmbeddingTable(tuple(f"clip {i}" for i in range(N)), {"video": rows[0], "av": rows[1]}, made_with={"preset": {"frames": 8}})


@pytest.fixture
def file(table: EmbeddingTable, tmp_path: Path) -> Path:
    write_embeddings(tmp_path / "clips.npz", table)
    return tmp_path / "clips.npz"


def test_an_opened_index_finds_what_a_search_of_the_table_does(file: Path, table: EmbeddingTable):
    index = omni_jax.Index.open(file, "video")
    queries = np.random.default_rng(1).normal(size=(5, WIDTH)).astype(np.float32)
    for found, expected in zip(index.search(queries, 7), search(queries, table.tables["video"], 7), strict=True):
        np.testing.assert_array_equal(found, expected)
    cosines, rows = index.search(queries[2], 3)
    assert cosines.shape == rows.shape == (3,)
    np.testing.assert_array_equal(rows, index.search(queries, 3)[1][2])
    assert [index.ids[row] for row in rows.tolist()] == [f"clip {row}" for row in rows.tolist()]
    assert omni_jax.Index.open(file).name == "av"


def test_norms_are_kept_beside_the_file_and_made_again_when_it_changes(file: Path, table: EmbeddingTable):
    omni_jax.Index.open(file, "video")
    kept = Path(f"{file}.video.norms.npz")
    before = kept.stat().st_mtime_ns
    assert isinstance(omni_jax.Index.open(file, "video").norms, np.ndarray)
    assert kept.stat().st_mtime_ns == before
    time.sleep(0.01)
    write_embeddings(file, dataclasses.replace(table, tables={name: 3 * rows for name, rows in table.tables.items()}))
    np.testing.assert_allclose(omni_jax.Index.open(file, "video").norms, 3 * np.linalg.norm(table.tables["video"], axis=1), rtol=1e-6)
    assert kept.stat().st_mtime_ns > before
    kept.write_bytes(b"junk")
    assert omni_jax.Index.open(file, "video").search(table.tables["video"][3], 1)[1].tolist() == [3]


def test_rows_are_not_read_where_the_norms_are_known(file: Path):
    first = omni_jax.Index.open(file, "video")
    again = omni_jax.Index.open(file, "video")
    assert not first.rows.flags.owndata
    np.testing.assert_array_equal(first.norms, again.norms)


def test_a_place_that_cannot_be_written_costs_nothing_but_time(file: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError("read-only")

    monkeypatch.setattr("omni_jax.retrieval.norms.write_members", refuse)
    assert len(omni_jax.Index.open(file, "video").norms) == N
    assert not list(file.parent.glob("*.norms.npz"))


def test_parts_of_a_set_are_one_index(table: EmbeddingTable, tmp_path: Path):
    for number in (0, 1):
        rows = {name: rows[number::2] for name, rows in table.tables.items()}
        write_embeddings(
            tmp_path / f"{number}.npz", dataclasses.replace(table, ids=table.ids[number::2], tables=rows, parts=(number,), of=2)
        )
    index = omni_jax.Index.open([tmp_path / "0.npz", tmp_path / "1.npz"], "av")
    (row,) = index.search(table.tables["av"][7], 1)[1].tolist()
    assert index.ids[row] == "clip 7"


def test_an_index_of_another_model_is_refused(file: Path):
    with pytest.raises(InputError, match=r"was made otherwise than .*clips\.npz: preset\.frames is 8 there, 4 here"):
        omni_jax.Index.open(file, "av", made_with={"preset": {"frames": 4}})
    omni_jax.Index.open(file, "av", made_with={"preset": {"frames": 8, "prefix": "query"}, "normalize": False})
    with pytest.raises(InputError, match="has no table 'text'; it holds"):
        omni_jax.Index.open(file, "text")
