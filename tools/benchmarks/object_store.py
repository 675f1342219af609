"""Batches from an S3 server on loopback beside those of a local folder: a fifth of the requests fails once, one in fifty is slow.

moto's server answers; two data workers read through s3fs. Batches must have equal digests, from the first step and resumed, with a cache
that holds everything and one that holds two steps. Printed are requests, failures, and how long steps waited.

In an environment that has them, too: pip install 'moto[server]' s3fs; python -m tools.benchmarks.object_store
"""

from __future__ import annotations

import collections
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

BUCKET = "clips"
CLIPS, SHARDS, STEPS, WORKERS = 120, 6, 12, 2
SLOW_S = 0.5


class Faulty:
    """A WSGI application in front of another, which fails a fifth of the ranges asked for once and delays one in fifty."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application, self._guard = application, threading.Lock()
        self.counts: collections.Counter[str] = collections.Counter()
        self._seen: set[str] = set()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        asked = f"{environ['PATH_INFO']} {environ.get('HTTP_RANGE', '')}"
        chance = int.from_bytes(hashlib.blake2b(asked.encode(), digest_size=4).digest(), "little") % 100
        if environ["REQUEST_METHOD"] == "GET" and "HTTP_RANGE" in environ:
            with self._guard:
                first = asked not in self._seen
                self._seen.add(asked)
                self.counts["ranges"] += 1
            if first and chance < 20:
                self.counts["failed"] += 1
                start_response("503 Slow Down", [("Content-Length", "0")])
                return [b""]
            if chance >= 98:
                self.counts["slow"] += 1
                time.sleep(SLOW_S)
        return self._application(environ, start_response)


def run() -> dict[str, Any]:
    """Returns the counts of the server and the longest waits in seconds, and prints them; raises where a digest differs."""
    from moto.server import DomainDispatcherApplication, create_backend_app  # pyright: ignore[reportMissingImports]
    from werkzeug.serving import make_server  # pyright: ignore[reportMissingImports]

    from omni_jax.data.plan import BatchConfig
    from omni_jax.data.record_cache import RecordCache
    from omni_jax.data.shards import ShardSource
    from omni_jax.io.remote import RemoteFolder
    from tests.data.test_remote_shards import digest, write_folder
    from tests.data.training_clips import PRESET, pipeline

    faulty = Faulty(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, faulty, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
    batch = BatchConfig(micro_batch=8, blocks=2)
    found: dict[str, Any] = {}

    def batches(source: ShardSource, start: int = 0) -> tuple[list[str], float]:
        waits, digests, begun = [], [], time.perf_counter()
        for made in pipeline(source, batch, workers=WORKERS).batches(start, STEPS):
            waits.append(time.perf_counter() - begun)
            digests.append(digest(made))
            begun = time.perf_counter()
        return digests, max(waits[WORKERS:], default=0.0)  # without the start of the workers

    with tempfile.TemporaryDirectory(prefix="omni_jax-store-") as name:
        folder = Path(name)
        write_folder(folder / "local", CLIPS, SHARDS)
        import s3fs  # pyright: ignore[reportMissingImports]

        s3fs.S3FileSystem().mkdir(BUCKET)
        store = RemoteFolder(f"s3://{BUCKET}/shards")
        for path in (folder / "local").iterdir():
            store.put(path, path.name)
        near = ShardSource(folder / "local", PRESET)
        expected, found["local_wait_s"] = batches(near)
        clip = max(near._extent(n)[1] - near._extent(n)[0] for n in range(CLIPS))
        for what, size in (("large", 1 << 30), ("small", 16 * clip + (1 << 20))):
            cache = RecordCache(folder / what, size, WORKERS)
            far = ShardSource(store.location, PRESET, cache=cache)
            digests, found[f"{what}_cache_wait_s"] = batches(far)
            resumed, _ = batches(far, STEPS // 2)
            assert digests == expected and resumed == expected[STEPS // 2 :], f"other batches with a {what} cache"
            assert sum(path.stat().st_size for path in cache.folder.glob("*/*")) <= size
    server.shutdown()
    found |= faulty.counts
    print(f"{STEPS} steps, twice over S3, equal digests: " + ", ".join(f"{key} {np.round(value, 2)}" for key, value in found.items()))
    return found


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    run()
