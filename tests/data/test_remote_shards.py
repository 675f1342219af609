"""Shards in an object store: the batches of a local folder, whatever the store and the cache do; what cannot be read is one line."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import jax
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from omni_jax.cli.main import main
from omni_jax.data.clip_index import write_index, write_rows
from omni_jax.data.manifest import read_manifest
from omni_jax.data.pipeline import PipelineBatch, TrainPipeline
from omni_jax.data.plan import BatchConfig
from omni_jax.data.prepare import Preparation
from omni_jax.data.record_cache import RecordCache
from omni_jax.data.remote_shards import READS
from omni_jax.data.shards import ShardSource, ShardWriter, encode_clip, index_row, shard_name
from omni_jax.data.sources import open_source
from omni_jax.io import remote
from omni_jax.io.remote import RemoteFolder
from omni_jax.types import ClipError, InputError
from tests.data.training_clips import PRESET, MemorySource, captions, pipeline
from tests.media_samples import write_clip

CLIPS, SHARDS = 40, 3
BATCH = BatchConfig(micro_batch=4, micro_batches=2, blocks=2)
STORE = "flaky://bucket/shards"


class Flaky(MemoryFileSystem):
    """A store in memory in which a fifth of the ranges fail once, and one in fifty is slow."""

    protocol = "flaky"  # type: ignore[assignment]
    seen: ClassVar[Counter[tuple[str, int | None]]] = Counter()
    failure: ClassVar[Exception | None] = None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("flaky://").strip("/")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self.seen[path, start] += 1
        if self.failure is not None:
            raise self.failure
        chance = int.from_bytes(hashlib.blake2b(f"{path} {start}".encode(), digest_size=4).digest(), "little") % 100
        if chance < 20 and self.seen[path, start] == 1:
            raise ConnectionResetError("the connection was reset")
        if chance >= 98:
            time.sleep(0.05)
        return super().cat_file(path, start=start, end=end, **kwargs)


class NoCredentialsError(Exception):
    """As botocore's."""


class HttpError(Exception):
    """As gcsfs's, which asks without a name where it finds no credentials."""


