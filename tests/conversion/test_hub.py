"""Models by their names on a Hub on loopback, and by the folders they are published as: fetched whole, checked, converted once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from omni_jax.config.hub_name import is_hub_name
from omni_jax.conversion.cached import converted
from omni_jax.conversion.folder import read_manifest
from omni_jax.conversion.hub import PART, needed_files
from omni_jax.conversion.importer import to_jax
from omni_jax.types import InputError
from tests.conversion.hub_server import Hub, Repository, around, asking, files_of, hub_on_loopback
from tests.golden_set import GoldenSet
from tests.repository import ROOT

BASE, ADAPTER = "tiny/WAVE", "tiny/OmniRetriever"
CODE = {
    "modeling_wave.py": b"raise SystemExit('code of the repository was executed')",
    "README.md": b"# A model",
    "training_args.bin": b"x",
}

BLOCK = 1 << 16
"""A file resumes where a block ends, and these files are small."""

SCRIPT = f"""
import sys
import huggingface_hub.constants
from omni_jax.conversion.cached import converted
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = {BLOCK}
converted(sys.argv[1])
"""


@pytest.fixture
def hub(golden: GoldenSet) -> Iterator[Hub]:
    repositories = {
        BASE: Repository(files_of(golden.checkpoint) | CODE),
        ADAPTER: Repository(files_of(golden.adapter_dir) | CODE, commit="2" * 40),
        "tiny/secret": Repository(files_of(golden.checkpoint), private=True),
        "tiny/gated": Repository(files_of(golden.checkpoint), gated=True),
        "tiny/code": Repository(CODE),
    }
    with hub_on_loopback(repositories) as served:
        yield served


@pytest.fixture
def ask(hub: Hub, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Calls `converted` where the Hub is the one on loopback, each time with the Hub's library imported again."""

    def run(*calls: tuple[list[str], dict[str, Any]], free: int | None = None, **variables: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        with asking(hub, tmp_path, **variables) as patch:
            from huggingface_hub import constants

            patch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", BLOCK)
            if free is not None:
                patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, used=10**9, free=free))
            for arguments, options in calls:
                told: list[str] = []
                try:
                    found.append({"place": str(converted(*arguments, **options, log=told.append)), "told": told})
                except InputError as error:
                    found.append({"error": str(error), "told": told})
        return found

    return run


def largest(repository: Repository) -> str:
    """Returns the name of the largest file of weights."""
    weights = [name for name in repository.files if name.endswith((".safetensors", ".bin")) and name not in CODE]
    return max(weights, key=lambda name: len(repository.files[name]))


@pytest.mark.costly
def test_golden_a_name_is_fetched_once_and_converted_once(
    golden: GoldenSet, hub: Hub, ask: Callable[..., list[dict[str, Any]]], tmp_path: Path
):
    call = ([BASE, ADAPTER], {})
    first, second = ask(call, call)
    to_jax(golden.checkpoint, tmp_path / "direct", adapter=golden.adapter_dir)
    made, direct = (read_manifest(folder) for folder in (first["place"], tmp_path / "direct"))
    assert (made.base_digest, made.adapter_digest) == (direct.base_digest, direct.adapter_digest)
    assert f"{BASE} at {'1' * 12} with {ADAPTER} at {'2' * 12}: fetched and converted once, which takes " in first["told"][0]
    assert second == {"place": first["place"], "told": []}
    fetched = hub.fetched()
    assert len(set(fetched)) == len(fetched) > 2
    assert not {*CODE} & {path.rpartition("/")[2] for path in fetched}
    record = json.loads(Path(f"{first['place']}.json").read_text())
    assert record["base"] == {"repository": BASE, "revisions": ["main"], "commit": "1" * 40}
    assert record["adapter"] == {"repository": ADAPTER, "revisions": ["main"], "commit": "2" * 40}

    hub.repositories[BASE].commit = "3" * 40  # the branch moves on: another folder, the old commit still has its own
    moved, pinned = ask(call, ([BASE, ADAPTER], {"revision": "3" * 40}))
    assert moved["place"] == pinned["place"] != first["place"]
    (offline,) = ask(call, HF_HUB_OFFLINE="1")
    assert offline["place"] == moved["place"]
    assert "HF_HUB_OFFLINE" in offline["told"][0]


