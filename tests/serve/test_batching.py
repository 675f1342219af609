"""The queue before the encoder, with an encoder that counts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest

from omni_jax.serve.batching import Batcher, Busy
from omni_jax.types import ClipError, Features, Record


def item(name: str) -> Features:
    return Features(Record(name, text=name))


class Counting:
    """Gives each item its number as a vector; the first batch waits until `go`."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.go = threading.Event()

    def __call__(self, items: Sequence[Features]) -> list[Any]:
        assert self.go.wait(20)
        self.sizes.append(len(items))
        if len(items) > 1 and any(i.record.id == "poison" for i in items):
            raise RuntimeError("the whole batch failed")
        return [ClipError("bad") if i.record.id in ("bad", "poison") else np.full(2, float(i.record.id)) for i in items]


def during(batcher: Batcher, work: Callable[[], Awaitable[Any]]) -> Any:
    async def both() -> Any:
        running = asyncio.create_task(batcher.run())
        try:
            return await asyncio.wait_for(work(), 20)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    return asyncio.run(both())


def test_what_waits_while_a_batch_is_computed_makes_the_next_one() -> None:
    encode = Counting()
    batcher = Batcher(encode, size=8, most_waiting=100)

    async def work() -> list[Any]:
        first = asyncio.create_task(batcher.answers([item("0")]))
        while batcher.waiting or not batcher._arrived.is_set():  # until the encoder has taken it
            await asyncio.sleep(0.005)
            if first.done() or (not batcher.waiting and not encode.sizes):
                break
        others = [asyncio.create_task(batcher.answers([item(str(n))])) for n in range(1, 20)]
        await asyncio.sleep(0.01)
        encode.go.set()
        return await asyncio.gather(first, *others)

    found = during(batcher, work)
    assert [float(rows[0][0]) for rows in found] == list(range(20))
    assert sum(encode.sizes) == 20 and max(encode.sizes) == 8 and len(encode.sizes) <= 5
    assert (batcher.items, batcher.batches, batcher.waiting) == (20, len(encode.sizes), 0)


def test_items_of_one_kind_share_a_batch_and_none_waits_for_ever() -> None:
    encode = Counting()
    seen: list[set[int]] = []

    def kinds(items: Sequence[Features]) -> list[Any]:
        seen.append({int(item.record.id) % 3 for item in items})
        return encode(items)

    batcher = Batcher(kinds, size=4, most_waiting=100, kind=lambda item: int(item.record.id) % 3)

    async def work() -> list[Any]:
        encode.go.set()
        return await asyncio.gather(*(batcher.answers([item(str(n))]) for n in range(20)))

    assert [float(rows[0][0]) for rows in during(batcher, work)] == list(range(20))
    assert [len(kind) for kind in seen] == [1] * 6 and sorted(encode.sizes) == [2, 3, 3, 4, 4, 4]
    assert seen[:3] == [{0}, {1}, {2}]  # the next is of the kind that has waited longest


def test_large_items_take_more_slots_and_the_largest_goes_alone() -> None:
    encode = Counting()
    encode.go.set()
    batcher = Batcher(encode, size=4, most_waiting=100, slots=lambda item: int(item.record.id))

    async def work() -> list[Any]:
        return await asyncio.gather(*(batcher.answers([item(name)]) for name in "1239111"))

    assert [float(rows[0][0]) for rows in during(batcher, work)] == [1, 2, 3, 9, 1, 1, 1]
    assert encode.sizes == [3, 2, 1, 1]  # 1 2 1; 3 1; 9; 1


def test_one_item_takes_no_other_along() -> None:
    encode = Counting()
    encode.go.set()
    batcher = Batcher(encode, size=8, most_waiting=100)

    async def work() -> list[Any]:
        return await asyncio.gather(*(batcher.answers([item(name)]) for name in ("1", "bad", "2", "poison", "3")), return_exceptions=True)

    found = during(batcher, work)
    assert [isinstance(outcome, ClipError) for outcome in found] == [False, True, False, True, False]
    assert [float(found[place][0][0]) for place in (0, 2, 4)] == [1, 2, 3]


def test_too_many_are_refused_and_the_others_answered() -> None:
    encode = Counting()
    batcher = Batcher(encode, size=2, most_waiting=3)

    async def work() -> list[Any]:
        tasks = [asyncio.create_task(batcher.answers([item(str(n))])) for n in range(9)]
        await asyncio.sleep(0.02)
        encode.go.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = during(batcher, work)
    assert sum(isinstance(outcome, Busy) for outcome in found) == 6
    assert batcher.items == 3


def test_nothing_is_computed_for_a_request_that_was_cancelled() -> None:
    encode = Counting()
    batcher = Batcher(encode, size=8, most_waiting=100)

    async def work() -> None:
        left = asyncio.create_task(batcher.answers([item("1")]))
        await asyncio.sleep(0)
        left.cancel()
        encode.go.set()
        await batcher.answers([item("2")])
        with pytest.raises(asyncio.CancelledError):
            await left

    during(batcher, work)
    assert encode.sizes == [1]
