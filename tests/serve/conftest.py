"""A server of the golden model over the golden clips, in this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from omni_jax import OmniRetriever, conversion
from omni_jax.retrieval.embedding_file import write_embeddings
from omni_jax.serve.app import make_app
from omni_jax.serve.embedding import Embedder
from omni_jax.serve.guards import Rules
from omni_jax.serve.library import Library, open_indexes
from omni_jax.types import EmbeddingTable
from tests.golden_set import GoldenSet


@pytest.fixture(scope="package")
def folder(golden: GoldenSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("serve") / "model"
    conversion.to_jax(golden.checkpoint, out, adapter=golden.adapter_dir)
    return out


@pytest.fixture(scope="package")
def model(golden: GoldenSet, folder: Path) -> OmniRetriever:
    return OmniRetriever.from_pretrained(folder, preset=golden.preset)


@pytest.fixture(scope="package")
def index(golden: GoldenSet, model: OmniRetriever, folder: Path) -> Path:
    """The text and audio-video tables of the golden clips."""
    records = golden.records
    clips = [{"video": record.video, "audio": record.audio} for record in records]
    tables = {"text": model.encode([record.text for record in records]), "av": model.encode(clips, workers=1)}
    write_embeddings(folder.parent / "clips.npz", EmbeddingTable(tuple(r.id for r in records), tables, made_with=model.made_with()))
    return folder.parent / "clips.npz"


@pytest.fixture(scope="package")
def library(golden: GoldenSet, index: Path) -> Iterator[Library]:
    found = Library(open_indexes([str(index)]), {record.id: record for record in golden.records}, golden.dir / "media")
    yield found
    found.close()


@pytest.fixture(scope="package")
def serving(model: OmniRetriever, library: Library) -> Callable[..., TestClient]:
    """Returns a client of a server with other rules, to be entered."""

    def start(limits: dict[str, Any] | None = None) -> TestClient:
        embedder = Embedder(model, batch_size=4, workers=1, timeout_s=20, most_waiting=64)
        app = make_app(embedder, library, dataclasses.replace(Rules(), **limits or {}), "tiny")
        return TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)

    return start


@pytest.fixture(scope="package")
def client(serving: Callable[..., TestClient]) -> Iterator[TestClient]:
    with serving() as started:
        yield started
