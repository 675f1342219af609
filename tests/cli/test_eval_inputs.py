"""`eval` over vectors from elsewhere, several captions a clip and rounded tables; `bench-data` and `search` from the command line."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from omni_jax.cli.main import main
from omni_jax.config import Preset
from omni_jax.retrieval import evaluate, read_embeddings, write_embeddings
from omni_jax.types import EmbeddingTable
from tests.conversion.torch_files import write_torch_file
from tests.golden_set import GoldenSet
from tests.retrieval import naive
from tests.tolerances import assert_close

pytestmark = pytest.mark.jit

RNG = np.random.default_rng(0)
SHARED = RNG.normal(size=(40, 8))
TEXT, VIDEO = ((SHARED + 0.7 * RNG.normal(size=SHARED.shape)).astype(np.float32) for _ in range(2))


def test_eval_scores_vectors_of_any_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_torch_file(tmp_path / "s.bin", {"text_embeds": TEXT, "mllm_embeds": VIDEO})
    np.save(tmp_path / "a.npy", TEXT)
    np.save(tmp_path / "b.npy", VIDEO)
    write_embeddings(tmp_path / "e.npz", EmbeddingTable(tuple(map(str, range(40))), {"text": TEXT, "video": VIDEO}))
    tables = [f"text={tmp_path / 'a.npy'}", f"video={tmp_path / 'b.npy'}"]
    want = json.loads(json.dumps(evaluate({"text": TEXT, "video": VIDEO})))
    for names in ([f"video={tmp_path / 's.bin'}"], tables, [str(tmp_path / "e.npz")]):
        assert main(["eval", *names, "--json", str(tmp_path / "r.json")]) == 0
        assert json.loads((tmp_path / "r.json").read_text()) == want
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "e.npz"), "--compare", ",".join(tables)]) == 0
    line = next(line for line in capsys.readouterr().out.split("\n\n")[2].splitlines() if line.startswith("t2v"))
    assert len(set(line.split()[1:3])) == 1


def test_eval_in_bfloat16_prints_what_every_metric_loses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    text = rng.normal(size=(300, 4)).astype(np.float32)
    tables = {"text": text, "video": text + rng.normal(size=text.shape).astype(np.float32)}
    write_embeddings(tmp_path / "e.npz", EmbeddingTable(tuple(map(str, range(300))), tables))
    assert main(["eval", str(tmp_path / "e.npz"), "--storage", "bfloat16", "--json", str(tmp_path / "r.json")]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    whole = evaluate(tables)["directions"]
    change = result["storage"]["change"]
    assert set(change) == {"t2v", "v2t"} and {"R@1", "R@5", "R@10", "NDCG@10", "MRR", "median_rank", "mean_rank", "ties"} <= set(
        change["t2v"]
    )
    for name, row in change.items():
        for key, value in row.items():
            assert_close(value, result["directions"][name][key] - whole[name][key], "metric")
    assert any(value for row in change.values() for value in row.values()), "the fixture must change somewhere"
    assert "Kept as bfloat16, less kept as float32:" in capsys.readouterr().out


@pytest.mark.jit
def test_both_sides_of_a_comparison_are_kept_in_the_same_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    text = rng.normal(size=(300, 4)).astype(np.float32)
    tables = {"text": text, "video": text + rng.normal(size=text.shape).astype(np.float32)}
    file = str(tmp_path / "e.npz")
    write_embeddings(file, EmbeddingTable(tuple(f"c{i}" for i in range(300)), tables))
    out = ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    assert main(["eval", file, "--storage", "bfloat16", "--compare", file, *out]) == 0
    differences = json.loads((tmp_path / "r.json").read_text())["comparisons"][file]
    assert {row["difference"] for row in differences.values()} == {0.0}
    assert main(["eval", file, "--compare", str(tmp_path / "r.json")]) == 0
    assert "Note: e.npz was scored with tables kept as float32, r.json as bfloat16." in capsys.readouterr().out


@pytest.mark.jit
@pytest.mark.parametrize("own", [True, False])
def test_captions_that_are_not_asked_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str], own: bool) -> None:
    """Clip ids with '#' are clips, whatever a caption's number looks like; misspelt owners are said."""
    ids = tuple(f"a#{i}" for i in range(5))
    write_embeddings(tmp_path / "c.npz", EmbeddingTable(ids, {"video": VIDEO[:5]}))
    names = ids if own else (*(f"{name}#0" for name in ids[:3]), "b#3#0", "c#4#0")
    write_embeddings(tmp_path / "t.npz", EmbeddingTable(names, {"text": TEXT[:5]}))
    command = ["eval", str(tmp_path / "c.npz"), "--captions", str(tmp_path / "t.npz"), "--json", str(tmp_path / "r.json")]
    assert main(command) == 0
    out, result = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    assert result["directions"]["t2v"]["queries"] == (5 if own else 3)
    if own:
        assert "left_out" not in result and "left out" not in out
        return
    assert result["left_out"] == {"captions": 2, "clips": 2}
    assert "Captions: 2 of 5 belong to no clip here and were left out, the first 'b#3#0'." in out
    assert "Clips: 2 of 5 have no caption: no query asks for them; the first 'a#3'." in out


