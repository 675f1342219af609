"""Embedding tables as Parquet: written by `export`, read by `eval`, `search` and other people's programs; and files that cannot be read."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omni_jax.cli.main import main
from omni_jax.retrieval import parquet
from omni_jax.retrieval.embedding_file import read_embeddings, write_embeddings
from omni_jax.retrieval.export import export_parquet
from omni_jax.retrieval.inputs import read_inputs
from omni_jax.types import EmbeddingTable, InputError
from tests.tolerances import assert_close


def table(records: int = 30, width: int = 8) -> EmbeddingTable:
    rng = np.random.default_rng(0)
    tables = {name: rng.standard_normal((records, width)).astype(np.float32) for name in ("text", "video")}
    return EmbeddingTable(tuple(f"clip {i}" for i in range(records)), tables, made_with={"weights": {"base": "a" * 40}, "normalize": True})


def lacking(whole: EmbeddingTable) -> EmbeddingTable:
    kept = [i for i in range(len(whole.ids)) if i % 3 == 1]
    return dataclasses.replace(
        whole, tables={**whole.tables, "video": whole.tables["video"][kept]}, own={"video": tuple(whole.ids[i] for i in kept)}
    )


@pytest.mark.parametrize("block", [8192, 7])
def test_what_is_written_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(parquet, "BLOCK", block)
    for want in (table(), lacking(table()), dataclasses.replace(table(), parts=(1,), of=3)):
        export_parquet(want, tmp_path / "e.parquet")
        found = read_embeddings(tmp_path / "e.parquet")
        for name, rows in want.tables.items():
            assert_close(found.tables[name], rows, "round_trip")
            assert found.ids_of(name) == want.ids_of(name)
        assert dataclasses.replace(found, tables={}) == dataclasses.replace(want, tables={})


def test_other_programs_see_plain_columns(tmp_path: Path) -> None:
    want = lacking(table())
    export_parquet(want, tmp_path / "e.parquet", captions={"clip 0": "a red ball"}, paths={"clip 1": "media/1.mp4"})
    read = pq.read_table(tmp_path / "e.parquet")
    assert read.column_names == ["id", "caption", "path", "text", "video"]
    assert read.schema.field("text").type == pa.list_(pa.float32(), 8)
    rows = read.to_pylist()
    assert (rows[0]["id"], rows[0]["caption"], rows[0]["path"], rows[0]["video"]) == ("clip 0", "a red ball", None, None)
    assert rows[1]["path"] == "media/1.mp4" and np.float32(rows[1]["video"]).tolist() == want.tables["video"][0].tolist()
    assert json.loads(read.schema.metadata[b"omni_jax"])["vectors"] == want.made_with


@pytest.mark.jit
def test_command_writes_and_eval_reads_the_same_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_embeddings(tmp_path / "e.npz", table())
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(json.dumps({"id": "clip 0", "text": "a red ball", "video": "v.mp4"}) + "\n")
    (tmp_path / "v.mp4").write_bytes(b"x")
    out = tmp_path / "e.parquet"
    assert main(["export", str(tmp_path / "e.npz"), "--to", "parquet", "--out", str(out), "--manifest", str(manifest)]) == 0
    assert capsys.readouterr().out == f"{out}: 30 records, tables text, video\n"
    row = pq.read_table(out).to_pylist()[0]
    assert row["caption"] == "a red ball" and row["path"] == str(tmp_path / "v.mp4")
    printed = []
    for name in ("e.npz", "e.parquet"):
        assert main(["eval", str(tmp_path / name)]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "t2v" in printed[0]


def test_one_table_of_a_parquet_file_is_an_input(tmp_path: Path) -> None:
    export_parquet(table(), tmp_path / "e.parquet")
    found = read_inputs([f"video={tmp_path / 'e.parquet'}"])
    assert list(found.tables) == ["video"] and found.ids == table().ids
    chosen = read_embeddings(tmp_path / "e.parquet", lambda names: "text")
    assert list(chosen.tables) == ["text"]


def test_lists_of_other_programs_are_tables(tmp_path: Path) -> None:
    """A file that pandas or a vector store wrote: plain lists, other floating point types, whole numbers as ids, columns of its own."""
    rows = np.arange(12, dtype=np.float64).reshape(3, 4)
    for kind in (pa.list_(pa.float64()), pa.list_(pa.float16()), pa.large_list(pa.float32()), pa.list_(pa.float64(), 4)):
        columns = {
            "id": pa.array([7, 8, 9]),
            "text": pa.array([np.float16(r) for r in rows.tolist()] if "half" in str(kind) else rows.tolist(), kind),
        }
        pq.write_table(pa.table({**columns, "label": ["a", "b", "c"]}), tmp_path / "o.parquet")
        found = read_embeddings(tmp_path / "o.parquet")
        assert found.ids == ("7", "8", "9") and found.tables["text"].tolist() == rows.tolist()


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"name": ["a"], "text": [[1.0]]}, "has no column 'id'; it has name, text"),
        ({"id": ["a", "b"], "text": [[1.0], [1.0, 2.0]]}, "lists of column 'text' differ in size"),
        ({"id": ["a", "b"], "text": [[1.0, 2.0, 3.0], [1.0]]}, "lists of column 'text' differ in size"),
        ({"id": ["a"], "text": ["words"]}, "column 'text' is string; a table is a column of lists"),
        ({"id": ["a", None], "text": [[1.0], [2.0]]}, "row 1 has no id"),
        ({"id": ["a", "a"], "text": [[1.0], [2.0]]}, "1 ids "),
        ({"id": ["a"], "text": [[1]]}, "table 'text' holds int64"),
        ({"id": ["a"], "label": ["b"]}, "no tables beside 'ids'"),
        ({"id": [1.5], "text": [[1.0]]}, "expected one text or whole number"),
    ],
)
def test_other_columns_are_one_line(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        read_embeddings(write(tmp_path / "o.parquet", **columns))
    assert words in str(error.value) and str(tmp_path / "o.parquet") in str(error.value) and "\n" not in str(error.value)


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    export_parquet(table(), tmp_path / "e.parquet")
    whole = (tmp_path / "e.parquet").read_bytes()
    for content in (b"", b"PAR1", whole[: len(whole) // 2], b"\0" * 50 + whole[50:], np.random.default_rng(0).bytes(900)):
        (tmp_path / "d.parquet").write_bytes(content)
        with pytest.raises(InputError) as error:
            read_embeddings(tmp_path / "d.parquet")
        assert "d.parquet: " in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match="no such file"):
        read_embeddings(tmp_path / "none.parquet")


def test_pyarrow_that_is_not_installed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'omni-jax\[parquet\]'"):
        export_parquet(table(), tmp_path / "e.parquet")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "parquet", "--out", "o.npz"], "parquet is one embedding file; its name ends in .parquet"),
        (["--to", "npy", "--out", "o", "--factory", "Flat"], "--factory: is for --to faiss, and has no effect with --to npy"),
        (["--to", "int8", "--out", "o.npz", "--manifest", "m.jsonl"], "--manifest: is for --to parquet"),
    ],
)
def test_options_of_another_form_are_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main(["export", "e.npz", *arguments]) == 2
    assert words in capsys.readouterr().err
