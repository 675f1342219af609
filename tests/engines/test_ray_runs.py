"""prepare and embed on a cluster of two nodes: the bytes of the local commands, whatever is killed meanwhile."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from omni_jax.cli.main import main
from tests.engines.clusters import Nodes, begin, files, finish, make_clips, noticed, two_nodes, wait_for
from tests.golden_set import GoldenSet
from tests.repository import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.jit]
COUNT, SHARDS, BATCH = 100, 20, 4
SETTINGS = [text for field in ("frames=4", "pixels=3136", "audio_seconds=1") for text in ("--set", field)]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("clips"), COUNT)


@pytest.fixture(scope="module")
def model(golden: GoldenSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "omni"
    assert main(["convert", "to-jax", "--base", str(golden.checkpoint), "--adapter", str(golden.adapter_dir), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with two_nodes() as found:
        yield found


def prepare(manifest: Path, out: Path | str, *more: str) -> list[str | Path]:
    return ["prepare", "--manifest", manifest, "--out", out, "--shards", str(SHARDS), *SETTINGS, *more]


def embed(manifest: Path, model: Path, out: Path, *more: str) -> list[str | Path]:
    chosen = ["--batch-size", str(BATCH), "--preset", "training", *SETTINGS, "--tables", "text,av,tva"]
    return ["embed", "--model", model, "--manifest", manifest, "--out", out, *chosen, *more]


@pytest.fixture(scope="module")
def shards(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the local command makes."""
    place = tmp_path_factory.mktemp("local")
    finish(begin(*prepare(manifest, place / "shards", "--workers", "1"), log=place / "log"), place / "log", 1)
    return place / "shards"


@pytest.fixture(scope="module")
def tables(manifest: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("local")
    finish(begin(*embed(manifest, model, place / "e.npz", "--workers", "1"), log=place / "log"), place / "log", 1)
    return place


def same_tables(found: Path, expected: Path) -> None:
    for name in ("e.npz", "e.errors.jsonl", "e.warnings.jsonl"):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    assert not list(found.glob(".*"))


def test_a_golden_model_on_two_nodes_gives_the_bytes_of_the_local_command(
    nodes: Nodes, manifest: Path, model: Path, shards: Path, tables: Path, tmp_path: Path
) -> None:
    log = tmp_path / "prepare.log"
    (tmp_path / "shards/parts").mkdir(parents=True)  # object stores make folders by themselves
    store = f"file://{tmp_path / 'shards'}"
    said = finish(begin(*prepare(manifest, store, "--ray", nodes.address), log=log), log, 1)
    assert files(tmp_path / "shards") == files(shards)
    assert f"prepare: {COUNT}/{COUNT} clips" in said and "3 skipped, 14 silent" in said
    log = tmp_path / "embed.log"
    said = finish(begin(*embed(manifest, model, tmp_path / "e.npz", "--ray", nodes.address), log=log), log, 1)
    assert "3 skipped, 14 silent" in said and "2 models, 2 CPUs" in said
    same_tables(tmp_path, tables)


def test_a_killed_worker_and_a_killed_command_cost_no_shard(nodes: Nodes, manifest: Path, shards: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "shards", tmp_path / "log"
    process = begin(*prepare(manifest, out, "--ray", nodes.address), log=log)
    wait_for(lambda: len(list(out.glob("parts/*.json"))) >= 2, process, log)
    wait_for(lambda: nodes.workers("prepare"), process, log)[0].kill()
    noticed("its process was lost", process, log)
    wait_for(lambda: len(list(out.glob("parts/*.json"))) >= 6, process, log)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = len(list(out.glob("parts/*.json")))
    assert 6 <= made < SHARDS and not (out / "index.json").exists()
    said = finish(begin(*prepare(manifest, out, "--ray", nodes.address), log=log), log, 1)
    assert f"prepare: {COUNT}/{COUNT} clips" in said
    assert files(out) == files(shards)


def test_a_killed_golden_model_and_a_killed_command_cost_no_row(
    nodes: Nodes, manifest: Path, model: Path, tables: Path, tmp_path: Path
) -> None:
    log, journal = tmp_path / "log", tmp_path / ".e.unfinished"
    process = begin(*embed(manifest, model, tmp_path / "e.npz", "--ray", nodes.address), log=log)
    wait_for(lambda: len(list(journal.glob("part-*.npz"))) >= 2, process, log)
    wait_for(lambda: nodes.workers("Model.embed"), process, log)[0].kill()
    noticed("another takes its place", process, log)
    wait_for(lambda: len(list(journal.glob("part-*.npz"))) >= 8, process, log)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 8 <= len(list(journal.glob("part-*.npz"))) < COUNT // BATCH
    finish(begin(*embed(manifest, model, tmp_path / "e.npz", "--ray", nodes.address), log=log), log, 1)
    same_tables(tmp_path, tables)


def test_a_killed_node_costs_neither_shard_nor_row_of_a_golden_model(
    manifest: Path, model: Path, shards: Path, tables: Path, tmp_path: Path
) -> None:
    with two_nodes() as nodes:
        out, log = tmp_path / "shards", tmp_path / "prepare.log"
        process = begin(*prepare(manifest, out, "--ray", nodes.address), log=log)
        wait_for(lambda: len(list(out.glob("parts/*.json"))) >= 2, process, log)
        nodes.kill_at_work(nodes.second, "prepare", process, log)
        noticed("its process was lost", process, log)
        finish(process, log, 1)
        assert files(out) == files(shards)
        nodes.second = nodes.add()
        log, journal = tmp_path / "embed.log", tmp_path / ".e.unfinished"
        one_a_node = ["--ray", nodes.address, "--actor-resources", "model=1"]
        process = begin(*embed(manifest, model, tmp_path / "e.npz", *one_a_node), log=log)
        wait_for(lambda: len(list(journal.glob("part-*.npz"))) >= 2, process, log)
        nodes.kill_at_work(nodes.second, "Model.embed", process, log)
        noticed("a model was lost", process, log)
        finish(process, log, 1)
    same_tables(tmp_path, tables)


def test_a_node_with_other_code_and_a_missing_token_are_one_line(manifest: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "omni_jax"
    shutil.copytree(ROOT / "omni_jax", other, ignore=shutil.ignore_patterns("__pycache__", "wave_tiny"))
    (other / "types.py").write_text((other / "types.py").read_text() + "# another\n")
    with two_nodes() as nodes:
        said = {}
        nodes.add(PYTHONPATH=str(other.parent))
        wrong = {"no token": {"RAY_AUTH_TOKEN": "", "HOME": str(tmp_path)}, "a wrong one": {"RAY_AUTH_TOKEN": "f" * 64}, "other code": {}}
        for name, environment in wrong.items():
            log = tmp_path / f"{name}.log"
            process = begin(*prepare(manifest, tmp_path / name, "--ray", nodes.address), log=log, folder=tmp_path, **environment)
            said[name] = [line for line in finish(process, log, 2, 120).splitlines() if line.startswith("omni-jax: ")]
    assert [len(lines) for lines in said.values()] == [1, 1, 1], said
    assert "RAY_AUTH_TOKEN" in said["no token"][0] and f"--ray {nodes.address}: cannot be used" in said["a wrong one"][0]
    assert re.fullmatch(
        r"omni-jax: node \S+ has omni_jax \S+ \(\w+\), the command \S+ \(\w+\); install the same on all nodes", said["other code"][0]
    )
