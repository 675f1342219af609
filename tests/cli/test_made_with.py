"""A model, a preset or media that changed: interrupted work does not go on, and an index is not searched, with others than made it.

All read the golden checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from omni_jax.api import OmniRetriever
from omni_jax.cli.main import main
from omni_jax.config import Preset
from omni_jax.retrieval import read_embeddings
from omni_jax.retrieval.embedding_pass import Part
from omni_jax.retrieval.journal import Journal
from tests.media_samples import write_clip

pytestmark = pytest.mark.jit

CAPTIONS = ("a red ball", "rain on a tin roof", "two dogs bark")


def change(folder: Path, *path: str, value: object) -> None:
    """Replaces one number of a converted folder's configuration."""
    record = json.loads((folder / "omni_jax.json").read_text())
    inner = record["model"]
    for name in path[:-1]:
        inner = inner[name]
    assert inner[path[-1]] != value
    inner[path[-1]] = value
    (folder / "omni_jax.json").write_text(json.dumps(record))


def respell(folder: Path) -> None:
    """Gives two letters of a tokenizer each other's number."""
    file = folder / "tokenizer.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    words = record["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(record), encoding="utf-8")


def later(file: Path) -> None:
    """Gives a file a later modification time."""
    known = file.stat()
    os.utime(file, ns=(known.st_atime_ns, known.st_mtime_ns + 1_000_000_000))


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "lora_alpha": (lambda here: change(here / "model", "lora", "alpha", value=77.0), "model.lora.alpha is "),
    "rope_theta": (lambda here: change(here / "model", "decoder", "rope_theta", value=12345.0), "model.decoder.rope_theta is "),
    "eps": (lambda here: change(here / "model", "decoder", "rms_norm_eps", value=0.5), "model.decoder.rms_norm_eps is "),
    "tokenizer": (lambda here: respell(here / "model"), "tokenizer differs"),
    "media": (lambda here: later(here / "clip.mp4"), "media differs"),
    "other media": (lambda here: (here / "clip.mp4").unlink(), "media differs"),
}


@pytest.fixture
def stopped(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of an `embed` that ended after its first record, in a folder with a model and media of its own."""
    shutil.copytree(converted, tmp_path / "model")
    write_clip(tmp_path / "clip.mp4", 1.0, fps=4, width=56, height=56, audio=False)
    rows = [{"id": text, "text": text, "video": "clip.mp4"} for text in CAPTIONS]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = ["--model", str(tmp_path / "model"), "--manifest", str(tmp_path / "manifest.jsonl"), "--out", str(tmp_path / "o.npz")]
    arguments = ["embed", *places, "--tables", "text", "--batch-size", "1"]
    kept: list[Part] = []

    def add(self: Journal, part: Part) -> None:
        if kept:
            raise OSError(28, "No space left on device", "part")
        kept.append(part)
        original(self, part)

    original = Journal.add
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", add)
        assert main(arguments) == 2
    return arguments


@pytest.mark.parametrize("what", CHANGES)
def test_golden_what_was_embedded_by_another_model_is_not_gone_on_with(
    stopped: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(OmniRetriever, "embed", lambda *_, **__: pytest.fail("nothing may be embedded"))
    make, words = CHANGES[what]
    make(tmp_path)
    capsys.readouterr()
    assert main(stopped) == 2
    error = capsys.readouterr().err
    assert f"other settings ({words}" in error and len(error.splitlines()) == 1
    assert len(list((tmp_path / ".o.unfinished").glob("part-*.npz"))) == 1


def test_golden_an_index_is_searched_with_the_preset_that_made_it(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps({"id": text, "text": text}) + "\n" for text in CAPTIONS))
    index = str(tmp_path / "i.npz")
    embed = ["embed", "--model", str(converted), "--manifest", str(tmp_path / "manifest.jsonl"), "--tables", "text"]
    assert main([*embed, "--out", index, "--preset", "mteb"]) == 0
    made = read_embeddings(index).made_with
    assert made is not None and made["preset"]["text_head"] == "fused" and Preset().text_head == "last"
    search = ["search", "--index", index, "--text", CAPTIONS[1], "--table", "text", "--json"]
    capsys.readouterr()
    assert main([*search, "--model", str(converted)]) == 0
    best = json.loads(capsys.readouterr().out)["results"][0]
    assert best["id"] == CAPTIONS[1] and best["score"] > 0.9999

    other = Path(shutil.copytree(converted, tmp_path / "other"))
    change(other, "lora", "alpha", value=77.0)
    for arguments, words in (
        (["--model", str(converted), "--preset", "training"], "preset.text_head is 'fused' there, 'last' here"),
        (["--model", str(converted), "--set", "text_head=last"], "preset.text_head is 'fused' there, 'last' here"),
        (["--model", str(other)], "model.lora.alpha is "),
    ):
        assert main([*search, *arguments]) == 2
        error = capsys.readouterr().err
        assert "was made otherwise than --model" in error and words in error and len(error.splitlines()) == 1
    assert main([*search, "--model", str(other), "--unchecked"]) == 0
    assert "was made otherwise: model.lora.alpha" in capsys.readouterr().err

    with np.load(index) as file:
        arrays = {name: file[name] for name in file.files if name != "made_with"}
    np.savez(index, **arrays)  # as an older version wrote it
    assert main([*search, "--model", str(converted), "--preset", "mteb"]) == 0
    assert "what it was made with is not recorded" in capsys.readouterr().err
    assert main(["search", "--index", index, "--audio", "x.wav", "--prefix", "query", "--model", str(converted)]) == 2
    assert "--prefix query: applies to captions" in capsys.readouterr().err
