"""`omni-jax prepare` on Ray: a task for each shard, which decodes its clips in processes of its node and writes it where it belongs."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from omni_jax.data.loading import media_name
from omni_jax.data.prepare import PARTS, ShardJob, prepare_record, send_shard, write_shard
from omni_jax.engines.ray_cluster import ATTEMPTS, Counters, Lost, Report, check_code, code_stamp, connected, cpus, result
from omni_jax.io import scratch_folder
from omni_jax.io.remote import RemoteFolder
from omni_jax.media.workers import Guarded, stop_at_our_fault
from omni_jax.types import InputError

APPEAR_S = 30.0  # until a file of another node is seen here: network disks remember that there was none


@dataclasses.dataclass
class _Task:
    job: ShardJob
    attempts: int = 0


def write_shards(
    jobs: Sequence[ShardJob], address: str, local_cpus: int, timeout_s: float, report: Report, store: str | None = None
) -> Generator[int]:
    """Makes shards on a cluster, in any order; yields the number of records in each that is finished.

    Args:
      jobs: from `Preparation.begin`; their media are seen by every node, and their folder where there is no store.
      address, local_cpus: as in `ray_cluster.connected`.
      timeout_s: as in `media.workers.run_guarded`.
      store: address of the object store that the folder is to be in, to which every node sends what it has made.

    Raises:
      InputError: when there is no cluster, a node has other code or another disk, a shard cannot be written, or its process was lost
        `ATTEMPTS` times.
    """
    with connected(address, local_cpus) as ray:
        counters = Counters("prepare", report)
        waiting = collections.deque(_Task(job) for job in jobs)
        running: dict[Any, _Task] = {}
        processes = _processes(ray, len(jobs))
        sent = RemoteFolder(store) if store is not None else None
        write = ray.remote(_write).options(num_cpus=processes, max_retries=0, name="prepare")
        while waiting or running:
            free = cpus(ray)
            while waiting and len(running) < 2 * (free // processes) + 1:
                task = waiting.popleft()
                running[write.remote(task.job, processes, timeout_s, code_stamp(), store)] = task
            for ref in ray.wait(list(running), timeout=1.0)[0]:
                task = running.pop(ref)
                counts = result(ray, ref)
                if isinstance(counts, Lost):
                    _again(task, counts, report)
                    waiting.appendleft(task)
                    continue
                if sent is None:
                    _check_seen(task.job)
                else:
                    sent.fetch(f"{PARTS}/{task.job.part.name}", task.job.part)
                counters.add(**counts)
                yield len(task.job.records)
            counters.tick(f"{len(running)} shards on {free} CPUs")


_pools: dict[tuple[int, float], _Pool] = {}  # of this process: children are kept from one task to the next


class _Pool:
    """Children that decode, one a thread, as those of `media.workers.run_guarded`, which ends its own with every call."""

    def __init__(self, processes: int, timeout_s: float):
        self._guarded = Guarded(prepare_record, timeout_s)
        self._threads, self._ahead = ThreadPoolExecutor(processes), 2 * processes

    def outcomes(self, items: Iterable[Any]) -> Generator[tuple[Any, Any]]:
        """Yields (item, `Prepared` or ClipError) in order, a bounded number of items ahead."""
        source, waiting = iter(items), collections.deque[tuple[Any, Future[Any]]]()
        while True:
            for item in itertools.islice(source, self._ahead - len(waiting)):
                waiting.append((item, self._threads.submit(self._guarded.outcome, item, media_name(item[0]))))
            if not waiting:
                return
            item, future = waiting.popleft()
            yield item, future.result()


def _write(job: ShardJob, processes: int, timeout_s: float, stamp: str, store: str | None) -> dict[str, int]:
    """In a task: makes a shard and returns what to count of it."""
    check_code(stamp)
    counts: collections.Counter[str] = collections.Counter()
    pool = _pools.setdefault((processes, timeout_s), _Pool(processes, timeout_s))
    with contextlib.ExitStack() as held:
        if store is not None:  # a shard is written on this node's disk, and sent when it is whole
            folder = held.enter_context(scratch_folder("omni_jax-prepare"))
            job = dataclasses.replace(job, path=folder / job.path.name, part=folder / job.part.name)
        for found in write_shard(job, stop_at_our_fault(pool.outcomes(job.items))):
            counts.update(found, clips=1 - found.get("skipped", 0))
        if store is not None:
            send_shard(job, RemoteFolder(store))
    return dict(counts)


def _processes(ray: Any, shards: int) -> int:
    """Returns the decoding processes of a task: one, or more where there are fewer shards than CPUs."""
    largest = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=1)
    return max(1, min(cpus(ray) // max(1, shards), largest))


def _again(task: _Task, lost: Lost, report: Report) -> None:
    task.attempts += 1
    if task.attempts == ATTEMPTS:
        raise InputError(
            f"{task.job.path}: its process was lost {ATTEMPTS} times, the last time by {lost.reason}; see to the nodes, run again"
        )
    report.note(f"{task.job.path.name}: its process was lost ({lost.reason}); it is made again")


def _check_seen(job: ShardJob) -> None:
    deadline = time.monotonic() + APPEAR_S
    while not (job.part.exists() and job.path.exists()):
        if time.monotonic() > deadline:
            raise InputError(
                f"{job.path}: was written on another node and is not seen here; --out must be a folder that all nodes share, or in a bucket"
            )
        time.sleep(0.5)