@pytest.mark.jit
def test_a_caption_of_two_clips_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_embeddings(tmp_path / "c.npz", EmbeddingTable(("a", "a#1"), {"video": VIDEO[:2]}))
    write_embeddings(tmp_path / "t.npz", EmbeddingTable(("a#0", "a#1"), {"text": TEXT[:2]}))
    assert main(["eval", str(tmp_path / "c.npz"), "--captions", str(tmp_path / "t.npz")]) == 2
    assert "caption 'a#1' may be of clip 'a' or of clip 'a#1'" in capsys.readouterr().err


@pytest.mark.jit
@pytest.mark.parametrize(("name", "cells"), [("clotho", {"t2a": "19.14", "a2t": "16.10"}), ("msvd", {"t2v": "65.60"})])
def test_published_figures_of_other_benchmarks_stand_beside_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, cells: dict[str, str]
) -> None:
    write_embeddings(tmp_path / "e.npz", EmbeddingTable(tuple(map(str, range(40))), {"text": TEXT, "video": VIDEO, "audio": VIDEO}))
    assert main(["eval", str(tmp_path / "e.npz"), "--compare", f"published:{name}"]) == 0
    table = capsys.readouterr().out.split("\n\n")[2].splitlines()
    for direction, value in cells.items():
        assert next(line for line in table if line.startswith(direction)).split()[2] == value
    assert main(["eval", str(tmp_path / "e.npz"), "--compare", "published:nowhere"]) == 2
    assert "nothing published is known for 'nowhere'" in capsys.readouterr().err


@pytest.mark.jit
def test_published_rows_over_another_gallery_are_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_embeddings(tmp_path / "e.npz", EmbeddingTable(tuple(map(str, range(40))), {"text": TEXT, "video": VIDEO}))
    assert main(["eval", str(tmp_path / "e.npz"), "--compare", "published"]) == 0
    assert (
        "galleries differ in size, so these columns are not comparable: e.npz 40, WAVE-7B frozen (published) 3782"
        in capsys.readouterr().out
    )


