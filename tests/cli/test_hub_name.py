"""`--model NAME` from the command line alone, with a Hub on loopback: embedded, searched offline afterwards, and refused in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from omni_jax.cli.main import main
from omni_jax.retrieval import read_embeddings
from tests.conversion.hub_server import Repository, around, files_of, hub_on_loopback
from tests.golden_set import GoldenSet
from tests.programs import QUICK
from tests.repository import ROOT
from tests.tolerances import assert_close

CAPTIONS = ("a red ball", "rain on a tin roof", "two dogs bark")
NAMES = ["--model", "tiny/WAVE", "--adapter", "tiny/OmniRetriever"]


@pytest.mark.slow
@pytest.mark.jit
def test_golden_a_name_on_the_hub_is_embedded_and_searched_with(golden: GoldenSet, converted: Path, tmp_path: Path):
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps({"id": text, "text": text}) + "\n" for text in CAPTIONS))
    manifest, here, there = (str(tmp_path / name) for name in ("clips.jsonl", "here.npz", "there.npz"))
    given = ["--manifest", manifest, "--tables", "text"]
    assert main(["embed", "--model", str(converted), *given, "--out", there]) == 0
    repositories = {
        "tiny/WAVE": Repository(files_of(golden.checkpoint)),
        "tiny/OmniRetriever": Repository(files_of(golden.adapter_dir), commit="2" * 40),
    }
    with hub_on_loopback(repositories) as hub:
        environment = around(hub, tmp_path) | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK}

        def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "omni_jax", *arguments]
            return subprocess.run(command, env=environment | variables, cwd=ROOT, capture_output=True, text=True)

        done = run("embed", *NAMES, *given, "--out", here)
        assert done.returncode == 0, done.stderr
        assert "fetched and converted once, which takes" in done.stderr
        assert_close(read_embeddings(here).tables["text"], read_embeddings(there).tables["text"], "invariance")
        hub.requests.clear()
        search = ["search", *NAMES, "--index", here, "--table", "text", "--text", CAPTIONS[1], "--json"]
        found = run(*search, HF_HUB_OFFLINE="1")
        assert found.returncode == 0, found.stderr
        assert json.loads(found.stdout)["results"][0]["id"] == CAPTIONS[1] and not hub.requests
        for names, words in (
            (["--model", "tiny/nothing"], "tiny/nothing: no such folder here, and no such repository at "),
            ([*NAMES, "--revision", "v9"], "tiny/WAVE: has no revision 'v9'"),
        ):
            refused = run("embed", *names, *given, "--out", str(tmp_path / "no.npz"))
            assert refused.returncode == 2 and words in refused.stderr and len(refused.stderr.splitlines()) == 1
