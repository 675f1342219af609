"""`omni-jax embed` on Ray: tasks decode on every CPU, actors embed, each with a model of its own.

The command itself only plans. It takes the clips in the order of the records, groups them as the local command does, chooses the shapes of
each group from its sizes alone, and keeps the parts in order. So the bits do not depend on who finished first. Frames and sound pass from
decoding nodes to models without going through the command.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import secrets
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from omni_jax.config import TABLE_MODALITIES, ModelConfig, Preset
from omni_jax.engines.ray_cluster import ATTEMPTS, Counters, Lost, Report, code_stamp, connected, cpus, result
from omni_jax.engines.ray_models import Clip, Group, Models, wanted
from omni_jax.engines.ray_workers import Setup, Status, decode
from omni_jax.media.workers import stop_at_our_fault
from omni_jax.tokens.prompts import able_records
from omni_jax.types import ClipError, Record

if TYPE_CHECKING:
    from omni_jax.api.weights import ModelSource
    from omni_jax.retrieval.embedding_pass import Part


class RayEmbedding:
    """Embeds on a cluster, with `made_with` and `embed` as `OmniRetriever` has them; loads no weights itself."""

    def __init__(
        self,
        address: str,
        local_cpus: int,
        source: ModelSource,
        dtype: str,
        weights: str,
        preset: Preset,
        actors: int | None,
        resources: dict[str, float],
    ):
        """Takes what a run is.

        Args:
          address, local_cpus: as in `ray_cluster.connected`.
          source: the model, whose folders are seen by every node that embeds.
          dtype, weights: as in `OmniRetriever.from_pretrained`.
          actors: most models to load; None: as many as fit.
          resources: what an actor asks for, as {"TPU": 4}; {}: a host's TPU chips, one GPU, or a node without either.
        """
        self._address, self._local_cpus = address, local_cpus
        self._source, self._dtype, self._weights, self._preset = source, dtype, weights, preset
        self._actors, self._resources = actors, resources
        self._held, self._work = contextlib.ExitStack(), None

    def __enter__(self) -> RayEmbedding:
        return self

    def __exit__(self, *error: object) -> None:
        """Leaves the cluster."""
        self._held.close()

    @property
    def config(self) -> ModelConfig:
        return self._source.config

    @property
    def dim(self) -> int:
        """D, the width of an embedding."""
        return self.config.decoder.hidden_size

    def made_with(self, *, normalize: bool = True) -> dict[str, Any]:
        """Returns what `OmniRetriever.made_with` does."""
        from omni_jax.api.made_with import made_with

        return made_with(self._source, self._preset, dtype=self._dtype, normalize=normalize)

    def embed(
        self,
        records: Sequence[Record],
        tables: Sequence[str],
        *,
        batch_size: int,
        normalize: bool,
        timeout: float,
        shapes: Mapping[str, Iterable[tuple[int, ...]]],
        report: Report,
    ) -> Iterator[Part]:
        """Yields the parts that `OmniRetriever.embed` yields, of the same bits, in the same order.

        Args:
          report: shows the progress.

        Raises:
          InputError: when there is no cluster, a node has other code or cannot load the model, or work was lost `ATTEMPTS` times.
        """
        from omni_jax.retrieval.embedding_pass import Part, grouped
        from omni_jax.tokens.batching import Planner, plan_group

        able, unable = able_records(records, tables)
        if unable:
            yield Part(problems=unable)
        work = self._work = self._work or self._begin(tables, batch_size, normalize, timeout, report)
        work.report = work.models.report = work.counters.report = report
        planner: Planner | None = None
        for clips, problems in grouped(stop_at_our_fault(work.decoder.clips(able, work.idle)), batch_size):
            if planner is None:
                while not work.models.ready:  # how many rows a batch is a multiple of is known where the devices are
                    work.step()
                planner = Planner(shapes, row_multiple=work.models.row_multiple)
            before = planner.known()
            if clips:
                plan_group([clip.status.sizes for clip in clips if clip.status.sizes], self.config, planner)
            work.models.add(Group(clips, tuple(problems), before, planner.known()))
            while work.models.full:
                work.step()
                yield from work.finished()
            yield from work.finished()
        while work.models.busy:
            work.step()
            yield from work.finished()
        work.idle()

    def _begin(self, tables: Sequence[str], batch_size: int, normalize: bool, timeout: float, report: Report) -> _Work:
        """Connects, and asks for the actors."""
        home = self._source.home
        setup = Setup(
            key=secrets.token_hex(8),
            stamp=code_stamp(),
            model=os.fspath(home if "://" in os.fspath(home) else home.resolve()),
            step=self._source.step,
            dtype=self._dtype,
            weights=self._weights,
            preset=self._preset,
            tables=tuple(tables),
            needed=frozenset().union(*(TABLE_MODALITIES[name] for name in tables)),
            normalize=normalize,
            timeout_s=timeout,
            config=self.config,
            tokenizer=self._source.tokenizer,
        )
        ray = self._held.enter_context(connected(self._address, self._local_cpus))
        box = [ray.put(setup)]  # in a list, so that Ray hands over the reference: each process reads it once
        decoder = _Decoder(ray, setup, box, batch_size)
        models = Models(ray, box, wanted(ray, self._resources), self._actors, report, decoder.start)
        return _Work(ray, decoder, models, Counters("embed", report), report)


@dataclasses.dataclass
class _Work:
    """The work of the cluster, from the first file of embeddings to the last."""

    ray: Any
    decoder: _Decoder
    models: Models
    counters: Counters
    report: Report

    def step(self) -> None:
        """Waits a little, and shows the progress."""
        self.models.step(1.0)
        self.idle()

    def idle(self) -> None:
        """Handles what has happened, and shows the progress."""
        self.models.step(0.0)
        self.counters.tick(f"{self.models.ready} models, {cpus(self.ray)} CPUs")

    def finished(self) -> Iterator[Part]:
        """Yields the parts that are next, and counts what is in them."""
        for group, part in self.models.finished():
            good = [clip.status for clip in group.clips]
            part = dataclasses.replace(part, problems=(*group.problems, *part.problems), shapes=group.after)
            self.counters.add(clips=len(part.ids), skipped=len(part.problems), silent=sum(s.silent for s in good))
            self.counters.add(bytes=sum(s.size for s in good))
            yield part


class _Decoder:
    """Tasks that decode, a bounded number of records ahead of what is embedded."""

    def __init__(self, ray: Any, setup: Setup, box: list[Any], batch_size: int):
        self._ray, self._setup, self._box, self._batch = ray, setup, box, batch_size
        self._decode = ray.remote(decode).options(num_cpus=1, num_returns=2, max_retries=3, name="decode")
        self._room, self._asked = cpus(ray), time.monotonic()

    def start(self, clip: Clip) -> None:
        """Begins to decode a clip, once more where its features were lost."""
        clip.ready, clip.features = self._decode.remote(self._setup.key, self._box, clip.record)

    def clips(self, records: Sequence[Record], idle: Callable[[], None]) -> Generator[tuple[Record, Clip | ClipError]]:
        """Yields the records in order, each with its clip or with the reason why there is none; `idle` is called while it waits."""
        source, waiting = iter(records), collections.deque[Clip]()
        while True:
            while len(waiting) < self._ahead() and (record := next(source, None)) is not None:
                waiting.append(Clip(record, None, None, Status()))
                self.start(waiting[-1])
            if not waiting:
                return
            clip = waiting.popleft()
            while isinstance(status := self._wait(clip, idle), Lost):
                clip.attempts += 1
                if clip.attempts == ATTEMPTS:
                    status = Status(error=ClipError(f"record {clip.record.id!r}: its process was lost {ATTEMPTS} times ({status.reason})"))
                    break
                self.start(clip)
            clip.status = status
            yield clip.record, status.error or clip

    def _wait(self, clip: Clip, idle: Callable[[], None]) -> Status | Lost:
        while not self._ray.wait([clip.ready], timeout=1.0)[0]:
            idle()
        return result(self._ray, clip.ready)

    def _ahead(self) -> int:
        if time.monotonic() - self._asked > 5:  # nodes come and go
            self._room, self._asked = cpus(self._ray), time.monotonic()
        return 2 * self._batch + 2 * self._room
