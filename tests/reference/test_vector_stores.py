"""The recipes of docs/guides/vector_stores.md, executed as they stand with the stores themselves: each finds what `search` finds."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax import conversion
from omni_jax.cli.main import main
from omni_jax.retrieval.embedding_file import write_embeddings
from omni_jax.retrieval.search import search
from omni_jax.types import EmbeddingTable
from tests import repository
from tests.golden_set import GoldenSet

PAGE = repository.ROOT / "docs/guides/vector_stores.md"
RECIPES = ("LanceDB", "Qdrant", "hnswlib", "FAISS")


@pytest.mark.reference
@pytest.mark.jit
def test_golden_recipes_find_what_search_finds(golden: GoldenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    conversion.to_jax(golden.checkpoint, tmp_path / "omni7b", adapter=golden.adapter_dir)
    rng = np.random.default_rng(0)
    width = json.loads((tmp_path / "omni7b/omni_jax.json").read_text())["model"]["decoder"]["hidden_size"]
    rows = {name: rng.standard_normal((500, width)).astype(np.float32) for name in ("text", "av")}
    ids = tuple(f"clip {i}" for i in range(500))
    write_embeddings("clips.npz", EmbeddingTable(ids, rows))
    Path("clips.jsonl").write_text("".join(json.dumps({"id": name, "text": f"caption of {name}"}) + "\n" for name in ids))

    head, *sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (commands,) = re.findall(r"^```sh\n(.*?)^```", head, re.MULTILINE | re.DOTALL)
    for line in commands.splitlines():
        assert main(shlex.split(line)[1:]) == 0, line
    names: dict[str, Any] = {}
    code = {section.partition("\n")[0]: re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL) for section in sections}
    exec(re.findall(r"^```python\n(.*?)^```", head, re.MULTILINE | re.DOTALL)[0], names)
    expected = [ids[row] for row in search(names["query"][None], rows["av"], 5)[1][0]]
    assert sorted(name for name, blocks in code.items() if blocks) == sorted(RECIPES)
    for name in RECIPES:
        exec(code[name][0], names)
        assert names.pop("found") == expected, name
