"""A model folder is opened once by a command, and what a run trained is known by its checkpoint's fingerprints.

All read the golden checkpoint.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import optax
import pytest

from omni_jax import conversion
from omni_jax.api import weights
from omni_jax.api.made_with import made_with
from omni_jax.api.weights import FINGERPRINTS, base_digests, open_model
from omni_jax.cli.main import main
from omni_jax.configs import tiny
from omni_jax.conversion.folder import read_manifest
from omni_jax.retrieval import read_embeddings, write_embeddings
from omni_jax.tokens.tokenizer import Tokenizer
from omni_jax.train import RunConfig, TrainableConfig
from omni_jax.train.checkpoint import Checkpoints
from omni_jax.train.state import new_state
from omni_jax.train.trainable import select
from omni_jax.train.workdir import TOKENIZER_FILES, WorkdirConfig, claim_workdir

pytestmark = pytest.mark.jit

_opened: collections.Counter[str] | None = None


def _count(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], str):
        _opened[arguments[0]] += 1


sys.addaudithook(_count)  # hooks stay for ever; this one counts within `opened` alone


@pytest.fixture
def opened() -> Iterator[collections.Counter[str]]:
    """Counts the files that this process opens, by name."""
    global _opened
    _opened = collections.Counter()
    yield _opened
    _opened = None


@pytest.fixture
def run(converted: Path, tmp_path: Path) -> Path:
    """A workdir after 3 steps; what trained is three times what the golden checkpoint holds."""
    config, params = conversion.load(converted)
    known = {"/".join(path): leaf for path, leaf in params.items()}
    leaves = {name: 3 * known[name].astype(jnp.float32) for name in select(config, TrainableConfig())}
    digests = {**base_digests(read_manifest(converted)), TOKENIZER_FILES: Tokenizer.from_pretrained(converted).digest}
    (tmp_path / "run").mkdir()
    claim_workdir(tmp_path / "run", WorkdirConfig(RunConfig.from_config(tiny.get_config()).to_json(), config, str(converted), digests, 9))
    saved = Checkpoints(tmp_path / "run" / "checkpoints", 3)
    saved.save(dataclasses.replace(new_state(leaves, optax.sgd(1.0), 0), step=jnp.int32(3)))
    saved.close()
    return tmp_path / "run"


def test_golden_embed_opens_every_file_of_a_model_once(
    run: Path, converted: Path, tmp_path: Path, opened: collections.Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"id": "a", "text": "a red ball"}) + "\n")
    reads: list[int] = []
    read = weights.read_trained
    monkeypatch.setattr(weights, "read_trained", lambda home, step: reads.append(step) or read(home, step))
    command = ["embed", "--model", str(run), "--manifest", str(tmp_path / "manifest.jsonl"), "--out", str(tmp_path / "o.npz")]
    opened.clear()
    assert main([*command, "--tables", "text"]) == 0
    headers = [converted / "omni_jax.json", converted / "tokenizer.json", run / "config.json"]
    headers += [file for part in ("weights", "adapter") for file in (converted / part).glob("*.json")]
    assert len(headers) == 5
    assert {str(file.relative_to(tmp_path.parent.parent)): opened[str(file)] for file in headers} == dict.fromkeys(
        (str(file.relative_to(tmp_path.parent.parent)) for file in headers), 1
    )
    assert reads == [3], "the trained weights were read for something else than loading"


def test_golden_what_a_run_trained_is_known_without_reading_it(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_model(run)
    before = weights.arrays_digest(source.read_trained())  # as earlier versions recorded it
    earlier = {"weights": {"trained": before}}
    assert made_with(source, source.preset, recorded=earlier)["weights"]["trained"] == before
    file = run / "checkpoints" / "3" / "digests" / "metadata"
    fingerprints = json.loads(file.read_text())
    with monkeypatch.context() as patch:
        patch.setattr(weights, "read_trained", lambda *_: pytest.fail("the trained weights were read"))
        found = source.trained_digest()
        assert found is not None and found.startswith(FINGERPRINTS) and found == open_model(run).trained_digest(found)
        name = next(iter(fingerprints["trainable"]))
        file.write_text(json.dumps(fingerprints | {"trainable": fingerprints["trainable"] | {name: "0" * 16}}))
        assert open_model(run).trained_digest() != found, "other values have another digest"
    file.unlink()  # as versions without fingerprints wrote it
    assert open_model(run).trained_digest() == before


def test_golden_an_index_of_an_earlier_version_is_still_searched_by_the_run_that_made_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"id": "a", "text": "a red ball"}) + "\n")
    index = tmp_path / "i.npz"
    assert main(["embed", "--model", str(run), "--manifest", str(tmp_path / "manifest.jsonl"), "--out", str(index)]) == 0
    table = read_embeddings(index)
    assert table.made_with is not None
    search = ["search", "--model", str(run), "--index", str(index), "--text", "a red ball", "--table", "text"]
    for digest, status in ((weights.arrays_digest(open_model(run).read_trained()), 0), ("0" * 32, 2)):
        recorded = {**table.made_with, "weights": {**table.made_with["weights"], "trained": digest}}
        write_embeddings(index, dataclasses.replace(table, made_with=recorded))
        assert main(search) == status
    assert "weights.trained differs" in capsys.readouterr().err