def test_bench_data_writes_manifest_fetch_list_and_audit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    media, out = tmp_path / "media", tmp_path / "bench.jsonl"
    media.mkdir()
    (media / "aaaaaaaaaaa.mp4").write_bytes(b"x")
    rows = [["youtube_id", "start", "end", "caption"], ["aaaaaaaaaaa", "1", "3.5", "A dog."], ["bbbbbbbbbbb", "0", "2", "Rain."]]
    with (tmp_path / "b.csv").open("w", newline="") as file:
        csv.writer(file).writerows([*rows, ["c", "9", "2", "Bad."]])
    command = ["bench-data", "omniretriever", "--annotations", str(tmp_path / "b.csv"), "--media", str(media)]
    assert main([*command, "--out", str(out), "--fetch-list", str(tmp_path / "fetch.tsv"), "--audit"]) == 1
    told = capsys.readouterr()
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {
            "id": "aaaaaaaaaaa_1_3.5",
            "text": "A dog.",
            "video": "media/aaaaaaaaaaa.mp4",
            "audio": "media/aaaaaaaaaaa.mp4",
            "timestamps": [1.0, 3.5],
        }
    ]
    fetch = (tmp_path / "fetch.tsv").read_text().splitlines()
    assert fetch == ["id\turl\tstart\tend", "bbbbbbbbbbb_0_2\thttps://www.youtube.com/watch?v=bbbbbbbbbbb\t0\t2"]
    missing = [json.loads(line) for line in (tmp_path / "bench.missing.jsonl").read_text().splitlines()]
    assert missing[0]["id"] == "bbbbbbbbbbb_0_2" and "line 4: interval" in missing[1]["reason"]
    assert re.search(r"at hand +1 +\(50\.0 %\), 1 of them to be cut", told.out) and "over a gallery of 1 clips and 1 captions" in told.out
    (media / "bbbbbbbbbbb_0_2.webm").write_bytes(b"x")
    assert main([*command, "--fetch-list", str(tmp_path / "fetch.tsv")]) == 1  # the bad line stays
    assert (tmp_path / "fetch.tsv").read_text() == "id\turl\tstart\tend\n"
    assert main(command) == 2
    assert main([*command, "--column", "nonsense", "--audit"]) == 2
    assert "write ROLE=NAME" in capsys.readouterr().err


