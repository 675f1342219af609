"""The printed tables, letter by letter, and `omni-jax eval` from files to JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax.cli import eval as eval_command
from omni_jax.cli.main import main
from omni_jax.retrieval import TIES, evaluate, format_comparison, format_table, write_embeddings
from omni_jax.retrieval.directions import DIRECTIONS
from omni_jax.retrieval.published import BENCH, OMNIRETRIEVER_BENCH, OTHER_BENCHMARKS, published, sources
from omni_jax.types import EmbeddingTable
from tests.tolerances import assert_close

# Cosines text x video: (1, 0, 0.6), (0, 1, 0.8), (0.8, 0.6, 0.96). t2v finds 1st, 1st, 1st; v2t 1st, 1st, 1st.
# Cosines text x audio, audio constant (0, 1): rows (0, 0, 0), (1, 1, 1), (0.6, 0.6, 0.6): t2a all tied; a2t places 3, 1, 2.
TEXT = np.array([[1, 0], [0, 2], [0.8, 0.6]], np.float32)
VIDEO = np.array([[3, 0], [0, 1], [0.6, 0.8]], np.float32)
AUDIO = np.array([[0, 1], [0, 1], [0, 1]], np.float32)
SMALL = {"text": TEXT, "video": VIDEO, "audio": AUDIO}

GOLDEN = """\
direction      R@1         95 %     R@5    R@10  NDCG@10     MRR  median  mean  ties
----------  ------  -----------  ------  ------  -------  ------  ------  ----  ----
t2v         100.00  100.0-100.0  100.00  100.00   100.00  100.00     1.0   1.0     0
v2t         100.00  100.0-100.0  100.00  100.00   100.00  100.00     1.0   1.0     0
t2a           0.00      0.0-0.0  100.00  100.00    50.00   33.33     3.0   3.0     3
a2t          33.33    0.0-100.0  100.00  100.00    71.03   61.11     2.0   2.0     0
v2a           0.00      0.0-0.0  100.00  100.00    50.00   33.33     3.0   3.0     3
a2v          33.33    0.0-100.0  100.00  100.00    71.03   61.11     2.0   2.0     0
----------  ------  -----------  ------  ------  -------  ------  ------  ----  ----
AVG-single   44.44    33.3-66.7
AVG-dual         -
AVG-all          -

3 records; rates, NDCG and MRR in percent; averages are means of R@1.
95 %: bootstrap interval of R@1 over the records (2000 resamples, seed 0).
AVG-dual: no value, needs t2av, av2t, a2tv, tv2a, v2at, at2v.
AVG-all: no value, needs t2av, av2t, a2tv, tv2a, v2at, at2v.
Ties: 6 of 18 queries are decided by a tie (33.3 %); a candidate level with the relevant one counts as better (worst)."""


@pytest.mark.jit
def test_table_of_a_case_by_hand() -> None:
    assert format_table(evaluate(SMALL, ties="worst")) == GOLDEN


@pytest.mark.jit
def test_optimistic_table_warns_of_its_ties() -> None:
    text = format_table(evaluate(SMALL))
    assert (
        "Ties: 6 of 18 queries" in text
        and "Ties count in the query's favour (optimistic, as in the published scorer)." in text
        and "--ties worst" in text
    )
    untied = format_table(evaluate({"text": TEXT, "video": VIDEO}))
    assert "Ties: 0 of 6 queries are decided by a tie (0.0 %)" in untied and "--ties worst" not in untied


def test_comparison_by_hand() -> None:
    ours: dict[str, Any] = {"n": 3, "tie_policy": "worst", "directions": {"a2t": {"R@1": 10.0}, "t2v": {"R@1": 7.125}}, "AVG-single": 9.5}
    known = {"Gemini": OMNIRETRIEVER_BENCH["Gemini Embedding 2"]}
    assert (
        format_comparison({"mine.npz": ours, **known})
        == """\