class DefaultCredentialsError(Exception):
    """As google.auth's."""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 prepared clips in three shards."""
    folder = tmp_path_factory.mktemp("prepared")
    write_folder(folder, CLIPS, SHARDS)
    return folder


def write_folder(folder: Path, count: int, of: int) -> None:
    """Writes a prepared folder of clips made from their number."""
    folder.mkdir(exist_ok=True)
    source, shards = MemorySource(captions(count)), []
    for shard in range(of):
        writer = ShardWriter(folder / shard_name(shard, of))
        clips = [source.load(n) for n in range(shard * count // of, (shard + 1) * count // of)]
        for clip in clips:
            writer.write(encode_clip(clip))
        shards.append(([index_row(clip) for clip in clips], writer.finish()))
    write_index(folder, PRESET, write_rows(folder, shards))


@pytest.fixture
def store(local: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The same folder at STORE, as a dict of its files."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(remote, "PAUSE_S", 0.001)
    monkeypatch.setattr(Flaky, "failure", None)
    Flaky.seen.clear()
    fs = Flaky(skip_instance_cache=True)
    for path in local.iterdir():
        fs.pipe_file(f"/bucket/shards/{path.name}", path.read_bytes())
    yield fs.store
    fs.store.clear()


def source(tmp_path: Path, size: int = 1 << 30) -> ShardSource:
    return open_source(STORE, PRESET, cache=RecordCache(tmp_path / "cache", size))  # type: ignore[return-value]


def digests(made: TrainPipeline, start: int = 0, stop: int = 8) -> list[str]:
    return [digest(batch) for batch in made.batches(start, stop)]


def digest(batch: PipelineBatch) -> str:
    found = hashlib.blake2b(repr((batch.update, batch.ids, batch.errors)).encode())
    for leaf in jax.tree.leaves(batch):
        found.update(np.ascontiguousarray(leaf))
    return found.hexdigest()


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("cache/*/*"))


@pytest.mark.jit
@pytest.mark.parametrize("size", [1 << 30, 200_000], ids=["a cache that holds all", "a cache that holds little"])
def test_batches_from_a_store_are_those_of_a_local_folder(local: Path, store: dict, tmp_path: Path, size: int):
    expected = digests(pipeline(ShardSource(local, PRESET), BATCH))
    far = source(tmp_path, size)
    assert digests(pipeline(far, BATCH)) == expected
    assert digests(pipeline(far, BATCH), 5, 8) == expected[5:], "resumed"
    assert held(tmp_path) <= size
    assert max(Flaky.seen.values()) > 1 and sum(count > 1 for count in Flaky.seen.values()) < len(Flaky.seen)
    if size > 1 << 20:  # read once, but for those that failed; and by another start not at all
        Flaky.seen.clear()
        assert digests(pipeline(source(tmp_path), BATCH)) == expected
        assert {path for path, _ in Flaky.seen} == {"/bucket/shards/index.json"}


@pytest.mark.jit
def test_each_process_reads_its_own_records_alone(local: Path, store: dict, tmp_path: Path):
    whole = pipeline(ShardSource(local, PRESET), BATCH)
    half = pipeline(source(tmp_path), BATCH, process_index=1, process_count=2)
    index = half._source._index  # type: ignore[attr-defined]
    list(half.batches(0, 2))
    own = {index.extent(int(n))[0] for update in range(2) for n in whole.planner.clips(update)[:, 2:].ravel()}
    ends = {index.extent(n)[1] for n in (12, 25, 39)}
    assert {start for _, start in Flaky.seen if start is not None} == own | ends


@pytest.mark.jit
@pytest.mark.slow
def test_workers_read_from_a_store_what_a_thread_reads_from_a_folder(local: Path, tmp_path: Path):
    far = open_source(f"file://{local}", PRESET, cache=RecordCache(tmp_path / "cache", 1 << 30, 2))
    assert digests(pipeline(far, BATCH, workers=2)) == digests(pipeline(ShardSource(local, PRESET), BATCH))


@pytest.mark.jit
def test_a_shard_that_disappears_ends_the_run_in_one_line_after_some_tries(store: dict, tmp_path: Path):
    made = pipeline(source(tmp_path), BATCH)
    batches = made.batches(0, 100)
    next(batches)
    for shard in range(SHARDS):
        del store[f"/bucket/shards/{shard_name(shard, SHARDS)}"]
    Flaky.seen.clear()
    with pytest.raises(
        InputError, match=r"^flaky://bucket/shards/clips-train.*: not found after 6 tries; check that the bucket bucket and what"
    ) as e:
        list(batches)
    assert not isinstance(e.value, ClipError) and "\n" not in str(e.value) and max(Flaky.seen.values()) == remote.TRIES


def test_reading_ahead_ends_with_the_first_range_that_cannot_be_read(store: dict, tmp_path: Path):
    shards = source(tmp_path)._remote
    assert shards is not None
    name = shard_name(0, SHARDS)
    del store[f"/bucket/shards/{name}"]
    Flaky.seen.clear()
    shards.ahead((name, start, start + 1) for start in range(200))
    shards._pool.shutdown()
    own = [(path, start) for path, start in Flaky.seen if path.endswith(name) and (start or 0) < 200]  # not what other tests read ahead
    assert 0 < len(own) <= READS


@pytest.mark.parametrize(
    "failure",
    [
        NoCredentialsError("Unable to locate credentials"),
        HttpError("Anonymous caller does not have storage.objects.get access to the Google Cloud Storage object., 401"),
        DefaultCredentialsError("Your default credentials were not found.\nTo set them up, see the page."),
        PermissionError(13, "Forbidden"),
    ],
    ids=["s3", "gs", "gs at once", "both"],
)
def test_what_a_store_refuses_is_one_line_at_once(store: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception):
    said = " ".join(str(failure).split())
    monkeypatch.setattr(Flaky, "failure", failure)
    with pytest.raises(InputError) as e:
        source(tmp_path)
    assert str(e.value) == f"{STORE}/index.json: no access ({said}); give this machine credentials for the bucket"
    assert set(Flaky.seen.values()) == {1}

    def refused(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(fsspec.core, "url_to_fs", refused)  # clients that look for credentials when they are made
    with pytest.raises(InputError) as e:
        open_source("gs://bucket/x", PRESET, cache=RecordCache(tmp_path / "cache", 1))
    assert str(e.value) == f"gs://bucket/x: no access ({said}); give this machine credentials for the bucket"


@pytest.mark.parametrize(("address", "extra"), [("s3://bucket/x", "s3"), ("gs://bucket/x", "gcs")])
def test_a_missing_client_of_a_store_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, extra: str):
    def absent(*_: Any, **__: Any) -> None:
        raise ImportError("Install a client")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(InputError, match=rf"^{address}: needs a package .*; run pip install 'omni-jax\[{extra}\]'$"):
        open_source(address, PRESET, cache=RecordCache(tmp_path / "cache", 1))


def test_a_folder_that_is_not_whole_is_refused(store: dict, tmp_path: Path):
    whole = store[f"/bucket/shards/{shard_name(1, SHARDS)}"].getvalue()
    Flaky().pipe_file(f"/bucket/shards/{shard_name(1, SHARDS)}", whole[:-9])
    with pytest.raises(InputError, match=rf"00001-of-00003: has {len(whole) - 9} bytes where the index has {len(whole)}; run"):
        source(tmp_path)
    del store["/bucket/shards/index.json"]
    with pytest.raises(InputError, match=r"flaky://bucket/shards: not a prepared folder, or an unfinished one"):
        source(tmp_path)


def test_what_is_damaged_in_the_cache_is_read_again_and_in_the_store_is_that_clips_error(local: Path, store: dict, tmp_path: Path):
    far, near = source(tmp_path), ShardSource(local, PRESET)
    first = far.load(7)
    for path in (tmp_path / "cache").glob("*/*"):
        path.write_bytes(bytes(path.stat().st_size))
    again = far.load(7)
    assert first.video is not None and again.video is not None and near.load(7).video is not None
    assert np.array_equal(again.video.frames, first.video.frames) and again.record.id == near.ids[7]
    start, stop = far._extent(7)
    name = f"/bucket/shards/{shard_name(0, SHARDS)}"
    data = bytearray(store[name].getvalue())
    data[start + 80 : stop - 9] = bytes(stop - start - 89)
    Flaky().pipe_file(name, bytes(data))
    for path in (tmp_path / "cache").glob("*/*"):
        path.unlink()
    with pytest.raises(ClipError, match=r"clip 'clip-7' cannot be read \(.*\); run 'omni-jax prepare' again"):
        far.load(7)
    assert far.load(8).record.id == "clip-8"


def test_a_cache_keeps_to_its_size_and_forgets_what_was_used_longest_ago(tmp_path: Path):
    cache = RecordCache(tmp_path / "cache", 8000)
    for number in range(200):
        cache.put(f"a/{number}", bytes(100))
        assert cache.get("a/0") == bytes(100), "used again and again"
        assert held(tmp_path) <= 8000
    assert cache.get("a/199") is not None and cache.get("a/60") is None
    assert not list((tmp_path / "cache" / "a").glob(".*"))


def test_a_preparation_in_a_store_is_that_of_a_local_folder_and_resumes_from_any_machine(store: dict, tmp_path: Path):
    store.clear()
    rows = []
    for n in range(4):
        write_clip(tmp_path / f"{n}.mp4", 1.0, fps=5, width=96, height=64, seed=n)
        rows.append({"id": f"clip-{n}", "text": f"caption {n}", "video": f"{n}.mp4", "audio": f"{n}.mp4"})
    rows.append({"id": "gone", "text": "x", "video": "gone.mp4", "audio": "gone.mp4"})
    (tmp_path / "clips.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    records = read_manifest(tmp_path / "clips.jsonl").records
    settings = [part for field in ("frames=4", "pixels=1568", "audio_seconds=1") for part in ("--set", field)]
    arguments = ["prepare", "--manifest", str(tmp_path / "clips.jsonl"), *settings, "--shards", "3", "--workers", "0"]
    assert main([*arguments, "--out", str(tmp_path / "local")]) == 1
    (tmp_path / "stopped").mkdir()
    stopped = Preparation(tmp_path / "stopped", records, (), PRESET, 3, RemoteFolder(STORE)).run(0, 60)
    for _ in range(3):  # within the second shard
        next(stopped)
    stopped.close()  # type: ignore[attr-defined] (a generator)
    first = f"/bucket/shards/{shard_name(0, 3)}"
    assert {path for path in store if "array_record" in path} == {first}
    made = store[first].modified
    assert main([*arguments, "--out", STORE]) == 1
    assert store[first].modified == made, "a finished shard is not made again"
    local = {str(path.relative_to(tmp_path / "local")): path.read_bytes() for path in (tmp_path / "local").rglob("*") if path.is_file()}
    assert {path.removeprefix("/bucket/shards/"): file.getvalue() for path, file in store.items()} == local
    far = source(tmp_path)
    assert [far.load(n).record.id for n in range(4)] == [f"clip-{n}" for n in range(4)]
    assert main([*arguments, "--out", STORE, "--set", "frames=2"]) == 2
