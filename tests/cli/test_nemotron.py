"""The second backbone from media files to embeddings: command line and Python face. All read its golden checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import omni_jax
from omni_jax.cli.main import main
from omni_jax.config import TABLES, ConfigError
from omni_jax.data.synthetic import SyntheticConfig, write_set
from omni_jax.retrieval import read_embeddings
from omni_jax.types import InputError
from tests.golden_set import GoldenSet
from tests.programs import BALANCED
from tests.repository import ROOT
from tests.tolerances import assert_close
from tests.train.tiny_run import command, environment, finish

NAMES = {"text": "t", "video": "v", "audio": "a", "av": "va", "tv": "tv", "at": "ta", "tva": "tva"}


@pytest.fixture(scope="module")
def second(golden_nemotron: GoldenSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nemotron") / "model"
    assert main(["convert", "to-jax", "--base", str(golden_nemotron.checkpoint), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def face(golden_nemotron: GoldenSet, second: Path) -> omni_jax.OmniRetriever:
    return omni_jax.OmniRetriever.from_pretrained(second, preset=golden_nemotron.preset)


def overrides(golden: GoldenSet) -> list[str]:
    fields = [name for name in ("frames", "pixels", "audio_seconds") if name in golden.spec]
    return [part for name in fields for part in ("--set", f"{name}={golden.spec[name]}")]


def embed(second: Path, out: Path, *arguments: str) -> int:
    return main(["embed", "--model", str(second), "--out", str(out), "--workers", "0", *arguments])


@pytest.mark.jit
def test_golden_embed_from_media_files(golden_nemotron: GoldenSet, second: Path, tmp_path: Path):
    """With no preset named, the backbone's own is taken."""
    out = tmp_path / "all.npz"
    assert embed(second, out, "--manifest", str(golden_nemotron.manifest), *overrides(golden_nemotron)) == 0
    found = read_embeddings(out)
    assert set(found.tables) == set(TABLES) and len(found.ids) == golden_nemotron.clips
    for table, rows in found.tables.items():
        for i, row in enumerate(rows):
            expected = golden_nemotron.base[f"{i}/embed/{NAMES[table]}"]
            assert_close(row, expected / np.linalg.norm(expected), "embed")


@pytest.mark.jit
def test_golden_prefix_as_argument_field_and_flag(golden_nemotron: GoldenSet, second: Path, face: omni_jax.OmniRetriever, tmp_path: Path):
    captions = [record.text for record in golden_nemotron.records]
    passages, queries = face.encode(texts=captions), face.encode(texts=captions, prefix="query")
    assert np.abs(passages - queries).max(axis=1).min() > 1e-3
    for i, row in enumerate(face.encode(texts=captions, prefix="passage")):
        expected = golden_nemotron.base[f"{i}/embed/t"]
        assert_close(row, expected / np.linalg.norm(expected), "embed")
        assert_close(row, passages[i], "invariance")
    lines = [{"id": str(i), "text": text, **({"prefix": "passage"} if i == 0 else {})} for i, text in enumerate(captions)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert embed(second, tmp_path / "o.npz", "--manifest", str(tmp_path / "m.jsonl"), "--prefix", "query") == 0
    rows = read_embeddings(tmp_path / "o.npz").tables["text"]
    assert_close(rows[0], passages[0], "invariance")
    for i in range(1, len(captions)):
        assert_close(rows[i], queries[i], "invariance")


@pytest.mark.costly
def test_golden_what_the_second_backbone_refuses(face: omni_jax.OmniRetriever, golden_nemotron: GoldenSet):
    with pytest.raises(InputError, match="prompt_name 'document': choose one of passage, query"):
        face.encode(texts=["a"], prefix="document")
    with pytest.raises(ConfigError, match="share_prefix: this backbone's attention is bidirectional, not causal"):
        next(face.embed(golden_nemotron.records, ("tv",), share_prefix=True))


@pytest.mark.costly
def test_golden_wave_takes_no_prefix(converted: Path, golden: GoldenSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--manifest", str(golden.manifest), "--tables", "text"]
    assert embed(converted, tmp_path / "o.npz", *arguments, "--prefix", "query") == 2
    assert embed(converted, tmp_path / "o.npz", *arguments, "--preset", "nemotron") == 2
    assert capsys.readouterr().err.count("this backbone takes no prefix") == 2


def test_a_prefix_of_a_manifest_must_be_known(tmp_path: Path):
    from omni_jax.data.manifest import read_manifest

    (tmp_path / "m.jsonl").write_text('{"id": "a", "text": "t", "prefix": "query"}\n{"id": "b", "text": "t", "prefix": "question"}\n')
    manifest = read_manifest(tmp_path / "m.jsonl")
    assert [record.prefix for record in manifest.records] == ["query"]
    assert 'prefix "question" must be one of passage, query' in manifest.problems[0].reason


@pytest.mark.slow
def test_its_small_config_trains_from_clips_to_an_adapter(tmp_path: Path):
    """As a person would: shards, a run with all three losses and an evaluation, and what it trained as a model and as PyTorch files."""
    made = write_set(tmp_path / "clips", SyntheticConfig(clips=1, held_out=8, combinations=32, seconds=1.0))
    fields = ["--set", "frames=4", "--set", "pixels=3136", "--set", "audio_seconds=1", "--set", "audio_pad=true"]
    shards, workdir = tmp_path / "shards", tmp_path / "run"
    assert main(["prepare", "--manifest", str(made.train), "--out", str(shards), "--preset", "nemotron", *fields, "--workers", "0"]) == 0
    changes = {"data__train": shards, "data__workers": 0, "evaluation__manifest": made.held_out, "steps": 24, "batch__micro_batch": 16}
    changes |= {"optimizer__warmup_steps": 2, "checkpoint__every": 24, "log__every": 1}
    changes["losses__hn_audio_only"] = True  # one program instead of three; tests/train/test_second_backbone.py has the others
    around = environment(tmp_path / "cache", devices=8) | {"XLA_FLAGS": BALANCED}
    finish(command(ROOT / "configs" / "tiny_nemotron.py", workdir, **changes), around)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for name in ("L_T", "L_D", "L_A"):
        losses = [row[name] for row in rows if name in row]
        assert len(losses) == 24 and np.mean(losses[-6:]) < 0.97 * np.mean(losses[:6]), (name, losses)
    assert any("eval/AVG-all" in row for row in rows)
    assert embed(workdir, tmp_path / "trained.npz", "--manifest", str(made.held_out)) == 0
    assert np.isfinite(read_embeddings(tmp_path / "trained.npz").tables["text"]).all()
    assert (
        main(
            ["convert", "to-torch", "--model", str(workdir), "--base-out", str(tmp_path / "torch"), "--adapter-out", str(tmp_path / "peft")]
        )
        == 0
    )
    saved = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert not saved["modules_to_save"]
