"""`omni-jax search --queries`: many queries of a file, each with its own results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omni_jax.cli import queries
from omni_jax.cli.main import main
from omni_jax.cli.status import BAD_INPUT, DONE, DONE_WITH_SKIPPED
from omni_jax.retrieval import inputs
from tests.golden_set import GoldenSet


@pytest.fixture(scope="module")
def index(golden: GoldenSet, converted: Path, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("index") / "clips.npz"
    command = ["embed", "--model", str(converted), "--manifest", str(golden.manifest), "--out", str(out), "--tables", "text"]
    assert main([*command, *settings]) == DONE
    return out


@pytest.mark.jit
def test_golden_each_line_of_a_text_file_is_a_query(
    golden: GoldenSet, converted: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    captions = [record.text for record in golden.records[:3]]
    (tmp_path / "queries.txt").write_text("\n".join([captions[0], "", *captions[1:]]) + "\n", encoding="utf-8")
    command = ["search", "--model", str(converted), "--index", str(index), "--table", "text", "-k", "2"]
    capsys.readouterr()
    assert main([*command, "--queries", str(tmp_path / "queries.txt"), "--json"]) == DONE
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["query"] for row in found] == captions
    assert [row["results"][0]["id"] for row in found] == [record.id for record in golden.records[:3]]
    assert main([*command, "--text", captions[1], "--json"]) == DONE
    alone = json.loads(capsys.readouterr().out)
    assert [r["id"] for r in alone["results"]] == [r["id"] for r in found[1]["results"]]
    assert main([*command, "--queries", str(tmp_path / "queries.txt")]) == DONE
    assert capsys.readouterr().out.count("in table text of") == 3


@pytest.mark.jit
def test_golden_embed_cuts_vectors_and_search_finds_in_them(
    golden: GoldenSet, converted: Path, index: Path, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    caption, cut = golden.records[0].text, tmp_path / "cut.npz"
    command = ["embed", "--model", str(converted), "--manifest", str(golden.manifest), "--out", str(cut), "--tables", "text"]
    assert main([*command, *settings, "--truncate-dim", "8"]) == DONE
    found = []
    for file, more in ((cut, []), (index, ["--truncate-dim", "8"])):
        arguments = ["search", "--model", str(converted), "--index", str(file), "--table", "text", "--text", caption, "--json"]
        capsys.readouterr()
        assert main([*arguments, *more]) == DONE
        found.append(json.loads(capsys.readouterr().out))
    one, other = (row["results"] for row in found)
    assert [result["id"] for result in one] == [result["id"] for result in other] and one[0]["id"] == golden.records[0].id
    assert all(abs(a["score"] - b["score"]) < 1e-5 for a, b in zip(one, other, strict=True))
    assert main([*command, "--truncate-dim", "99999"]) == BAD_INPUT
    assert "--truncate-dim 99999: the model's vectors have" in capsys.readouterr().err


@pytest.mark.jit
def test_golden_a_query_that_cannot_be_embedded_is_skipped(
    golden: GoldenSet, converted: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lines = [{"id": "good", "text": golden.records[0].text}, {"id": "bad"}, {"id": "gone", "audio": "gone.wav"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    command = ["search", "--model", str(converted), "--index", str(index), "--queries", str(tmp_path / "q.jsonl"), "--json"]
    capsys.readouterr()
    assert main(command) == BAD_INPUT
    assert "the queries are of several kinds or modalities; choose the table to search with --table" in capsys.readouterr().err
    assert main([*command, "--table", "text"]) == DONE_WITH_SKIPPED
    out, err = capsys.readouterr()
    assert [json.loads(line)["query"] for line in out.splitlines()] == ["good"]
    assert "1 of 2 items cannot be embedded" in err and "gone.wav" in err and "1 lines are not queries" in err


@pytest.mark.parametrize(
    ("content", "words"), [("", "holds no queries; give a caption a line"), (b"\xff\xfe\xff", "cannot be read"), (None, "cannot be read")]
)
def test_a_file_without_queries_is_refused(content: str | bytes | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "queries.txt"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["search", "--model", "m", "--index", "i.npz", "--queries", str(file)]) == BAD_INPUT
    assert words in capsys.readouterr().err


def test_lines_end_as_files_end_them_and_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    """Editors write the mark; U+2028 and its like break no line of a file, so that captions and ids keep them."""
    file = tmp_path / "queries.txt"
    for data in (b"a dog\r\nrain\xe2\x80\xa8fog\r\n", b"a dog\nrain\xe2\x80\xa8fog", b"a dog\rrain\xe2\x80\xa8fog\r"):
        for mark in (b"", b"\xef\xbb\xbf"):
            file.write_bytes(mark + data)
            assert queries._of_file(str(file), None).names == ("a dog", "rain\u2028fog")
            assert inputs._read_ids(str(file)) == ("a dog", "rain\u2028fog")


def test_a_table_of_queries_is_read_as_a_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "q.csv").write_text("id,text\na,a dog\nb\n")
    found = queries._of_file(str(tmp_path / "q.csv"), None)
    assert (found.names, [item["text"] for item in found.items]) == (("a",), ["a dog"])
    assert "1 lines are not queries; the first: " in capsys.readouterr().err
