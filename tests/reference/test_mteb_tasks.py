"""Retrieval tasks of mteb on local clips, scored by mteb's evaluator and by ours: the same figures for the same vectors."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax import conversion
from omni_jax.cli.main import main
from omni_jax.config import PRESETS
from omni_jax.retrieval import evaluate
from tests.golden_set import GoldenSet
from tests.tolerances import assert_close

pytestmark = [pytest.mark.reference, pytest.mark.jit]

SIDES = {"t": ("text",), "v": ("video",), "a": ("audio",), "va": ("video", "audio")}
NAMES = {"R@1": "recall_at_1", "R@5": "recall_at_5", "NDCG@10": "ndcg_at_10"}


@pytest.fixture(scope="module")
def folder(golden: GoldenSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mteb") / "model"
    conversion.to_jax(golden.checkpoint, out, adapter=golden.adapter_dir)
    return out


@pytest.fixture(scope="module")
def encoder(folder: Path, golden: GoldenSet) -> Any:
    from omni_jax.api.mteb_encoder import OmniRetrieverEncoder

    return OmniRetrieverEncoder(str(folder), preset=golden.preset)


def task_class(category: str, columns: dict[str, list[Any]]) -> type:
    """Returns a retrieval task of mteb in which row i of the one side is the answer to row i of the other."""
    from datasets import Audio, Dataset, Video
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    def side(letters: str, mark: str) -> Dataset:
        rows = len(next(iter(columns.values())))
        table = Dataset.from_dict({"id": [f"{mark}{i}" for i in range(rows)]} | {name: columns[name] for name in SIDES[letters]})
        for name, kind in (("audio", Audio()), ("video", Video())):
            if name in table.column_names:
                table = table.cast_column(name, kind)
        return table

    query, document = category.split("2")

    class Local(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=f"Local{category.upper()}Retrieval",
            type="Any2AnyRetrieval",
            category=category,
            modalities=sorted({*SIDES[query], *SIDES[document]}),
            main_score="ndcg_at_10",
            description="Clips of this machine.",
            reference="https://example.org",
            dataset={"path": "local", "revision": "1"},
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            date=("2026-01-01", "2026-01-01"),
            domains=[],
            task_subtypes=[],
            dialect=[],
            license="cc0-1.0",
            annotations_creators="derived",
            sample_creation="found",
            bibtex_citation="",
        )

        def load_data(self, **options: Any) -> None:
            queries, corpus = side(query, "q"), side(document, "d")
            relevant = {f"q{i}": {f"d{i}": 1} for i in range(len(queries))}
            found = {"queries": queries, "corpus": corpus, "relevant_docs": relevant, "top_ranked": None}
            self.dataset, self.data_loaded = {"default": {"test": found}}, True

    return Local


def scores_of(encoder: Any, task: Any, **options: Any) -> dict[str, float]:
    import mteb

    result = mteb.evaluate(encoder, task, cache=None, co2_tracker=False, show_progress_bar=False, **options)
    return result.task_results[0].scores["test"][0]


@pytest.mark.parametrize("category", ["t2v", "a2t", "t2va", "va2t", "v2a"])
def test_golden_scores_of_mteb_are_those_of_eval(encoder: Any, golden: GoldenSet, category: str):
    records = golden.records
    columns = {"text": [r.text for r in records], "video": [str(r.video) for r in records], "audio": [str(r.audio) for r in records]}
    scores = scores_of(encoder, task_class(category, columns)(), encode_kwargs={"batch_size": 4, "workers": 1})
    tables = {
        {"t": "text", "v": "video", "a": "audio", "va": "av"}[letters]: encoder.model.encode(
            **{f"{name}s": columns[name] for name in SIDES[letters]}, batch_size=4, workers=1
        )
        for letters in category.split("2")
    }
    ours = evaluate(tables, resamples=0)["directions"][category.replace("va", "av")]
    for name, theirs in NAMES.items():
        assert_close(scores[theirs], round(ours[name] / 100, 5), "mteb_score")
    assert_close(scores["mrr_at_10"], ours["MRR"] / 100, "mteb_score")  # of galleries of at most 10, and not rounded
    assert scores["main_score"] == scores["ndcg_at_10"]
    assert encoder.failed == 0


def test_evaluators_agree_on_the_same_vectors(tmp_path: Path):
    """Before mteb rounds, too: 300 records of random vectors near each other, so that ranks differ."""
    from mteb._evaluators.retrieval_metrics import calculate_retrieval_scores

    rng = np.random.default_rng(7)
    text = rng.standard_normal((300, 16)).astype(np.float32)
    tables = {"text": text, "audio": text + 1.5 * rng.standard_normal(text.shape).astype(np.float32)}
    encoder = encoder_of(lambda rows: tables["audio" if rows[0].startswith("audio") else "text"][[int(r.split()[1]) for r in rows]])
    task = task_class("t2t", {"text": [f"text {i}" for i in range(300)]})()
    task.load_data()
    corpus = task.dataset["default"]["test"]["corpus"]
    task.dataset["default"]["test"]["corpus"] = corpus.map(lambda row: {"text": row["text"].replace("text", "audio")})
    scores = scores_of(encoder, task, prediction_folder=tmp_path)
    ours = evaluate(tables, resamples=0)["directions"]["t2a"]
    (found,) = tmp_path.rglob("*_predictions.json")
    predictions = json.loads(found.read_text())["default"]["test"]
    exact = calculate_retrieval_scores(predictions, task.dataset["default"]["test"]["relevant_docs"], [1, 5, 10]).all_scores
    for name, key in {"R@1": "recall_1", "R@5": "recall_5", "NDCG@10": "ndcg_cut_10"}.items():
        assert_close(scores[NAMES[name]], round(ours[name] / 100, 5), "mteb_score")
        assert_close(np.mean([row[key] for row in exact.values()]), ours[name] / 100, "mteb_score")
    assert 0 < ours["R@1"] < ours["R@5"] < 100


def encoder_of(vectors: Callable[[list[str]], np.ndarray]) -> Any:
    """Returns an encoder of mteb that looks texts up."""
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta, ScoringFunction

    class Known(AbsEncoder):
        mteb_model_meta = ModelMeta.create_empty({"name": "local/known", "similarity_fn_name": ScoringFunction.COSINE})

        def encode(self, inputs: Any, **options: Any) -> np.ndarray:
            return np.concatenate([vectors(batch["text"]) for batch in inputs])

    return Known()


def test_golden_meta_says_what_the_model_is(folder: Path, encoder: Any):
    from omni_jax.api.mteb_encoder import model_meta

    meta = model_meta(folder, license="apache-2.0")
    assert (meta.name, meta.license, meta.framework) == ("omni_jax/model", "apache-2.0", ["JAX"])
    assert meta.modalities == ["text", "image", "audio", "video"] and meta.use_instructions is False
    assert meta.experiment_kwargs == {"preset": "mteb", "dtype": "keep"}
    assert meta.embed_dim == encoder.model.dim and 0 < meta.n_embedding_parameters < meta.n_parameters
    other = encoder.mteb_model_meta
    assert meta.revision == other.revision and len(meta.revision) == 40
    assert model_meta(folder, preset=PRESETS["release"], name="me/mine").experiment_kwargs["preset"] == "release"
    unnamed = dataclasses.replace(PRESETS["training"], audio_seconds=3.0)
    assert model_meta(folder, preset=unnamed).experiment_kwargs["preset"] == {"audio_seconds": 3.0}  # what differs from training
    made = meta.loader(meta.name, revision=meta.revision, device="cpu", **meta.experiment_kwargs)
    assert made.mteb_model_meta.name == meta.name and made.mteb_model_meta.experiment_kwargs == meta.experiment_kwargs


def test_golden_item_that_cannot_be_embedded_is_zeros_and_counted(folder: Path, golden: GoldenSet, tmp_path: Path):
    from omni_jax.api.mteb_encoder import OmniRetrieverEncoder

    encoder = OmniRetrieverEncoder(str(folder), preset=golden.preset)
    (broken := tmp_path / "broken.mp4").write_bytes(b"no video")
    columns = {"text": ["a red ball", "a blue ball"], "video": [str(golden.records[0].video), str(broken)]}
    with pytest.warns(UserWarning, match="1 of 2 items cannot be embedded"):
        scores = scores_of(encoder, task_class("t2v", columns)(), encode_kwargs={"batch_size": 2, "workers": 1})
    assert encoder.failed == 1 and scores["recall_at_1"] == 0.5


def test_golden_command_runs_a_task_and_keeps_its_result(
    folder: Path, golden: GoldenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    registry = importlib.import_module("mteb.get_tasks")._TASKS_REGISTRY
    records = golden.records[:3]
    task = task_class("t2a", {"text": [r.text for r in records], "audio": [str(r.audio) for r in records]})
    monkeypatch.setitem(registry, "LocalT2ARetrieval", task)
    command = ["mteb", "--model", str(folder), "--tasks", "LocalT2ARetrieval", "--out", str(tmp_path / "out"), "--name", "me/mine"]
    assert main([*command, "--preset", "training", "--set", "audio_seconds=2", "--workers", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:5] == ["task", "split", "subset", "R@1", "R@5"] and "MRR@10" in out[0]
    row = next(line for line in out if line.startswith("LocalT2ARetrieval"))
    assert "results of me/mine" in out[-1]
    (kept,) = (tmp_path / "out").rglob("LocalT2ARetrieval.json")
    scores = json.loads(kept.read_text())["scores"]["test"][0]
    assert f"{100 * scores['mrr_at_10']:.2f}" in row.split()
    meta = json.loads((kept.parent / "model_meta.json").read_text())
    assert meta["name"] == "me/mine" and meta["experiment_kwargs"]["preset"] == {"audio_seconds": 2.0}
    assert main(["mteb", "--model", str(folder), "--tasks", "LocalT2ARetrievl"]) == 2
    line = capsys.readouterr().err.strip()
    assert "LocalT2ARetrieval" in line and "\n" not in line
