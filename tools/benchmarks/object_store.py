"""Batches from an S3 server on loopback beside those of a local folder: a fifth of the requests fails once, one in fifty is slow.

moto's server answers; two data workers read through s3fs. Batches must have equal digests, from the first step and resumed, with a cache
that holds everything and one that holds two steps. Printed are requests, failures, and how long steps waited.

Run alone: .venv-reference/bin/python -m tools.benchmarks.object_store
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

CLIPS, SHARDS, STEPS, WORKERS = 120, 6, 12, 2
SLOW_S = 0.5


def run() -> dict[str, Any]:
    """Returns the counts of the server and the longest waits in seconds, and prints them; raises where a digest differs."""
    from omni_jax.data.plan import BatchConfig
    from omni_jax.data.record_cache import RecordCache
    from omni_jax.data.shards import ShardSource
    from omni_jax.io.remote import RemoteFolder
    from tests import object_servers
    from tests.data.test_remote_shards import digest, write_folder
    from tests.data.training_clips import PRESET, pipeline

    faults = object_servers.Faults(SLOW_S)
    batch = BatchConfig(micro_batch=8, blocks=2)
    found: dict[str, Any] = {}

    def batches(source: ShardSource, start: int = 0) -> tuple[list[str], float]:
        waits, digests, begun = [], [], time.perf_counter()
        for made in pipeline(source, batch, workers=WORKERS).batches(start, STEPS):
            waits.append(time.perf_counter() - begun)
            digests.append(digest(made))
            begun = time.perf_counter()
        return digests, max(waits[WORKERS:], default=0.0)  # without the start of the workers

    with tempfile.TemporaryDirectory(prefix="omni_jax-store-") as name, object_servers.s3(faults) as environment:
        os.environ |= environment
        folder = Path(name)
        write_folder(folder / "local", CLIPS, SHARDS)
        import s3fs  # pyright: ignore[reportMissingImports]

        s3fs.S3FileSystem().mkdir(object_servers.BUCKET)
        store = RemoteFolder(f"s3://{object_servers.BUCKET}/shards")
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
    found |= faults.counts
    print(f"{STEPS} steps, twice over S3, equal digests: " + ", ".join(f"{key} {np.round(value, 2)}" for key, value in found.items()))
    return found


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    run()
