"""Search against sorting in float64, and exports there and back."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from omni_jax.cli.main import main
from omni_jax.retrieval import evaluate, export, read_embeddings, write_embeddings
from omni_jax.retrieval import search as search_module
from omni_jax.retrieval.export import export_faiss, export_int8, export_npy, quantized, recall_loss
from omni_jax.retrieval.inputs import read_inputs
from omni_jax.retrieval.search import search, target_table
from omni_jax.types import EmbeddingTable, InputError
from tests.retrieval import naive
from tests.tolerances import assert_close


def table(n: int = 30, width: int = 16) -> EmbeddingTable:
    rng = np.random.default_rng(n)
    shared = rng.normal(size=(n, width))
    rows = {name: (shared + 0.6 * rng.normal(size=shared.shape)).astype(np.float32) for name in ("text", "video", "av")}
    return EmbeddingTable(tuple(f"clip {i}" for i in range(n)), rows)


@pytest.mark.jit
@pytest.mark.parametrize(("n", "k", "block"), [(1, 10, 8), (7, 3, 8), (8, 8, 8), (50, 10, 8), (50, 20, 8), (50, 60, 64)])
def test_search_is_sorting(monkeypatch: pytest.MonkeyPatch, n: int, k: int, block: int) -> None:
    monkeypatch.setattr(search_module, "BLOCK", block)
    rng = np.random.default_rng(n)
    queries, rows = rng.normal(size=(3, 12)).astype(np.float32), rng.normal(size=(n, 12)).astype(np.float32)
    rows[n // 2] = rows[0]  # level: the first comes first
    scores, found = search(queries, rows, k)
    want = naive.cosines(queries, rows)
    order = np.argsort(-want, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found, order)
    assert_close(scores, np.take_along_axis(want, order, axis=1), "cosine_score")


def test_level_rows_come_in_their_order_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "BLOCK", 16)
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(101, 33)).astype(np.float32)
    same = [3, 15, 16, 40, 77, 99, 100]
    rows[same] = rows[3]
    for count in (1, 5):
        cosines, found = search(np.repeat(rows[3:4] * 7, count, axis=0), rows * 1e-3, 5)
        assert found.tolist() == [same[:5]] * count and np.ptp(cosines) == 0


def test_rows_of_any_length_are_found() -> None:
    rows = np.eye(4, dtype=np.float32) * np.array([[1e-25], [1.0], [1e25], [3.0]], np.float32)
    _, found = search(np.array([[4.0, 3, 2, 1]]), rows, 4)
    assert found.tolist() == [[0, 1, 2, 3]]


def test_search_refuses_what_it_cannot_rank() -> None:
    rows = np.eye(3, dtype=np.float32)
    with pytest.raises(InputError, match="the query is 4 wide, table 'av' is 3"):
        search(np.ones((1, 4)), rows, name="av")
    with pytest.raises(InputError, match=r"table 'av': 1 rows hold only zeros: 1 \(b\)"):
        search(rows[:1], rows * np.array([[1], [0], [1]]), name="av", ids="abc")
    with pytest.raises(InputError, match="ask for at least 1"):
        search(rows[:1], rows, 0)


def test_a_query_looks_for_what_it_lacks() -> None:
    everything = ("text", "video", "audio", "av", "tv", "at", "tva")
    assert [target_table(q, everything) for q in ("text", "audio", "video", "av")] == ["av", "video", "audio", "text"]
    assert target_table("text", ("text", "audio")) == "audio" and target_table("audio", ("audio",)) == "audio"
    assert target_table("text", everything, "tv") == "tv"
    with pytest.raises(InputError, match="no table 'tv'; it holds text, audio"):
        target_table("text", ("text", "audio"), "tv")


def test_npy_export_is_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    want = table()
    write_embeddings(tmp_path / "e.npz", want)
    assert main(["export", str(tmp_path / "e.npz"), "--to", "npy", "--out", str(tmp_path / "out")]) == 0
    assert "text.npy, video.npy, av.npy, ids.txt; 30 records" in capsys.readouterr().out
    got = read_inputs([str(tmp_path / "out" / f"{name}.npy") for name in want.tables])
    assert got.ids == want.ids
    for name, rows in want.tables.items():
        assert_close(got.tables[name], rows, "round_trip")
    with pytest.raises(InputError, match="line break"):
        export_npy(EmbeddingTable(("a\nb",), {"text": np.ones((1, 2), np.float32)}), tmp_path / "out")
    with pytest.raises(InputError, match="is a file; name a folder"):
        export_npy(want, tmp_path / "e.npz")


@pytest.mark.jit
def test_int8_export_is_an_embedding_file_and_its_loss_is_what_eval_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    want = table(200, 8)
    write_embeddings(tmp_path / "e.npz", want)
    out = tmp_path / "small.npz"
    assert main(["export", str(tmp_path / "e.npz"), "--to", "int8", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    got = read_embeddings(out)
    assert got.ids == want.ids and out.stat().st_size < 0.75 * (tmp_path / "e.npz").stat().st_size
    for name, rows in want.tables.items():
        assert_close(got.tables[name], rows, "int8")
    before, after = (evaluate(t, resamples=0)["directions"] for t in (want, got))
    loss = recall_loss(want, export_int8(want, out))
    assert set(loss) == {"t2v", "v2t", "t2av", "av2t"}
    for name, metrics in loss.items():
        assert metrics == {key: (before[name][key], after[name][key]) for key in ("R@1", "R@5", "R@10")}
        assert f"{name} " in printed and f"{metrics['R@1'][1] - metrics['R@1'][0]:+.2f}" in printed
    assert any(metrics[key][0] != metrics[key][1] for metrics in loss.values() for key in metrics), "the fixture must lose something"


@pytest.mark.jit
def test_the_loss_of_a_large_file_is_measured_by_a_sample_of_its_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    want = table(300, 8)
    held = export_int8(want, tmp_path / "small.npz")
    sampled = recall_loss(want, held, queries=120)
    rows = np.sort(np.random.default_rng(0).choice(300, 120, replace=False))
    for name, (query, gallery) in {"t2v": ("text", "video"), "av2t": ("av", "text")}.items():
        for side, tables in enumerate((want.tables, held.tables)):
            places = naive.ranks(naive.cosines(tables[query][rows], tables[gallery]), rows.tolist(), range(300))
            for k in (1, 5, 10):
                want_rate = 100 * np.mean([better < k for better, _ in places.values()])
                assert_close(sampled[name][f"R@{k}"][side], want_rate, "metric")
    assert recall_loss(want, held, queries=300) == recall_loss(want, held)
    write_embeddings(tmp_path / "e.npz", want)
    command = ["export", str(tmp_path / "e.npz"), "--out", str(tmp_path / "o.npz"), "--to", "int8"]
    assert main([*command, "--queries", "20"]) == 0
    assert "Recall with 20 of the records, drawn with seed 0, as queries:" in capsys.readouterr().out
    assert main([*command, "--queries", "0"]) == 0
    assert "R@1" not in capsys.readouterr().out
    assert main(["export", str(tmp_path / "e.npz"), "--out", str(tmp_path / "o"), "--to", "npy", "--queries", "20"]) == 2
    assert "--queries: is for --to int8" in capsys.readouterr().err


def test_int8_values_by_hand() -> None:
    values, scale = quantized(np.array([[1.27, -0.635, 0.012], [0, 0, 0]], np.float32))
    assert values.tolist() == [[127, -64, 1], [0, 0, 0]]
    assert_close(scale, [0.01, 0.0], "int8_scale")


def test_int8_of_one_table_says_that_nothing_can_be_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_embeddings(tmp_path / "e.npz", EmbeddingTable(("a",), {"text": np.ones((1, 4), np.float32)}))
    assert main(["export", str(tmp_path / "e.npz"), "--to", "int8", "--out", str(tmp_path / "o.npz")]) == 0
    assert "the loss of recall was not measured: no direction" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "e.npz"), "--to", "int8", "--out", str(tmp_path / "o")]) == 2


def test_damaged_scales_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "e.npz", ids=np.array(["a"]), text=np.ones((1, 4), np.int8), text_scale=np.ones(2, np.float32))
    with pytest.raises(InputError, match="its scales do not fit"):
        read_embeddings(tmp_path / "e.npz")


def test_faiss_that_is_not_installed_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    write_embeddings(tmp_path / "e.npz", table())
    assert main(["export", str(tmp_path / "e.npz"), "--to", "faiss", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "omni-jax: faiss is not installed; run pip install 'omni-jax[faiss]', or export --to npy\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.jit
def test_faiss_finds_in_an_exported_index_what_search_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With FAISS itself: the command writes, FAISS reads, and its neighbours and cosines are those of `search`."""
    import faiss

    want = table(50)
    write_embeddings(tmp_path / "e.npz", want)
    assert main(["export", str(tmp_path / "e.npz"), "--to", "faiss", "--out", str(tmp_path / "out")]) == 0
    assert "text.faiss, video.faiss, av.faiss, ids.txt; 50 records" in capsys.readouterr().out
    assert (tmp_path / "out" / "ids.txt").read_text().splitlines() == list(want.ids)
    for name, rows in want.tables.items():
        index = faiss.read_index(str(tmp_path / "out" / f"{name}.faiss"))
        assert (index.ntotal, index.d, index.metric_type) == (50, 16, faiss.METRIC_INNER_PRODUCT)
        wide = rows.astype(np.float64)
        assert_close(index.reconstruct_n(0, 50), wide / np.sqrt((wide * wide).sum(1, keepdims=True)), "cosine_score")
        queries = want.tables["text"][:7]
        scores, found = index.search(queries / np.linalg.norm(queries, axis=1, keepdims=True), 10)
        expected, places = search(queries, rows, 10)
        np.testing.assert_array_equal(found, places)
        assert_close(scores, expected, "cosine_score")