@pytest.mark.costly
def test_golden_a_connection_that_drops_resumes_within_the_file(hub: Hub, ask: Callable[..., list[dict[str, Any]]]):
    weights = largest(hub.repositories[BASE])
    half = len(hub.repositories[BASE].files[weights]) // 2
    hub.repositories[BASE].cut[weights] = [half]
    (whole,) = ask(([BASE], {}))
    assert "place" in whole, whole
    assert [asked for method, path, asked in hub.requests if method == "GET" and path.endswith(weights)] == [
        "",
        f"bytes={half >> 16 << 16}-",
    ]


@pytest.mark.slow
def test_golden_a_kill_costs_nothing_of_what_was_fetched(hub: Hub, ask: Callable[..., list[dict[str, Any]]], tmp_path: Path):
    weights = largest(hub.repositories[BASE])
    half = len(hub.repositories[BASE].files[weights]) // 2 >> 16 << 16
    hub.repositories[BASE].stall[weights] = half
    command = [sys.executable, "-c", SCRIPT, BASE]
    with subprocess.Popen(command, env=around(hub, tmp_path), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + 120
            while sum(part.stat().st_size for part in tmp_path.rglob(f"*{PART}")) < half > 0:
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.05)
        finally:
            process.kill()
    hub.repositories[BASE].stall.clear()
    hub.requests.clear()
    (whole,) = ask(([BASE], {}))
    assert "place" in whole, whole
    assert [asked for method, path, asked in hub.requests if method == "GET" and path.endswith(weights)] == [f"bytes={half}-"]
    assert not list(tmp_path.rglob(f"*{PART}"))


@pytest.mark.costly
def test_golden_files_that_were_fetched_whole_are_kept(hub: Hub, ask: Callable[..., list[dict[str, Any]]]):
    weights = largest(hub.repositories[BASE])
    hub.repositories[BASE].cut[weights] = [1000] * 20
    (broken,) = ask(([BASE], {}))
    assert broken["error"].startswith(f"{BASE}: cannot be fetched (")
    assert "run it again: what was fetched is kept" in broken["error"]
    kept = {path for path in hub.fetched() if not path.endswith(weights)}
    hub.repositories[BASE].cut.clear()
    hub.requests.clear()
    (whole,) = ask(([BASE], {}))
    assert "place" in whole, whole
    assert kept
    assert not kept & set(hub.fetched())


@pytest.mark.costly
@pytest.mark.parametrize("file", ["", "config.json"])
def test_golden_a_wrong_digest_is_fetched_anew(hub: Hub, ask: Callable[..., list[dict[str, Any]]], file: str):
    file = file or largest(hub.repositories[BASE])
    data = hub.repositories[BASE].files[file]
    hub.repositories[BASE].served[file] = data[:-2] + bytes([data[-2] ^ 1]) + data[-1:]
    (wrong,) = ask(([BASE], {}))
    assert f"{BASE}: {file} differs from the digest that the Hub states" in wrong["error"]
    hub.repositories[BASE].served.clear()
    (right,) = ask(([BASE], {}))
    assert "place" in right, right