def test_eval_scores_captions_that_stand_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = tuple(f"clip {i}" for i in range(40))
    captions = EmbeddingTable(tuple(f"{i}#{k}" for i in ids for k in range(2)), {"text": np.stack([TEXT, -TEXT], 1).reshape(80, 8)})
    write_embeddings(tmp_path / "c.npz", EmbeddingTable(ids, {"audio": VIDEO}))
    write_embeddings(tmp_path / "t.npz", captions)
    command = ["eval", str(tmp_path / "c.npz"), "--captions", str(tmp_path / "t.npz")]
    assert main([*command, "--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html"), "--compare", "published:clotho"]) == 0
    assert "Queries in galleries: t2a 80 in 40, a2t 40 in 80." in capsys.readouterr().out
    found = json.loads((tmp_path / "r.json").read_text())["directions"]
    scores = naive.cosines(captions.tables["text"], VIDEO)
    places = naive.ranks(scores, [i // 2 for i in range(80)], range(40))
    assert_close(found["t2a"]["R@1"], 100 * np.mean([better == 0 for better, _ in places.values()]), "metric")
    best = [max(scores[2 * i, i], scores[2 * i + 1, i]) >= scores[:, i].max() for i in range(40)]
    assert_close(found["a2t"]["R@1"], 100 * np.mean(best), "metric")
    assert "OmniRetriever-7B (published)" in (tmp_path / "r.html").read_text()
    assert main([*command, "--compare", str(tmp_path / "c.npz")]) == 2
    assert "score it alone with --json" in capsys.readouterr().err


@pytest.mark.slow
def test_golden_several_captions_from_annotations_to_scores(
    golden: GoldenSet, converted: Path, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted({record.audio for record in golden.records if record.audio is not None})[:3]
    captions = {file.name: [f"{file.stem} says {word}" for word in ("one", "two")] for file in files}
    head = ["file_name", "caption_1", "caption_2"]
    with (tmp_path / "clotho.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, *([name, *texts] for name, texts in captions.items())])
    bench = ["bench-data", "clotho", "--annotations", str(tmp_path / "clotho.csv"), "--media", str(files[0].parent)]
    assert main([*bench, "--out", str(tmp_path / "c.jsonl")]) == 0
    for manifest in ("c", "c.captions"):
        out = str(tmp_path / f"{manifest}.npz")
        assert main(["embed", "--model", str(converted), "--manifest", str(tmp_path / f"{manifest}.jsonl"), "--out", out, *settings]) == 0
    assert list(read_embeddings(tmp_path / "c.npz").tables) == ["audio"]
    result = tmp_path / "r.json"
    assert main(["eval", str(tmp_path / "c.npz"), "--captions", str(tmp_path / "c.captions.npz"), "--json", str(result)]) == 0
    assert "Queries in galleries: t2a 6 in 3, a2t 3 in 6." in capsys.readouterr().out
    found = json.loads(result.read_text())
    assert found["n"] == 3 and found["directions"]["t2a"]["queries"] == 6 and found["directions"]["t2a"]["gallery"] == 3
    audio, text = read_embeddings(tmp_path / "c.npz").tables["audio"], read_embeddings(tmp_path / "c.captions.npz").tables["text"]
    ranks = naive.ranks(naive.cosines(text, audio), [i // 2 for i in range(6)], range(3))
    assert_close(found["directions"]["t2a"]["R@1"], 100 * np.mean([better == 0 for better, _ in ranks.values()]), "metric")


@pytest.mark.parametrize(("flag", "given"), [("text", "text"), ("audio", "audio"), ("video", "video"), ("av", "video audio")])
def test_search_embeds_what_it_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flag: str, given: str
) -> None:
    asked: list[dict[str, str]] = []

    class Model:
        def encode(self, items: Sequence[Mapping[str, str | None]], **_: object) -> np.ndarray:
            asked[:] = [{name: str(value) for name, value in item.items() if value is not None} for item in items]
            return VIDEO[7:8]

    plain = SimpleNamespace(config=SimpleNamespace(prompt="plain"), preset=Preset())
    monkeypatch.setattr("omni_jax.cli.model_arguments.named_model", lambda _: plain)
    monkeypatch.setattr("omni_jax.cli.model_arguments.load_model", lambda *_: Model())
    ids = tuple(f"clip {i}" for i in range(40))
    write_embeddings(tmp_path / "e.npz", EmbeddingTable(ids, {"text": TEXT, "av": VIDEO, "audio": VIDEO, "video": VIDEO}))
    command = ["search", "--model", "none", "--index", str(tmp_path / "e.npz"), f"--{flag}", "x"]
    assert main([*command, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert asked == [dict.fromkeys(given.split(), "x")]
    assert (answer["query"], answer["table"]) == (flag, {"text": "av", "audio": "video", "video": "audio", "av": "text"}[flag])
    rows = {"text": TEXT}.get(answer["table"], VIDEO)
    scores = naive.cosines(VIDEO[7:8], rows)[0]
    assert [r["id"] for r in answer["results"]] == [ids[i] for i in np.argsort(-scores)[:10]]
    assert_close([r["score"] for r in answer["results"]], np.sort(scores)[::-1][:10], "cosine_score")
    assert main([*command, "--table", "tva"]) == 2
    assert "the index has no table 'tva'; it holds text, video, audio, av" in capsys.readouterr().err
    assert main([*command, "-k", "0"]) == 2
    assert main([*command[:-1], " "]) == (2 if flag == "text" else 0)


def test_no_output_takes_the_place_of_what_the_command_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = str(tmp_path / "e.npz"), tmp_path / "tables"
    folder.mkdir()
    write_embeddings(file, EmbeddingTable(tuple(f"c{i}" for i in range(40)), {"text": TEXT, "video": VIDEO}))
    for name, rows in (("text", TEXT), ("video", VIDEO)):
        np.save(folder / f"{name}.npy", rows)
    held = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    single = [str(folder / "text.npy"), f"video={folder / 'video.npy'}"]
    for command in (
        ["eval", file, "--json", file],
        ["eval", *single, "--html", str(folder / "video.npy")],
        ["eval", *single, "--compare", file, "--json", f"{tmp_path}/tables/../e.npz"],
        ["export", file, "--to", "int8", "--out", file],
        ["export", *single, "--to", "npy", "--truncate-dim", "2", "--out", str(folder)],
    ):
        assert main(command) == 2
        assert "is read by this command, too, and would be lost; choose another name" in capsys.readouterr().err
    assert main(["eval", file, "--json", "r", "--html", "r"]) == 2
    assert "--json r: is the page of --html, too" in capsys.readouterr().err
    assert held == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["eval", file, "--compare", f"{folder / 'text.npy'},{folder / 'video.npy'}"]) == 0  # by the names of the files, as before