@pytest.mark.costly
@pytest.mark.parametrize("factory", ["IVF4,Flat", "HNSW8", "SQ8", "PCA8,IVF4,SQ8", "IDMap2,Flat", "IVF4,PQ4x4"])
@pytest.mark.parametrize("ids", ["names", "numbers"])
def test_faiss_index_of_any_factory_answers_with_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str, ids: str) -> None:
    import faiss

    monkeypatch.setattr(export, "BLOCK", 64)  # several blocks
    want = table(300)
    if ids == "numbers":
        want = dataclasses.replace(want, ids=tuple(str(7 * i + 3) for i in reversed(range(300))))
    write_embeddings(tmp_path / "e.npz", want)
    assert main(["export", str(tmp_path / "e.npz"), "--to", "faiss", "--out", str(tmp_path / "out"), "--factory", factory]) == 0
    index = faiss.read_index(str(tmp_path / "out" / "video.faiss"))
    assert (index.ntotal, index.metric_type) == (300, faiss.METRIC_INNER_PRODUCT)
    if (cells := faiss.try_extract_index_ivf(index)) is not None:
        cells.nprobe = 4
    rows = want.tables["video"]
    found = index.search(rows / np.linalg.norm(rows, axis=1, keepdims=True), 1)[1][:, 0]
    answers = np.arange(300) if ids == "names" else np.array([int(record) for record in want.ids])
    if factory in ("IVF4,Flat", "HNSW8", "SQ8", "IDMap2,Flat"):
        np.testing.assert_array_equal(found, answers)
    else:  # codes of few bits
        assert np.isin(found, answers).all() and np.mean(found == answers) > 0.3


