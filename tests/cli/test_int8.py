"""`--weights` on the command line: what was embedded with it, and what may stand beside it. All read the golden checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import omni_jax
from omni_jax.cli.main import main
from omni_jax.config import ConfigError
from omni_jax.retrieval import read_embeddings
from omni_jax.retrieval.search import Index
from tests.golden_set import GoldenSet
from tests.tolerances import assert_close

pytestmark = pytest.mark.jit

CAPTIONS = ("a red ball", "rain on a tin roof", "two dogs bark")
KINDS = {"int8": "int8_embedding", "int8-dynamic": "int8_dynamic_embedding"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, converted: Path, golden: GoldenSet) -> Path:
    """Captions embedded as the weights are (keep.npz) and with each kind, and the checkpoint converted to int8 (model)."""
    folder = tmp_path_factory.mktemp("int8")
    (folder / "manifest.jsonl").write_text("".join(json.dumps({"id": text, "text": text}) + "\n" for text in CAPTIONS))
    for kind in ("keep", *KINDS):
        assert main([*embed(folder, converted), "--out", str(folder / f"{kind}.npz"), "--weights", kind]) == 0
    base, adapter = str(golden.checkpoint), str(golden.adapter_dir)
    words = ["convert", "to-jax", "--base", base, "--adapter", adapter, "--out", str(folder / "model"), "--weights", "int8"]
    assert main(words) == 0
    return folder


def embed(folder: Path, model: Path) -> list[str]:
    return ["embed", "--model", str(model), "--manifest", str(folder / "manifest.jsonl"), "--tables", "text"]


@pytest.mark.parametrize("kind", KINDS)
def test_golden_captions_embedded_in_int8_are_near_and_say_so(folder: Path, kind: str):
    whole, held = read_embeddings(folder / "keep.npz"), read_embeddings(folder / f"{kind}.npz")
    assert_close(held.tables["text"], whole.tables["text"], KINDS[kind])
    assert not np.array_equal(held.tables["text"], whole.tables["text"])
    assert whole.made_with is not None and whole.made_with["model"]["weights"] == "float"
    assert held.made_with is not None and held.made_with["model"]["weights"] == kind


def test_golden_embedding_in_int8_dynamic_says_what_it_loses(folder: Path, converted: Path, tmp_path: Path, capsys):
    capsys.readouterr()
    given = [*embed(folder, converted), "--out", str(tmp_path / "o.npz"), "--weights", "int8-dynamic"]
    assert main(given) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    rows = [read_embeddings(folder / f"{kind}.npz").tables["text"] for kind in KINDS]
    smallest = np.vecdot(*rows).min()
    assert said == f"int8-dynamic on 3 of these records, against int8: smallest cosine {smallest:.4f} (text)" and smallest < 0.99999
    assert main([*given, "--sample", "0"]) == 0
    assert "against int8" not in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_golden_what_is_not_rounded_takes_the_dtype_that_was_asked_for(folder: Path, converted: Path, tmp_path: Path, dtype: str):
    out = tmp_path / "o.npz"
    assert main([*embed(folder, converted), "--out", str(out), "--weights", "int8", "--dtype", dtype]) == 0
    held = read_embeddings(out)
    assert held.made_with is not None and (held.made_with["dtype"], held.made_with["model"]["weights"]) == (dtype, "int8")
    assert_close(held.tables["text"], read_embeddings(folder / "keep.npz").tables["text"], "int8_embedding")


def test_golden_a_folder_in_int8_embeds_what_reading_in_int8_does(folder: Path, tmp_path: Path):
    assert main([*embed(folder, folder / "model"), "--out", str(tmp_path / "o.npz")]) == 0
    held = read_embeddings(tmp_path / "o.npz")
    np.testing.assert_array_equal(held.tables["text"], read_embeddings(folder / "int8.npz").tables["text"])
    assert held.made_with is not None and held.made_with["model"]["weights"] == "int8"


def test_golden_an_index_of_another_precision_is_searched_and_that_is_said(folder: Path, converted: Path, capsys):
    search = ["search", "--model", str(converted), "--index", str(folder / "keep.npz"), "--text", CAPTIONS[1], "--table", "text", "--json"]
    capsys.readouterr()
    assert main([*search, "--weights", "int8"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["results"][0]["id"] == CAPTIONS[1]
    assert "keep.npz: was made with weights of another precision: model.weights is 'float' there, 'int8' here" in said.err
    assert main(search) == 0
    assert "precision" not in capsys.readouterr().err
    with pytest.warns(UserWarning, match=r"keep\.npz: was made with weights of another precision: model\.weights is 'float' there"):
        Index.open(folder / "keep.npz", "text", made_with=read_embeddings(folder / "int8.npz").made_with)


def test_golden_vectors_of_two_precisions_are_no_one_set(folder: Path, capsys):
    words = "model.weights is 'float' there, 'int8' here"
    capsys.readouterr()
    index = ["--index", str(folder / "keep.npz"), "--index", str(folder / "int8.npz")]
    assert main(["search", *index, "--text", "x", "--table", "text", "--model", "x"]) == 2
    error = capsys.readouterr().err
    assert words in error and "embed both with one model and the same settings" in error and len(error.splitlines()) == 1


def test_golden_from_python(converted: Path, golden: GoldenSet):
    with pytest.raises(ConfigError, match="weights='int4': choose one of keep, int8, int8-dynamic"):
        omni_jax.OmniRetriever.from_pretrained(converted, weights="int4")
    # float32 is what is computed in, and the type of what is not rounded.
    model = omni_jax.OmniRetriever.from_pretrained(converted, weights="int8", dtype="float32", preset=golden.preset)
    kinds = {str(path[-1]): leaf.dtype for path, leaf in _flat(model)}
    assert kinds["kernel_scale"] == np.float32 and kinds["lora_a"] == np.float32
    assert model.config.weights == "int8"


def _flat(model: omni_jax.OmniRetriever):
    from flax import nnx

    return nnx.to_flat_state(model._runner._params)