R@1         mine.npz  Gemini
----------  --------  ------
t2v             7.12       -
a2t            10.00    1.48
v2a                -   13.80
----------  --------  ------
AVG-single      9.50   25.44
AVG-dual           -   40.80
AVG-all            -   33.12"""
    )
    other = {**ours, "n": 4, "tie_policy": "optimistic"}
    noted = format_comparison({"a": ours, "b": other})
    assert "galleries differ in size, so these columns are not comparable: a 3, b 4." in noted
    assert "tie policies differ: a worst, b optimistic." in noted


def test_published_rows_are_consistent() -> None:
    for row in OMNIRETRIEVER_BENCH.values():
        assert_close((row["AVG-single"] + row["AVG-dual"]) / 2, row["AVG-all"], "published_percent")
        assert set(row["directions"]) <= set(DIRECTIONS)


def test_every_published_row_names_its_source() -> None:
    for benchmark in (BENCH, *OTHER_BENCHMARKS):
        for name, row in published(benchmark).items():
            assert name.endswith(" (published)") and row["source"], name
            assert set(row["directions"]) <= set(DIRECTIONS)
    clotho = published("clotho")
    assert clotho["Gemini Embedding 2 (published)"]["directions"]["t2a"] == {"R@1": 5.2}
    assert published("vatex")["Omni-Embed-Nemotron-3B (published)"]["directions"]["t2v"] == {"R@1": 47.5}
    lines = sources(clotho).splitlines()
    assert lines[0] == "Published: OmniRetriever-7B: arXiv 2605.26641." and "762ca7d6" in lines[1] and "mteb" in lines[2]


@pytest.mark.jit
def test_eval_says_where_published_figures_stand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "clips.npz"
    write_embeddings(path, EmbeddingTable(("a", "b", "c"), SMALL))
    assert main(["eval", str(path), "--compare", "published:msvd"]) == 0
    shown = capsys.readouterr().out
    assert "77.10" in shown and "Omni-Embed-Nemotron-3B, Gemini Embedding 2: README of github.com/yunzeliu/Omni-Retriever" in shown


# ---------------------------------------------------------------------------------------------------------------- omni-jax eval


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "part0.npz", tmp_path / "part1.npz"
    write_embeddings(paths[0], EmbeddingTable(("a", "b"), {name: rows[:2] for name, rows in SMALL.items()}))
    write_embeddings(paths[1], EmbeddingTable(("c",), {name: rows[2:] for name, rows in SMALL.items()}), official_keys=True)
    return paths


@pytest.mark.jit
def test_eval_reads_parts_prints_and_writes_json(files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    assert main(["eval", str(files[0]), str(files[1]), "--ties", "worst", "--json", str(out)]) == 0
    assert capsys.readouterr().out == GOLDEN + "\n"
    result = json.loads(out.read_text())
    assert result == json.loads(json.dumps(evaluate(SMALL, ties="worst")))
    assert result["n"] == 3 and result["AVG-dual"] is None and "t2av" in result["missing"]["AVG-dual"]
    assert_close(result["directions"]["a2t"]["MRR"], 100 * (1 / 3 + 1 + 1 / 2) / 3, "metric")
    assert_close(result["AVG-single"], 100 * (1 + 1 + 0 + 1 / 3 + 0 + 1 / 3) / 6, "metric")


@pytest.mark.jit
def test_eval_compares_with_files_results_and_the_published_rows(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, result = tmp_path / "whole.npz", tmp_path / "whole.json"
    write_embeddings(whole, EmbeddingTable(("a", "b", "c"), SMALL))
    assert main(["eval", str(whole), "--json", str(result)]) == 0
    capsys.readouterr()
    compare = ["--compare", str(whole), "--compare", str(result), "--compare", "published"]
    assert main(["eval", str(files[0]), str(files[1]), *compare]) == 0
    table = capsys.readouterr().out.split("\n\n")[2].splitlines()
    assert (
        table[0].split()
        == "R@1 part0.npz +1 whole.npz whole.json".split() + " ".join(f"{name} (published)" for name in OMNIRETRIEVER_BENCH).split()
    )
    a2t = next(line for line in table if line.startswith("a2t")).split()
    assert a2t == ["a2t", "33.33", "33.33", "33.33", "-", "-", "1.48", "11.92"]


@pytest.mark.jit
def test_eval_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad, json_file, out = tmp_path / "nan.npz", tmp_path / "x.json", tmp_path / "out.json"
    write_embeddings(bad, EmbeddingTable(("a", "b", "c"), {**SMALL, "video": VIDEO * np.float32(np.nan)}))
    good = tmp_path / "good.npz"
    write_embeddings(good, EmbeddingTable(("a", "b", "c"), SMALL))
    json_file.write_text('{"directions": {}}')
    cases = {
        (str(bad), "--json", str(out)): "table 'video': 3 rows hold NaN or infinity: 0 (a), 1 (b), 2 (c)",
        (str(tmp_path / "none.npz"),): "none.npz: no such file",
        (str(good), str(good)): "id 'a' is in",
        (str(good), "--compare", str(json_file)): "x.json: holds no directions",
        (str(good), "--compare", str(tmp_path / "none.json")): "none.json",
        (str(good), "--json", str(tmp_path / "none" / "out.json")): "does not exist",
    }
    for arguments, words in cases.items():
        assert main(["eval", *arguments]) == 2
        captured = capsys.readouterr()
        assert words in captured.err and captured.err.count("\n") == 1 and "AVG" not in captured.out
    assert not out.exists()


def test_eval_help_ends_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--help"]) == 0
    assert capsys.readouterr().out.rstrip().splitlines()[-1].strip() == eval_command.EXAMPLE
    assert eval_command.TIES == TIES
