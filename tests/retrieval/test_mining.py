"""Hard negatives: the hardest candidates of each query, without its answers in all but name. The first test shows how it is used."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from omni_jax.cli.main import main
from omni_jax.retrieval.embedding_file import write_embeddings
from omni_jax.retrieval.faiss_search import FaissIndex
from omni_jax.retrieval.mining import MiningConfig, mine
from omni_jax.types import EmbeddingTable, InputError

WIDTH = 32


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def planted(rng: np.random.Generator, groups: int = 60) -> tuple[EmbeddingTable, dict[str, dict[str, str]]]:
    """Returns tables in which each record `rN` has a near miss `hN` and a twin `fN`: another clip with the same caption."""
    center = unit(rng.normal(size=(groups, WIDTH)))
    text, video, ids, captions = [], [], [], {}
    for kind, shift in (("r", 0.0), ("h", 0.5), ("f", 0.05)):
        moved = unit(center + shift * unit(rng.normal(size=center.shape)))
        text.append(unit(center if kind == "f" else moved))
        video.append(unit(moved + 0.02 * unit(rng.normal(size=center.shape))))
        ids += [f"{kind}{n}" for n in range(groups)]
        captions |= {f"{kind}{n}": f"caption {'h' if kind == 'h' else ''}{n}" for n in range(groups)}
    return EmbeddingTable(tuple(ids), {"text": np.concatenate(text), "video": np.concatenate(video)}), {"same caption": captions}


def test_near_misses_are_found_and_other_clips_of_the_same_caption_are_not() -> None:
    table, same = planted(np.random.default_rng(0))
    mined = mine(table, MiningConfig(num_negatives=1), same=same, directions=("t2v", "v2t"))
    for direction in ("t2v", "v2t"):
        first = [mined.negatives[f"r{n}"][direction][0] for n in range(60)]
        assert sum(name == f"h{n}" for n, name in enumerate(first)) >= 0.99 * 60
        assert not any(name == f"f{n}" for n, name in enumerate(first))
        assert mined.removed[direction]["same caption"] >= 60


@pytest.mark.parametrize("cells", [False, True], ids=["every row", "cells"])
def test_faiss_finds_the_near_misses_and_no_twin(monkeypatch: pytest.MonkeyPatch, cells: bool) -> None:
    table, same = planted(np.random.default_rng(8), groups=900)
    monkeypatch.setattr("omni_jax.retrieval.faiss_search.SMALL", 100 if cells else 10_000)
    index = FaissIndex(table.tables["video"])
    assert (index.cells > 0) == cells and index.probed <= index.cells
    config = MiningConfig(num_negatives=1)
    mined = mine(table, config, same=same, directions=("t2v",), nearest=FaissIndex)
    first = [mined.negatives.get(f"r{n}", {}).get("t2v", [""])[0] for n in range(900)]
    assert sum(name == f"h{n}" for n, name in enumerate(first)) >= 0.99 * 900
    assert sum(name == f"f{n}" for n, name in enumerate(first)) <= 0.01 * 900
    if not cells:
        assert mined.negatives == mine(table, config, same=same, directions=("t2v",)).negatives


def test_faiss_that_is_missing_and_rows_without_a_direction_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="table 'gallery': 1 rows hold only zeros"):
        FaissIndex(np.eye(4, dtype=np.float32) * [1, 1, 0, 1])
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match=r"pip install 'omni-jax\[faiss\]'"):
        FaissIndex(np.eye(4, dtype=np.float32))


def naive(table: EmbeddingTable, config: MiningConfig, record: int) -> list[str]:
    """The definition for t2v without labels: sort all, drop the relevant item, cut ranks, then scores."""
    cosines = table.tables["video"].astype(np.float64) @ table.tables["text"][record].astype(np.float64)
    order = [i for i in np.argsort(-cosines, kind="stable") if i != record]
    kept = []
    for i in order[config.range_min : config.range_max]:
        ok = config.min_score is None or cosines[i] >= config.min_score
        ok &= config.max_score is None or cosines[i] <= config.max_score
        ok &= config.absolute_margin is None or cosines[i] <= cosines[record] - config.absolute_margin
        ok &= config.relative_margin is None or cosines[i] <= cosines[record] * (1 - config.relative_margin)
        kept += [table.ids[i]] if ok else []
    return kept[: config.num_negatives]


@pytest.mark.parametrize(
    "config",
    [
        MiningConfig(),
        MiningConfig(num_negatives=3, range_min=2, range_max=9, absolute_margin=None),
        MiningConfig(min_score=0.0, max_score=0.4, absolute_margin=None),
        MiningConfig(absolute_margin=0.1, relative_margin=0.3),
    ],
)
def test_ranges_scores_and_margins_mean_what_they_say(config: MiningConfig) -> None:
    rng = np.random.default_rng(1)
    text = unit(rng.normal(size=(70, 8)))
    table = EmbeddingTable(tuple(f"c{i}" for i in range(70)), {"text": text, "video": unit(text + rng.normal(size=text.shape) / 4)})
    mined = mine(table, config, same={}, directions=("t2v",))
    for i, name in enumerate(table.ids):
        assert mined.negatives.get(name, {}).get("t2v", []) == naive(table, config, i)


def test_random_sampling_draws_among_the_candidates_and_repeats_with_its_seed() -> None:
    table, same = planted(np.random.default_rng(2))
    draw = [mine(table, MiningConfig(sampling="random", seed=seed), same=same, directions=("t2v",)).negatives for seed in (0, 0, 1)]
    assert draw[0] == draw[1] != draw[2]
    everything = mine(table, MiningConfig(num_negatives=1000), same=same, directions=("t2v",)).negatives
    for name, found in draw[0].items():
        order = everything[name]["t2v"]
        places = [order.index(other) for other in found["t2v"]]
        assert places == sorted(places), "the hardest stands first"


def test_a_record_that_only_one_table_holds_asks_nothing_and_may_be_a_negative() -> None:
    rng = np.random.default_rng(3)
    rows = unit(rng.normal(size=(3, 4)))
    table = EmbeddingTable(("a", "b", "c"), {"text": rows[:2], "video": rows}, own={"text": ("a", "b")})
    mined = mine(table, MiningConfig(absolute_margin=None), same={}, directions=("t2v",))
    assert set(mined.negatives) == {"a", "b"} and set(mined.negatives["a"]["t2v"]) == {"b", "c"}


def test_a_set_of_duplicates_has_no_negative() -> None:
    table, _ = planted(np.random.default_rng(4), groups=3)
    with pytest.raises(InputError, match=r"no record has a valid negative: .* check the manifest for duplicates"):
        mine(table, MiningConfig(), same={"same caption": dict.fromkeys(table.ids, "x")})
    with pytest.raises(InputError, match="no direction of t2a can be mined with the tables text, video"):
        mine(table, MiningConfig(), same={}, directions=("t2a",))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_negatives": 0}, "num_negatives 0"),
        ({"range_min": 5, "range_max": 5}, "range_min 5 and range_max 5"),
        ({"sampling": "best"}, "sampling 'best': choose one of top, random"),
    ],
)
def test_impossible_settings_are_refused(fields: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        MiningConfig(**fields)


def write_set(folder: Path, table: EmbeddingTable, captions: dict[str, str]) -> None:
    write_embeddings(folder / "clips.npz", table)
    rows = [{"id": name, "text": captions[name], "video": f"media/{name}.mp4", "mood": "calm"} for name in table.ids]
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_command_writes_the_manifest_again_with_negatives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, same = planted(np.random.default_rng(5), groups=12)
    write_set(tmp_path, table, same["same caption"])
    arguments = ["mine", "--manifest", str(tmp_path / "clips.jsonl"), "--embeddings", str(tmp_path / "clips.npz")]
    assert main([*arguments, "--out", str(tmp_path / "mined.jsonl"), "--directions", "t2v,v2t", "--num-negatives", "2"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == list(table.ids)
    assert rows[0] | {"negatives": 0} == {"id": "r0", "text": "caption 0", "video": "media/r0.mp4", "mood": "calm", "negatives": 0}
    assert rows[0]["negatives"]["t2v"][0] == "h0" and len(rows[0]["negatives"]["v2t"]) == 2
    assert "36 of 36 records have negatives" in capsys.readouterr().out


def test_records_without_an_embedding_are_reported_and_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, same = planted(np.random.default_rng(6), groups=12)
    write_set(tmp_path, table, same["same caption"])
    with (tmp_path / "clips.jsonl").open("a") as file:
        file.write('{"id": "new", "text": "not embedded"}\n')
    arguments = ["mine", "--manifest", str(tmp_path / "clips.jsonl"), "--embeddings", str(tmp_path / "clips.npz")]
    assert main([*arguments, "--out", str(tmp_path / "mined.jsonl")]) == 1
    assert "1 records are not embedded and get no negatives; the first: 'new'" in capsys.readouterr().err
    assert json.loads((tmp_path / "mined.jsonl").read_text().splitlines()[-1])["negatives"] == {}


def test_a_manifest_of_duplicates_gives_one_line_and_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, _ = planted(np.random.default_rng(6), groups=4)
    write_set(tmp_path, table, dict.fromkeys(table.ids, "the same"))
    arguments = ["mine", "--manifest", str(tmp_path / "clips.jsonl"), "--embeddings", str(tmp_path / "clips.npz")]
    for search in ("exact", "faiss"):
        assert main([*arguments, "--out", str(tmp_path / "mined.jsonl"), "--search", search]) == 2
        assert "no record has a valid negative" in capsys.readouterr().err and not (tmp_path / "mined.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--out", "mined.json"], "the name of a manifest ends in .jsonl"),
        (["--out", "m.jsonl", "--directions", "t2x"], "unknown direction 't2x'"),
        (["--out", "m.jsonl", "--range-max", "0"], "range_min 0 and range_max 0"),
        (["--out", "m.jsonl", "--probe", "8"], "--probe 8: is for --search faiss"),
        (["--out", "m.jsonl", "--min-score", "nan"], "'nan' is not a finite number"),
        (["--out", "m.jsonl", "--relative-margin", "inf"], "'inf' is neither a finite number nor the word none"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str) -> None:
    table, same = planted(np.random.default_rng(7), groups=3)
    write_set(tmp_path, table, same["same caption"])
    assert main(["mine", "--manifest", str(tmp_path / "clips.jsonl"), "--embeddings", str(tmp_path / "clips.npz"), *more]) == 2
    assert said in capsys.readouterr().err


def test_neither_the_manifest_is_written_over_nor_are_vectors_of_an_earlier_model_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, same = planted(np.random.default_rng(7), groups=3)
    write_set(tmp_path, table, same["same caption"])
    manifest = str(tmp_path / "clips.jsonl")
    before = (tmp_path / "clips.jsonl").read_bytes()
    (tmp_path / "link.jsonl").symlink_to(manifest)
    for out in (manifest, str(tmp_path / "link.jsonl")):
        assert main(["mine", "--manifest", manifest, "--embeddings", str(tmp_path / "clips.npz"), "--out", out]) == 2
        assert f"--out {out}: is read by this command, too" in capsys.readouterr().err
    assert main(["mine", "--manifest", manifest, "--model", "model", "--out", str(tmp_path / "clips.x.jsonl")]) == 2
    (tmp_path / "mined.npz").write_bytes((tmp_path / "clips.npz").read_bytes())
    assert main(["mine", "--manifest", manifest, "--model", "model", "--out", str(tmp_path / "mined.jsonl")]) == 2
    assert "mined.npz: exists already; mine in it with --embeddings" in capsys.readouterr().err
    assert (tmp_path / "clips.jsonl").read_bytes() == before
