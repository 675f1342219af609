"""Tables that stay on disk: the rows, scores and answers of arrays, whatever they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_jax.cli.main import main
from omni_jax.retrieval import embedding_file, evaluate, stored_rows
from omni_jax.retrieval.embedding_file import read_embeddings, write_embeddings
from omni_jax.retrieval.mining import MiningConfig, mine
from omni_jax.retrieval.npz import write_members
from omni_jax.retrieval.search import Index
from omni_jax.retrieval.stored_rows import StoredRows
from omni_jax.types import EmbeddingTable, InputError
from tests.tolerances import assert_close

LENGTHS, WIDTH = (40, 1, 0, 27), 24


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The name of a set of four files, of 68 records; a record of the last has the prompt of one of the first."""
    folder, rng, done = tmp_path_factory.mktemp("set"), np.random.default_rng(0), 0
    for number, length in enumerate(LENGTHS):
        ids = tuple(f"clip {n}" for n in range(done, done + length))
        tables = {name: rng.standard_normal((length, WIDTH)).astype(np.float32) for name in ("text", "video", "av")}
        same = {"text": {"clip 50": "clip 3", "clip 60": "clip 3"}} if number == 3 else {}
        table = EmbeddingTable(ids, tables, parts=(number,), of=4, same=same, made_with={"version": "1"})
        write_embeddings(folder / f"clips-{number:05}-of-00004.npz", table)
        done += length
    return folder / "clips.npz"


@pytest.fixture
def stay(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda size: monkeypatch.setattr(embedding_file, "STAY", size)


def both(parts: Path, stay: Callable[[int], None]) -> tuple[EmbeddingTable, EmbeddingTable]:
    """The set as arrays, and as rows on disk."""
    arrays = read_embeddings(parts)
    stay(0)
    stored = read_embeddings(parts)
    assert all(isinstance(rows, np.ndarray) for rows in arrays.tables.values())
    assert all(isinstance(rows, StoredRows) for rows in stored.tables.values())
    return arrays, stored


def test_a_set_is_one_table_under_its_own_name(parts: Path, stay: Callable[[int], None]):
    arrays, stored = both(parts, stay)
    assert arrays.ids == stored.ids == tuple(f"clip {n}" for n in range(68)) and stored.parts == (0, 1, 2, 3)
    assert np.array_equal(arrays.tables["text"][[50, 60]], arrays.tables["text"][[3, 3]])
    for name, rows in arrays.tables.items():
        assert stored.tables[name].shape == rows.shape and np.array_equal(stored.tables[name][:], rows)


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_any_index_gives_the_rows_of_the_array(data: st.DataObject, parts: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding_file, "STAY", 0)
        stored = read_embeddings(parts).tables["text"]
    array = np.asarray(stored)
    number = st.integers(-68, 67)
    key = data.draw(
        st.one_of(
            number,
            st.slices(68),
            st.lists(number, max_size=9).map(lambda n: np.array(n, np.int64)),
            st.lists(st.booleans(), min_size=68, max_size=68).map(np.array),
        )
    )
    assert np.array_equal(stored[key], array[key])


@pytest.mark.jit
def test_scores_searches_and_negatives_are_those_of_the_arrays(parts: Path, stay: Callable[[int], None]):
    arrays, stored = both(parts, stay)
    assert evaluate(stored) == evaluate(arrays)
    assert mine(stored, MiningConfig(), same={}).negatives == mine(arrays, MiningConfig(), same={}).negatives
    queries = np.random.default_rng(1).standard_normal((5, WIDTH))
    for name, count in (("av", 5), ("av", 1), ("text", 2)):
        opened = Index.open(parts, name)
        assert isinstance(opened.rows, StoredRows)
        for found, expected in zip(opened.search(queries[:count], 4), Index(arrays.tables[name]).search(queries[:count], 4), strict=True):
            assert np.array_equal(found, expected)


@pytest.mark.parametrize("kind", ["<f4", "<f2", "|i1"])
def test_mapped_rows_are_those_of_the_file_and_stay_so(kind: str, stay: Callable[[int], None], tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(stored_rows, "CONVERTED", 5 * WIDTH)
    path, rng = tmp_path / "clips.npz", np.random.default_rng(0)
    scale = {"av_scale": rng.random(40, np.float32)} if kind == "|i1" else {}
    write_members(path, {"ids": np.arange(40), "av": (9 * rng.standard_normal((40, WIDTH))).astype(kind), **scale})
    stay(0)
    stored = read_embeddings(path).tables["av"]
    assert isinstance(stored, StoredRows)
    want, mapped = stored[:], stored.mapped()
    write_members(path, {"ids": np.arange(3), "av": np.ones((3, WIDTH), np.float32)})  # as a new run of `embed` does
    numbers = np.array([39, 0, 7])
    assert np.array_equal(mapped[:], want) and np.array_equal(mapped[numbers], want[numbers])
    queries = (rng.standard_normal((2, WIDTH)) / 100).astype(np.float32)
    assert_close(mapped.products(3, 38, queries), queries @ want[3:38].T, "invariance")


def test_exports_have_the_bytes_of_the_arrays(parts: Path, stay: Callable[[int], None], tmp_path: Path):
    forms = {"npy": "npy", "int8": "int8.npz", "parquet": "all.parquet"}
    for size in (1 << 30, 0):
        stay(size)
        for form, name in forms.items():
            more = ["--queries", "0"] if form == "int8" else []
            assert main(["export", str(parts), "--to", form, "--out", str(tmp_path / f"{size}-{name}"), *more]) == 0
    for name in ("npy/text.npy", "npy/ids.txt", "int8.npz", "all.parquet"):
        assert (tmp_path / f"0-{name}").read_bytes() == (tmp_path / f"{1 << 30}-{name}").read_bytes(), name
    int8 = read_embeddings(tmp_path / "0-int8.npz").tables["av"]
    assert isinstance(int8, StoredRows)
    stay(1 << 30)
    assert np.array_equal(int8[:], read_embeddings(tmp_path / "0-int8.npz").tables["av"])


def test_a_file_that_shrinks_while_it_is_read_is_one_line(stay: Callable[[int], None], tmp_path: Path):
    path, rows = tmp_path / "clips.npz", np.ones((9, WIDTH), np.float32)
    write_embeddings(path, EmbeddingTable(tuple("abcdefghi"), {"av": rows}))
    stay(0)
    stored = read_embeddings(path).tables["av"]
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(InputError, match=r"clips\.npz: ends early: it was changed while it was read; write it again"):
        stored[:]


def test_the_name_of_a_set_that_lacks_a_part_says_so(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for file in parts.parent.glob("clips-0000[013]-*.npz"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert main(["eval", str(tmp_path / "clips.npz")]) == 2
    assert "is 3 of 4 parts of a set, without 2" in capsys.readouterr().err
