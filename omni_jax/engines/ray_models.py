"""The models of a run on Ray: as many actors as fit, replaced when they are lost. No actor waits for another."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from omni_jax.engines.ray_cluster import ATTEMPTS, Lost, Report, result
from omni_jax.engines.ray_workers import Model, Status
from omni_jax.types import InputError, Record

if TYPE_CHECKING:
    from omni_jax.retrieval.embedding_pass import Part

AT_ONCE = 2  # groups of one model: one that is computed and one that is prepared
NONE_S = 1800.0  # without any model: longer than a node pool takes to grow and 17 GB take to load
_NOTE_S, _GROW_S = 60.0, 10.0

Shapes = dict[str, list[tuple[int, ...]]]


@dataclasses.dataclass
class Clip:
    """A clip that is decoded, or is being decoded: what is known of it here, and where its features are."""

    record: Record
    ready: Any
    features: Any
    status: Status
    attempts: int = 0


@dataclasses.dataclass
class Group:
    """Clips that are encoded together; `before` and `after`: shapes that the planner knew before and after it chose theirs."""

    clips: list[Clip]
    problems: tuple[tuple[str, str], ...]
    before: Shapes
    after: Shapes
    number: int = 0
    attempts: int = 0


@dataclasses.dataclass
class _Seat:
    """An actor, its rows (None: not ready), and what it works on."""

    actor: Any
    starting: Any
    rows: int | None = None
    jobs: dict[Any, Group] = dataclasses.field(default_factory=dict)


def wanted(ray: Any, asked: dict[str, float]) -> dict[str, float]:
    """Returns what an actor asks for: what was asked, or all TPU chips of a host, or one GPU, or nothing where no node has either."""
    nodes = _nodes(ray)
    chips = max((node.get("TPU", 0) for node in nodes), default=0)
    return asked or ({"TPU": chips} if chips else {"GPU": 1} if any(node.get("GPU") for node in nodes) else {})


def capacity(ray: Any, asked: dict[str, float]) -> int:
    """Returns how many actors fit on the nodes: one a node where an actor asks for nothing, and one at least."""
    nodes = _nodes(ray)
    return max(1, sum(min(int(node.get(name, 0) // count) for name, count in asked.items()) for node in nodes) if asked else len(nodes))


def _nodes(ray: Any) -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


class Models:
    """Actors with their groups.

    Attributes:
      row_multiple: rows of their batches are a multiple of it.
      report: called with each loss.
    """

    def __init__(
        self, ray: Any, box: list[Any], asked: dict[str, float], actors: int | None, report: Report, decode: Callable[[Clip], None]
    ):
        """Asks for `actors` actors, None: for as many as fit, asked again from time to time.

        Args:
          box: holds the reference of the run's `Setup`.
          asked: what an actor asks for.
          decode: decodes a clip again whose features were lost.
        """
        self._ray, self._box, self._asked, self.report, self._decode = ray, box, asked, report, decode
        others = {name: count for name, count in asked.items() if name not in ("CPU", "GPU")}
        self._make = ray.remote(Model).options(
            num_cpus=asked.get("CPU", 0),
            num_gpus=asked.get("GPU", 0),
            resources=others,
            max_restarts=0,
            max_concurrency=AT_ONCE,
            scheduling_strategy="SPREAD",
        )
        self._todo: collections.deque[Group] = collections.deque()
        self._done: dict[int, tuple[Group, Part]] = {}
        self._added = self._next = self._failures = self.row_multiple = 0
        self._last = self._noted = self._grown = time.monotonic()
        self._grows = actors is None
        self._seats = [self._hire() for _ in range(actors or capacity(ray, asked))]

    @property
    def ready(self) -> int:
        """Actors that have loaded their model."""
        return sum(seat.rows is not None for seat in self._seats)

    @property
    def busy(self) -> bool:
        """Whether some group is not finished."""
        return self._next < self._added

    @property
    def full(self) -> bool:
        """Whether more groups should wait: every actor is busy, or too many are finished before an earlier one."""
        return bool(self._todo) or self._added - self._next >= AT_ONCE * 2 * max(1, self.ready)

    def add(self, group: Group) -> None:
        """Takes the next group."""
        group.number = self._added
        self._added += 1
        if group.clips:
            self._todo.append(group)
            self._assign()
        else:
            from omni_jax.retrieval.embedding_pass import Part

            self._done[group.number] = group, Part()

    def finished(self) -> Iterator[tuple[Group, Part]]:
        """Yields the groups that are finished and their parts, in order."""
        while self._next in self._done:
            yield self._done.pop(self._next)
            self._next += 1

    def step(self, timeout_s: float) -> None:
        """Waits so long for something to happen, and deals with it.

        Raises:
          InputError: where no model can be had, or a group was lost too often.
        """
        refs = {seat.starting: seat for seat in self._seats if seat.starting is not None}
        refs |= {ref: seat for seat in self._seats for ref in seat.jobs}
        for ref in self._ray.wait(list(refs), timeout=timeout_s)[0] if refs else ():
            seat = refs[ref]
            outcome = result(self._ray, ref)
            if ref == seat.starting:
                self._started(seat, outcome)
            else:
                self._embedded(seat, seat.jobs.pop(ref), outcome)
        self._assign()
        self._check_any()
        if self._grows and time.monotonic() - self._grown > _GROW_S:
            self._grown = time.monotonic()
            self._seats += [self._hire() for _ in range(capacity(self._ray, self._asked) - len(self._seats))]

    def _hire(self) -> _Seat:
        actor = self._make.remote(self._box)
        return _Seat(actor, actor.ready.remote())

    def _started(self, seat: _Seat, outcome: int | Lost) -> None:
        if isinstance(outcome, Lost):
            self._failures += 1
            if self._failures == ATTEMPTS:
                raise InputError(
                    f"{ATTEMPTS} models in turn ended while they were loaded, the last by {outcome.reason}; give actors more memory"
                )
            self._replace(seat, outcome, "a model ended while it was loaded")
            return
        self.row_multiple = self.row_multiple or outcome
        if outcome != self.row_multiple:
            raise InputError(
                f"one model has batches of {self.row_multiple} rows, another of {outcome}: the nodes differ in their devices, and the "
                f"embeddings would; name the resources that an actor needs, as --actor-resources TPU=4"
            )
        seat.starting, seat.rows = None, outcome
        self._failures = 0

    def _embedded(self, seat: _Seat, group: Group, outcome: Part | Lost) -> None:
        if not isinstance(outcome, Lost):
            self._done[group.number] = group, outcome
            return
        if outcome.actor and seat in self._seats:
            self._replace(seat, outcome, "a model was lost")
        if not outcome.actor:  # then it was the features
            for clip in group.clips:
                self._decode(clip)
        self._again(group, outcome)

    def _replace(self, seat: _Seat, lost: Lost, what: str) -> None:
        """Puts a new actor in the place of one that is lost; it starts as soon as a node has the resources."""
        self._seats[self._seats.index(seat)] = self._hire()
        self._ray.kill(seat.actor)
        clips = sum(len(group.clips) for group in seat.jobs.values())
        self.report.note(f"{what} ({lost.reason}); another takes its place" + (f", {clips} more clips are embedded again" if clips else ""))
        for group in seat.jobs.values():
            self._again(group, lost)
        seat.jobs.clear()

    def _again(self, group: Group, lost: Lost) -> None:
        group.attempts += 1
        if group.attempts == ATTEMPTS:
            first = group.clips[0].record.id
            raise InputError(
                f"the group of record {first!r} was lost {ATTEMPTS} times, the last time by {lost.reason}; see to the nodes, run again"
            )
        self._todo.append(group)
        self._todo = collections.deque(sorted(self._todo, key=lambda g: g.number))

    def _assign(self) -> None:
        while self._todo:
            free = [seat for seat in self._seats if seat.rows is not None and len(seat.jobs) < AT_ONCE]
            if not free:
                return
            seat, group = min(free, key=lambda s: len(s.jobs)), self._todo.popleft()
            seat.jobs[seat.actor.embed.remote(group.before, *(clip.features for clip in group.clips))] = group

    def _check_any(self) -> None:
        now = time.monotonic()
        if self.ready:
            self._last = self._noted = now
            return
        needs = ", ".join(f"{name} {count:g}" for name, count in self._asked.items())
        has = {name: count for name, count in self._ray.cluster_resources().items() if name in ("CPU", "GPU", "TPU")}
        if now - self._last > NONE_S:
            raise InputError(
                f"no model could be loaded in {NONE_S / 60:.0f} minutes; an actor needs {needs or 'a node'}, the cluster has {has}"
            )
        if now - self._noted > _NOTE_S:
            self._noted = now
            self.report.note(f"no model yet: an actor needs {needs or 'a node'}, the cluster has {has}")
