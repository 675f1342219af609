"""The small test of the engine: a cluster of one node that the command starts itself. `test_ray_runs` has two nodes, and kills."""

from __future__ import annotations

from pathlib import Path

import pytest

from omni_jax.cli.main import main
from tests.engines.clusters import STORE, begin, files, finish, make_clips


@pytest.mark.costly
def test_a_local_cluster_writes_the_bytes_of_the_local_command_into_a_store(tmp_path: Path) -> None:
    manifest, log = make_clips(tmp_path, 6), tmp_path / "log"
    settings = [part for field in ("frames=2", "pixels=3136", "audio_seconds=1") for part in ("--set", field)]
    command = ["prepare", "--manifest", str(manifest), "--shards", "2", *settings]
    assert main([*command, "--out", str(tmp_path / "local"), "--workers", "0"]) == 1
    (tmp_path / "store/parts").mkdir(parents=True)  # object stores make folders by themselves
    out = f"file://{tmp_path / 'store'}"
    memory = {"RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(STORE)}
    said = finish(begin(*command, "--out", out, "--ray", "local", "--workers", "2", log=log, **memory), log, 1, 120)
    assert "prepare: 6/6 clips" in said and f"listed in {out}/errors.jsonl" in said
    assert files(tmp_path / "store") == files(tmp_path / "local")