@pytest.mark.costly
def test_golden_what_cannot_be_had_is_one_line(hub: Hub, ask: Callable[..., list[dict[str, Any]]]):
    cases = {
        "no such folder here, and no such repository at": (["tiny/unknown"], {}),
        "or a private one; correct the name, or log in with 'hf auth login' or set HF_TOKEN": (["tiny/secret"], {}),
        "tiny/gated: is gated: accept its terms": (["tiny/gated"], {}),
        f"{BASE}: has no revision 'v9'": ([BASE], {"revision": "v9"}),
        "tiny/code: this repository holds no weights that can be read": (["tiny/code"], {}),
        f"{ADAPTER}: is an adapter; name the checkpoint": ([ADAPTER], {}),
        f"{ADAPTER}: has no revision 'v9'": ([BASE, ADAPTER], {"adapter_revision": "v9"}),
        "no such folder; name a folder, or a repository on the Hub": (["./nowhere"], {}),
    }
    for (words, _), found in zip(cases.items(), ask(*cases.values()), strict=True):
        assert words in found.get("error", ""), found
        assert "\n" not in found["error"]
    assert ask((["tiny/secret"], {}), HF_TOKEN="hf_x")[0].get("place")
    hub.requests.clear()
    (offline,) = ask(([BASE], {}), HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE says not to ask the Hub" in offline["error"]
    assert not hub.requests


def test_golden_space_is_asked_for_before_anything_is_fetched(hub: Hub, ask: Callable[..., list[dict[str, Any]]]):
    (full,) = ask(([BASE], {}), free=1000)
    assert f"{BASE} at {'1' * 12}: needs " in full["error"]
    assert "where 0.0 MB are free; free some, or name other folders by HF_HOME and OMNI_JAX_CACHE" in full["error"]
    assert not hub.fetched()


def test_golden_a_published_folder_is_converted_once(golden: GoldenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMNI_JAX_CACHE", str(tmp_path / "cache"))
    told: list[str] = []
    first = converted(golden.checkpoint, golden.adapter_dir, log=told.append)
    assert read_manifest(first).adapter is not None
    assert len(told) == 1 and "converted once, which takes" in told[0]
    assert converted(golden.checkpoint, golden.adapter_dir, log=told.append) == first
    assert converted(golden.checkpoint, log=told.append) != first
    assert len(told) == 2
    with pytest.raises(InputError, match="has no revision 'v1'; omit it"):
        converted(golden.checkpoint, revision="v1")
    monkeypatch.setenv("OMNI_JAX_CACHE", "off")
    with pytest.raises(InputError, match="no folder for converted models; name one by OMNI_JAX_CACHE"):
        converted(golden.checkpoint)


@pytest.mark.parametrize(
    ("names", "needed"),
    [
        ("config.json model.safetensors pytorch_model.bin tokenizer.json a.py README.md", "config.json model.safetensors tokenizer.json"),
        ("config.json pytorch_model-1.bin training_args.bin optimizer.pt", "config.json pytorch_model-1.bin"),
        ("adapter_config.json adapter_model.bin", "adapter_config.json adapter_model.bin"),
        ("config.json m.safetensors BEATs_iter3.pt optimizer.pt", "BEATs_iter3.pt config.json m.safetensors"),
        ("config.json pytorch_model.bin heads.safetensors", "config.json pytorch_model.bin"),
        ("config.json pytorch_model-1.bin m.safetensors", "config.json m.safetensors"),
        ("config.json", ""),
        ("model.safetensors", ""),
        (
            "config.json a.safetensors model.safetensors.index.json pytorch_model.bin.index.json",
            "a.safetensors config.json model.safetensors.index.json",
        ),
        ("config.json m.safetensors onnx/m.safetensors onnx/config.json", "config.json m.safetensors"),
        (
            "omni_jax.json config.json weights/d/0 code/x.py adapter/files/a.json",
            "adapter/files/a.json config.json omni_jax.json weights/d/0",
        ),
    ],
)
def test_of_a_repository_weights_and_settings_alone_are_needed(names: str, needed: str):
    assert needed_files(names.split()) == needed.split()


def test_a_name_on_the_hub_is_told_from_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "omni7b").mkdir(parents=True)
    assert is_hub_name("tsinghua-ee/WAVE-7B")
    for name in ("runs/omni7b", "omni7b", "./a/b", "/a/b", "a/b/c", "gs://a/b", "../a", "a b/c", "", Path("x")):
        assert not is_hub_name(name)
