"""Requests of many clients answered together: whatever waits while a batch is computed makes the next one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Busy(Exception):
    """More requests wait than may."""


class Batcher(Generic[Item, Answer]):
    """One queue before the encoder, or another function that does many things faster than one by one.

    Attributes:
      waiting: items that wait for their batch.
      batches, items: batches computed so far, and the items in them.
    """

    def __init__(
        self,
        function: Callable[[Sequence[Item]], Sequence[Answer | Exception]],
        size: int,
        most_waiting: int,
        kind: Callable[[Item], object] = lambda _: None,
        slots: Callable[[Item], int] = lambda _: 1,
        wait_s: float = 0.002,
    ) -> None:
        """Starts nothing; `run` does.

        Args:
          function: an answer for each item, or the reason why there is none. Called in one thread of its own, never twice at a time.
          size: items of a batch, at most; 1 computes each alone.
          most_waiting: items that may wait.
          kind: what the items of a batch have in common. Mixtures would have shapes of their own, each of which is compiled while all wait.
          slots: how many slots an item takes in a batch, so that a batch of large ones does not keep small ones waiting for long.
          wait_s: seconds that a first item waits for others where the thread is idle.
        """
        self._function, self._size, self._most_waiting = function, size, most_waiting
        self._kind, self._slots, self._wait_s = kind, slots, wait_s
        self._waiting: list[tuple[Item, asyncio.Future[Answer]]] = []
        self._arrived = asyncio.Event()
        self._thread: Executor = ThreadPoolExecutor(1, thread_name_prefix="batch")
        self.batches = self.items = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def answers(self, items: Sequence[Item]) -> list[Answer]:
        """Returns the answer to each item.

        Raises:
          Busy: where too many wait already.
          Exception: that of the first item which has no answer.
        """
        if len(self._waiting) + len(items) > self._most_waiting:
            raise Busy
        loop = asyncio.get_running_loop()
        places: list[asyncio.Future[Answer]] = [loop.create_future() for _ in items]
        self._waiting += zip(items, places, strict=True)
        self._arrived.set()
        try:
            return await asyncio.gather(*places)
        finally:
            for place in places:  # of a client that has left: nothing is computed for it
                place.cancel()

    async def run(self) -> None:
        """Computes batch after batch until it is cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._arrived.wait()
                if len(self._waiting) < self._size and self._wait_s:
                    await asyncio.sleep(self._wait_s)
                self._waiting = [pair for pair in self._waiting if not pair[1].done()]
                batch = self._next()
                if not self._waiting:
                    self._arrived.clear()
                if batch:
                    outcomes = await loop.run_in_executor(self._thread, self._outcomes, [item for item, _ in batch])
                    self.batches, self.items = self.batches + 1, self.items + len(batch)
                    _deliver([place for _, place in batch], outcomes)
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)
            for _, place in self._waiting:
                place.cancel()

    def _next(self) -> list[tuple[Item, asyncio.Future[Answer]]]:
        """Takes the item that has waited longest, and others of its kind."""
        batch: list[tuple[Item, asyncio.Future[Answer]]] = []
        rest: list[tuple[Item, asyncio.Future[Answer]]] = []
        taken = 0
        for pair in self._waiting:
            slots = self._slots(pair[0])
            fits = not batch or (taken + slots <= self._size and self._kind(pair[0]) == self._kind(batch[0][0]))
            (batch if fits else rest).append(pair)
            taken += slots * fits
        self._waiting = rest
        return batch

    def _outcomes(self, items: Sequence[Item]) -> Sequence[Any]:
        """Answers or exceptions: where a batch fails as a whole, its items are tried one by one, so that none takes the others along."""
        try:
            return self._function(items)
        except Exception as error:
            return [error] if len(items) == 1 else [outcome for item in items for outcome in self._outcomes([item])]


def _deliver(places: Sequence[asyncio.Future[Any]], outcomes: Sequence[Any]) -> None:
    for place, outcome in zip(places, outcomes, strict=True):
        with contextlib.suppress(asyncio.InvalidStateError):  # cancelled meanwhile
            if isinstance(outcome, BaseException):
                place.set_exception(outcome)
            else:
                place.set_result(outcome)