def test_faiss_index_of_a_table_that_lacks_records_answers_with_lines_of_ids(tmp_path: Path) -> None:
    import faiss

    whole = table(6)
    kept = [0, 2, 5]
    some = dataclasses.replace(
        whole, tables={**whole.tables, "av": whole.tables["av"][kept]}, own={"av": tuple(whole.ids[i] for i in kept)}
    )
    export_faiss(some, tmp_path / "out")
    index = faiss.read_index(str(tmp_path / "out" / "av.faiss"))
    rows = some.tables["av"]
    assert index.search(rows / np.linalg.norm(rows, axis=1, keepdims=True), 1)[1][:, 0].tolist() == kept


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("Fl@t", "could not parse index string Fl@t"),
        ("IVF64,Flat", "Number of training points (50) should be at least as large as number of clusters (64)"),
        ("PQ5", "PQ5"),
    ],
)
def test_faiss_index_that_cannot_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], factory: str, words: str) -> None:
    write_embeddings(tmp_path / "e.npz", table(50))
    assert main(["export", str(tmp_path / "e.npz"), "--to", "faiss", "--out", str(tmp_path / "out"), "--factory", factory]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"omni-jax: index {factory!r} cannot be made of the 50 rows of table 'text': faiss says ") and words in line
    assert "\n" not in line and not list((tmp_path / "out").glob("*.faiss"))


def test_faiss_is_given_no_row_without_a_direction(tmp_path: Path) -> None:
    want = table()
    want.tables["av"][3] = 0
    with pytest.raises(InputError, match="table 'av': record 'clip 3' holds NaN, infinity or only zeros"):
        export_faiss(want, tmp_path / "out")
