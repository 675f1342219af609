"""A converted folder loaded by `SentenceTransformer`: the vectors of `encode`, and one line where its API cannot carry us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax import OmniRetriever, conversion
from tests.golden_set import GoldenSet
from tests.tolerances import assert_close

pytestmark = [pytest.mark.reference, pytest.mark.jit]


@pytest.fixture(scope="module")
def folder(golden: GoldenSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("modules") / "model"
    conversion.to_jax(golden.checkpoint, out, adapter=golden.adapter_dir)
    return out


@pytest.fixture(scope="module")
def loaded(golden: GoldenSet, folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), trust_remote_code=True, model_kwargs={"preset": golden.preset}, device="cpu")


def test_golden_folder_loads_and_embeds_as_encode(loaded: Any, folder: Path, golden: GoldenSet):
    model = OmniRetriever.from_pretrained(folder, preset=golden.preset)
    clip = golden.records[0]
    texts = [record.text for record in golden.records]
    assert_close(loaded.encode(texts, batch_size=4), model.encode(texts), "invariance")
    assert_close(loaded.encode(texts[0]), model.encode(texts[0]), "invariance")
    media = [str(clip.video), {"video": str(clip.video), "text": texts[0]}, {"audio": str(clip.audio)}]
    wanted = model.encode([{"video": clip.video}, {"video": clip.video, "text": texts[0]}, {"audio": clip.audio}], workers=1)
    assert_close([loaded.encode(item, workers=1) for item in media], wanted, "invariance")
    wave = {"array": np.sin(np.arange(16_000, dtype=np.float32) / 9), "sampling_rate": 16_000}
    assert_close(loaded.encode([wave, wave]), model.encode([wave, wave]), "invariance")
    short = loaded.encode(texts, truncate_dim=8, normalize_embeddings=True)
    assert_close(short, model.encode(texts, truncate_dim=8), "invariance")
    scores = loaded.similarity(loaded.encode_query(texts), loaded.encode_document(texts))
    assert_close(scores.numpy(), model.similarity(model.encode(texts), model.encode(texts)), "invariance")
    assert loaded.get_embedding_dimension() == model.dim and loaded.modalities[:4] == list(model.modalities)


def test_golden_prompts_of_a_backbone_with_prompts_are_those_of_encode(golden_nemotron: GoldenSet, tmp_path: Path):
    from sentence_transformers import SentenceTransformer

    conversion.to_jax(golden_nemotron.checkpoint, tmp_path / "model")
    loaded = SentenceTransformer(str(tmp_path / "model"), trust_remote_code=True)
    model = OmniRetriever.from_pretrained(tmp_path / "model")
    texts = ["a red ball", "rain"]
    assert loaded.prompts == {"query": "query: ", "document": "passage: "}
    assert_close(loaded.encode_query(texts), model.encode_query(texts), "invariance")
    assert_close(loaded.encode_document(texts), model.encode_document(texts), "invariance")
    with pytest.raises(ValueError, match="prompts are those of the training"):
        loaded.encode(texts, prompt="Represent this: ")


def test_golden_saved_model_loads_again(loaded: Any, golden: GoldenSet, tmp_path: Path):
    from sentence_transformers import SentenceTransformer

    loaded.save(str(tmp_path / "saved"), create_model_card=False)
    (module,) = json.loads((tmp_path / "saved" / "modules.json").read_text())
    assert module["type"] == "omni_jax.api.sentence_transformers.OmniRetrieverModule"
    again = SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True, model_kwargs={"preset": golden.preset})
    assert_close(again.encode("a red ball"), loaded.encode("a red ball"), "invariance")


def test_golden_what_the_api_cannot_carry_is_one_line(loaded: Any, folder: Path, golden: GoldenSet):
    from sentence_transformers import SentenceTransformer

    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(folder))
    with pytest.raises(ValueError, match=r"mixes|mixed"):
        loaded.encode(["a red ball", {"audio": str(golden.records[0].audio)}])
    with pytest.raises(ValueError, match="addresses are not followed"):
        loaded.encode("https://example.org/a.mp4")
    with pytest.raises(ValueError, match="item 0: is a chat message"):
        loaded[0](loaded[0].preprocess([{"role": "user", "content": "x"}]))
    with pytest.raises(ValueError, match="choose one by model_kwargs"):
        loaded.encode(["x"], processing_kwargs={"text": {"max_length": 3}})
    with pytest.raises(ValueError, match="leave pool and lists of devices out"):
        __import__("pickle").dumps(loaded[0])
