"""Vectors cut to their first dimensions: by the commands over embedding files, and noticed where they meet whole ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax.cli.main import main
from omni_jax.retrieval.embedding_file import read_embeddings, write_embeddings
from omni_jax.retrieval.rows import TRUNCATE_DIM, finished, l2_normalize, truncated
from omni_jax.retrieval.search import Index
from omni_jax.types import EmbeddingTable, InputError

WIDTH, DIM = 16, 4


def table(seed: int = 0, **made_with: Any) -> EmbeddingTable:
    rng = np.random.default_rng(seed)
    text = l2_normalize(rng.standard_normal((30, WIDTH)))
    video = l2_normalize(text + 0.4 * rng.standard_normal((30, WIDTH)))
    return EmbeddingTable(tuple(f"c{i}" for i in range(30)), {"text": text, "video": video}, made_with={"normalize": True, **made_with})


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    write_embeddings(tmp_path / "clips.npz", table())
    return tmp_path / "clips.npz"


def test_a_table_is_cut_as_encode_cuts_and_says_so() -> None:
    whole = table()
    cut = truncated(whole, DIM)
    assert cut.made_with == {"normalize": True, TRUNCATE_DIM: DIM} and TRUNCATE_DIM not in (whole.made_with or {})
    for name, rows in whole.tables.items():
        np.testing.assert_array_equal(cut.tables[name], finished(rows, DIM, True, "float32"))
        np.testing.assert_allclose(np.linalg.norm(cut.tables[name], axis=1), 1, rtol=1e-6)
    as_made = truncated(table(normalize=False), DIM)
    np.testing.assert_array_equal(as_made.tables["text"], whole.tables["text"][:, :DIM])
    assert truncated(whole, None) is whole
    with pytest.raises(InputError, match="truncate_dim 17: table 'text' has 16 dimensions"):
        truncated(whole, WIDTH + 1)


def test_an_index_that_was_cut_cuts_its_queries() -> None:
    whole, cut = table(), truncated(table(), DIM)
    index = Index(cut.tables["video"], made_with=cut.made_with)
    for one, other in zip(index.search(whole.tables["text"], 5), index.search(cut.tables["text"], 5), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    with pytest.raises(InputError, match="the query is 16 wide, table 'index' is 4"):
        Index(cut.tables["video"]).search(whole.tables["text"])


@pytest.mark.jit
def test_eval_and_export_take_the_dimensions_and_agree(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(clips), "--to", "parquet", "--out", str(tmp_path / "cut.parquet"), "--truncate-dim", str(DIM)]) == 0
    assert read_embeddings(tmp_path / "cut.parquet").made_with == {"normalize": True, TRUNCATE_DIM: DIM}
    results = []
    for arguments in ([str(tmp_path / "cut.parquet")], [str(clips), "--truncate-dim", str(DIM)], [str(clips)]):
        assert main(["eval", *arguments, "--json", str(tmp_path / "result.json")]) == 0
        results.append(json.loads((tmp_path / "result.json").read_text()))
    assert results[0] == results[1] and results[0]["directions"] != results[2]["directions"]
    capsys.readouterr()
    assert main(["eval", str(clips), "--truncate-dim", str(WIDTH + 1)]) == 2
    assert "truncate_dim 17: table 'text' has 16 dimensions; keep so many at most" in capsys.readouterr().err


def test_cut_and_whole_vectors_are_not_mixed(tmp_path: Path) -> None:
    """Of the same width, too: a model of a width of DIM and one that was cut to it."""
    first, second = (EmbeddingTable((name,), {"text": np.ones((1, DIM), np.float32)}, made_with={"normalize": True}) for name in "ab")
    write_embeddings(tmp_path / "a.npz", first)
    write_embeddings(tmp_path / "b.npz", truncated(second, DIM))
    with pytest.raises(InputError, match=r"b.npz: was made otherwise than .*a.npz: truncate_dim is None there, 4 here"):
        read_embeddings([tmp_path / "a.npz", tmp_path / "b.npz"])
