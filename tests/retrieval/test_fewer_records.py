"""Tables that some records lack: embedded, kept, read, scored and searched without them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from omni_jax.cli.main import main
from omni_jax.retrieval import evaluate, read_embeddings, write_embeddings
from omni_jax.retrieval.embedding_pass import assemble, embedding_pass
from omni_jax.retrieval.export import export_int8, export_npy
from omni_jax.retrieval.journal import Journal
from omni_jax.types import EmbeddingTable, EncoderBatch, Features, InputError, Record, TokenizedClip
from tests.tolerances import assert_close

HAS = {"a": ("text", "video"), "b": ("text",), "c": ("video",), "d": ("text", "video"), "e": ("text",)}
VECTOR = {name: np.eye(5, dtype=np.float32)[i] for i, name in enumerate(HAS)}
RECORDS = [Record(name, text=f"caption of {name}") for name in HAS]


def parts(group: int) -> list:
    """What a pass over the records gives whose clips have some of the tables each."""
    batch = EncoderBatch(vision=(), audio=(), beats=(), rows=(), owners=(), used_tokens=1, total_tokens=1)
    waiting: list[list[str]] = []

    def plan(clips):
        waiting.append([clip.features.record.id for clip in clips])
        return batch

    def encode(_):
        names = waiting.pop(0)
        return iter([(i, table, VECTOR[name]) for table in ("text", "video") for i, name in enumerate(names) if table in HAS[name]])

    clips = [(r, TokenizedClip(Features(r), {})) for r in RECORDS]
    return list(embedding_pass(clips, ("text", "video"), plan=plan, encode=encode, group=group))


@pytest.fixture
def table() -> EmbeddingTable:
    return assemble(RECORDS, parts(2)).table


@pytest.mark.parametrize("group", [1, 2, 5])
def test_a_record_stands_in_the_tables_that_it_fills(group: int) -> None:
    found = assemble(RECORDS, parts(group)).table
    assert found.ids == tuple(HAS) and found.own == {"text": ("a", "b", "d", "e"), "video": ("a", "c", "d")}
    for name, rows in found.tables.items():
        np.testing.assert_array_equal(rows, [VECTOR[i] for i in found.ids_of(name)])


def test_a_journal_keeps_whose_rows_they_are(tmp_path: Path, table: EmbeddingTable) -> None:
    made = parts(2)
    journal = Journal(epath.Path(tmp_path) / "j", {})
    for part in made[:2]:
        journal.add(part)
    del journal
    again = Journal(epath.Path(tmp_path) / "j", {})
    found = assemble(RECORDS, [*again.parts, *made[2:]]).table
    assert (found.ids, found.own) == (table.ids, table.own)


def test_a_file_keeps_them_too_in_one_piece_and_in_parts(tmp_path: Path, table: EmbeddingTable) -> None:
    write_embeddings(tmp_path / "whole.npz", table)
    found = read_embeddings(tmp_path / "whole.npz")
    assert (found.ids, dict(found.own)) == (table.ids, dict(table.own))
    halves = []
    for i in range(2):
        records = RECORDS[i::2]
        kept = {name: [k for k in table.ids_of(name) if k in {r.id for r in records}] for name in table.tables}
        rows = {name: np.stack([VECTOR[k] for k in ids]) for name, ids in kept.items()}
        halves.append(tmp_path / f"half{i}.npz")
        ids = tuple(r.id for r in records)
        write_embeddings(halves[-1], EmbeddingTable(ids, rows, own={n: tuple(k) for n, k in kept.items() if len(k) < len(ids)}))
    joined = read_embeddings(halves)
    assert set(joined.ids) == set(table.ids) and {n: set(i) for n, i in joined.own.items()} == {n: set(i) for n, i in table.own.items()}
    for name in table.tables:
        np.testing.assert_array_equal(joined.tables[name], [VECTOR[i] for i in joined.ids_of(name)])
    with pytest.raises(InputError, match="'video' are not among those of the file"):
        write_embeddings(tmp_path / "bad.npz", EmbeddingTable(("a",), {"video": np.ones((1, 5))}, own={"video": ("z",)}))


@pytest.mark.jit
def test_a_query_without_its_answer_is_not_asked(tmp_path: Path, table: EmbeddingTable, capsys: pytest.CaptureFixture[str]) -> None:
    write_embeddings(tmp_path / "whole.npz", table)
    assert main(["eval", str(tmp_path / "whole.npz"), "--json", str(tmp_path / "r.json")]) == 0
    assert "t2v 2 in 3" in capsys.readouterr().out and "v2t" in (tmp_path / "r.json").read_text()
    found = json.loads((tmp_path / "r.json").read_text())["directions"]
    assert {name: (row["queries"], row["gallery"], row["R@1"]) for name, row in found.items()} == {
        "t2v": (2, 3, 100.0),
        "v2t": (2, 4, 100.0),
    }
    assert_close(evaluate(table)["directions"]["t2v"]["R@1"], 100.0, "metric")


def test_exports_that_have_one_list_of_ids_refuse_them(tmp_path: Path, table: EmbeddingTable) -> None:
    with pytest.raises(InputError, match=r"of 5 records some lack a table \(text 4, video 3\)"):
        export_npy(table, tmp_path / "npy")
    export_int8(table, tmp_path / "small.npz")
    assert dict(read_embeddings(tmp_path / "small.npz").own) == dict(table.own)
