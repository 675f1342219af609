"""s3:// and gs:// through their own clients, against servers on loopback whose reads fail or are late."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import fsspec
import numpy as np
import pytest

from omni_jax.api.training import TrainCallbacks, run_training
from omni_jax.cli.config_file import read_config
from omni_jax.cli.main import main
from omni_jax.data.plan import BatchConfig
from omni_jax.data.record_cache import RecordCache
from omni_jax.data.shards import ShardSource
from omni_jax.data.sources import open_source
from omni_jax.io import remote
from omni_jax.io.remote import RemoteFolder, absolute
from omni_jax.retrieval.embedding_file import part_path, read_embeddings, write_embeddings
from omni_jax.retrieval.search import Index
from omni_jax.train import metrics
from omni_jax.train.metrics import MetricsWriter
from omni_jax.train.skipped_records import SkippedRecords
from omni_jax.types import EmbeddingTable, InputError
from tests import object_servers
from tests.data.test_remote_shards import digests, write_folder
from tests.data.training_clips import PRESET, pipeline
from tests.media_samples import write_clip
from tests.object_servers import BUCKET, Faults
from tests.programs import programs_kept
from tests.train.tiny_run import CONFIG, make_files

pytestmark = [pytest.mark.reference, pytest.mark.jit]

BATCH = BatchConfig(micro_batch=4, micro_batches=2, blocks=2)
CLIPS, SHARDS, STEPS = 60, 3, 8


@pytest.fixture(scope="module", params=["s3", "gs"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, Faults]]:
    """The address of a bucket and the faults of its server, which this process and those that it starts talk to."""
    faults = Faults()
    with pytest.MonkeyPatch.context() as patch, getattr(object_servers, request.param)(faults) as environment:
        for name, value in environment.items():
            patch.setenv(name, value)
        if request.param == "s3":
            fsspec.filesystem("s3", skip_instance_cache=True).mkdir(BUCKET)
        yield f"{request.param}://{BUCKET}", faults
    fsspec.get_filesystem_class(request.param).clear_instance_cache()


@pytest.fixture
def store(server: tuple[str, Faults], monkeypatch: pytest.MonkeyPatch) -> tuple[str, Faults]:
    monkeypatch.setattr(remote, "PAUSE_S", 0.001)
    server[1].reset()
    return server


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    write_folder(folder, CLIPS, SHARDS)
    return folder


def upload(folder: Path, address: str) -> RemoteFolder:
    there = RemoteFolder(address)
    for path in folder.iterdir():
        there.put(path, path.name)
    return there


def said(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command that cannot go on and returns the one line that says why."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("omni-jax: ")]
    return line.removeprefix("omni-jax: ")


def test_batches_from_a_server_are_those_of_a_disk(store: tuple[str, Faults], local: Path, tmp_path: Path):
    address, faults = store
    upload(local, f"{address}/shards")
    expected = digests(pipeline(ShardSource(local, PRESET), BATCH), stop=STEPS)
    far = open_source(f"{address}/shards", PRESET, cache=RecordCache(tmp_path / "cache", 1 << 20))
    assert digests(pipeline(far, BATCH), stop=STEPS) == expected
    assert digests(pipeline(far, BATCH), 5, STEPS) == expected[5:], "resumed"
    assert faults.counts["failed"] > 0.1 * CLIPS and faults.counts["slow"] > 0, faults.counts


def test_a_preparation_has_the_bytes_of_a_local_one_and_trains(
    store: tuple[str, Faults], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = []
    for n in range(4):
        write_clip(tmp_path / f"{n}.mp4", 1.0, fps=5, width=96, height=64, seed=n)
        rows.append({"id": f"clip-{n}", "text": f"caption {n}", "video": f"{n}.mp4", "audio": f"{n}.mp4"})
    (tmp_path / "clips.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    fields = [part for field in ("frames=4", "pixels=1568", "audio_seconds=1") for part in ("--set", field)]
    arguments = ["prepare", "--manifest", str(tmp_path / "clips.jsonl"), *fields, "--shards", "2", "--workers", "0"]
    address = f"{store[0]}/prepared"
    for out in (str(tmp_path / "local"), address, address):  # the last finds everything made
        assert main([*arguments, "--out", out]) == 0
    local = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir() if path.is_file()}
    there = RemoteFolder(address)
    assert {name: there.read(name) for name in there.sizes()} == local
    far = open_source(address, PRESET, cache=RecordCache(tmp_path / "cache", 1 << 30))
    assert [far.load(n).record.id for n in range(4)] == [row["id"] for row in rows]
    assert said([*arguments, "--out", address, "--set", "frames=2"], capsys).startswith(f"{tmp_path}/clips.jsonl: ")


def test_sets_of_tables_are_written_scored_and_searched(store: tuple[str, Faults], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rng, near, far = np.random.default_rng(0), tmp_path / "whole.npz", f"{store[0]}/tables/whole.npz"
    for number in range(3):
        tables = {name: rng.standard_normal((20, 16)).astype(np.float32) for name in ("text", "av")}
        part = EmbeddingTable(tuple(f"{number}-{n}" for n in range(20)), tables, parts=(number,), of=3)  # type: ignore[arg-type]
        for place in (near, far):
            write_embeddings(part_path(absolute(place), number, 3), part)
    said = []
    for place in (near, far):
        assert main(["eval", str(place)]) == 0
        said.append(capsys.readouterr().out.replace(str(place), "FILE"))
    assert said[0] == said[1] and "AVG" in said[0]
    query = rng.standard_normal((2, 16))
    found = [Index.open(place, "av").search(query, 5) for place in (near, far)]
    assert repr(found[0]) == repr(found[1])


def test_a_run_that_resumes_has_the_metrics_and_skipped_records_of_before(store: tuple[str, Faults], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics, "Board", MagicMock())  # whose thread outlives the server
    folder = absolute(f"{store[0]}/run")

    def lines(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in RemoteFolder(f"{store[0]}/run").read(name).splitlines()]

    killed = MetricsWriter(folder, 0)
    for number in (1, 2):
        killed.write(number, {"loss": 1.0})
    killed.sync()
    killed.write(3, {"loss": 2.0})
    assert [row["step"] for row in lines("metrics.jsonl")] == [1, 2]
    resumed = MetricsWriter(folder, 2)
    resumed.write(3, {"loss": 3.0})
    resumed.close()
    assert [(row["step"], row["loss"]) for row in lines("metrics.jsonl")] == [(1, 1.0), (2, 1.0), (3, 3.0)]
    for start, names in enumerate((["a", "b"], ["b", "c"])):
        skipped = SkippedRecords(folder, 0)
        assert [skipped.add({"id": name, "reason": "broken"}) for name in names] == [start == 0, True]
        skipped.close()
    assert [row["id"] for row in lines("skipped_records.jsonl")] == ["a", "b", "c"]


def trained(folder: Path, shards: str, workdir: str, stop: int = 4) -> None:
    """Runs a config of 4 steps, all of one kind, until so many are made and saved."""
    (folder / "run.py").write_text(CONFIG.format(shards=shards, held_out=""))
    steps: list[int] = []
    callbacks = TrainCallbacks(print, lambda *_: None, lambda step, _: steps.append(step), lambda: stop in steps)
    changes = ("steps=4", "losses.weights={'pairwise': 1.0}", f"data.cache={folder / 'cache'}")
    assert run_training(read_config(str(folder / "run.py"), changes), absolute(workdir), callbacks).step == stop


def embedded(folder: Path, model: str, out: str) -> EmbeddingTable:
    clips = folder / "clips" / "held_out.jsonl"
    assert main(["embed", "--model", model, "--manifest", str(clips), "--tables", "text,av", "--out", out, "--workers", "0"]) == 0
    return read_embeddings(absolute(out))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, EmbeddingTable]]:
    """A folder of clips and shards, and what a run on this disk that nothing stopped makes of the held-out clips."""
    folder = tmp_path_factory.mktemp("run")
    make_files(folder)
    with programs_kept(folder / "programs"):
        trained(folder, str(folder / "shards"), str(folder / "run"))
        yield folder, embedded(folder, str(folder / "run"), str(folder / "held_out.npz"))


def test_a_run_from_a_bucket_resumes_and_embeds_as_one_on_a_disk(
    store: tuple[str, Faults], run: tuple[Path, EmbeddingTable], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(metrics, "Board", MagicMock())  # whose thread outlives the server
    address, (folder, expected) = store[0], run
    upload(folder / "shards", f"{address}/train")
    workdir = f"{address}/whole-run" if address.startswith("gs") else str(tmp_path)  # weights can be kept at gs:// alone
    for stop in (2, 4):
        trained(folder, f"{address}/train", workdir, stop)
    found = embedded(folder, workdir, f"{address}/held_out.npz")
    assert found.ids == expected.ids
    for name, table in expected.tables.items():
        np.testing.assert_array_equal(found.tables[name], table)


def test_what_is_missing_or_refused_is_one_line(
    store: tuple[str, Faults],
    local: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    address, faults = store
    scheme = address.partition("://")[0]
    (tmp_path / "clips.jsonl").write_text('{"id": "a", "text": "x", "video": "a.mp4"}')
    prepare = ["prepare", "--manifest", tmp_path / "clips.jsonl", "--out"]
    lacking = "not found.*; check that the bucket gone and what is named in it are there, and start again$"

    upload(local, f"{address}/going")
    far = open_source(f"{address}/going", PRESET, cache=RecordCache(tmp_path / "cache", 1 << 30))
    for name in local.glob("*record*"):
        RemoteFolder(f"{address}/going").remove(name.name)
    with pytest.raises(InputError, match=rf"^{address}/going/clips-train.*: not found after 6 tries; check that the bucket {BUCKET}"):
        list(pipeline(far, BATCH).batches(0, 2))
    far._remote._pool.shutdown()  # type: ignore[attr-defined] (reads that were begun go on for some tries)
    with pytest.raises(InputError, match=rf"^{scheme}://gone/shards: not a prepared folder"):
        open_source(f"{scheme}://gone/shards", PRESET, cache=RecordCache(tmp_path / "cache", 1 << 30))
    assert re.match(f"{scheme}://gone/made/preparation.json: {lacking}", said([*prepare, f"{scheme}://gone/made"], capsys))
    with pytest.raises(InputError, match=rf"^{scheme}://gone/t.npz: {lacking}"):
        write_embeddings(f"{scheme}://gone/t.npz", EmbeddingTable(("a",), {"text": np.ones((1, 4), np.float32)}))

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    fsspec.filesystem(scheme).clear_instance_cache()
    monkeypatch.setattr(faults, "anonymous", True)
    for arguments, place in ((["eval"], "t.npz"), (prepare, "made"), (["search", "--text", "x", "--model", tmp_path, "--index"], "t.npz")):
        found = said([*arguments, f"{address}/{place}"], capsys)
        assert re.match(rf"{address}/{place}.*: no access \(.*\); give this machine credentials for the bucket$", found), found
