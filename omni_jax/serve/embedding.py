"""From what a request holds to embeddings: files decoded in processes that can be ended, all clients' items encoded together."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.api.encoding import own_table
from omni_jax.api.retriever import OmniRetriever
from omni_jax.config import TABLES
from omni_jax.data.items import Item, parse_items
from omni_jax.data.loading import item_features
from omni_jax.media.workers import Guarded
from omni_jax.serve.batching import Batcher, Busy
from omni_jax.types import ClipError, Features

MEDIA_SLOTS = 4
"""Slots that an item with media takes in a batch: a few have enough tokens to keep a device busy."""

USUAL = "a caption with about as many words as people type into a search field"


class Embedder:
    """A model that many clients use at once.

    Attributes:
      model: what embeds.
      batcher: the queue before it.
      most_waiting: items that may wait.
    """

    def __init__(self, model: OmniRetriever, *, batch_size: int, workers: int, timeout_s: float, most_waiting: int) -> None:
        """Starts no process; the first file does.

        Args:
          batch_size: items encoded together, at most.
          workers: decoding processes.
          timeout_s: seconds a file may take to decode.
          most_waiting: items that may wait, before the decoders and before the encoder; more are refused.
        """
        self.model = model
        self.batcher: Batcher[Features, np.ndarray] = Batcher(self._encode, batch_size, most_waiting, own_table, _slots)
        self._batch_size, self.most_waiting = batch_size, most_waiting
        self._decode = Guarded(functools.partial(item_features, preset=model.preset), timeout_s)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self._decoding = 0

    async def vectors(self, given: Sequence[Mapping[str, Any]], prompt: str | None = None) -> tuple[np.ndarray, list[Features]]:
        """Returns embeddings (N, D) of length 1, as `OmniRetriever.encode` gives them, and what they were made of.

        Args:
          given: fields of each item, as `data.items.parse_items` takes them.
          prompt: a prompt name, for the captions of a backbone with prompts.

        Raises:
          Busy: where too many items wait.
          ClipError: for the first item that cannot be embedded; it names no file of this machine.
        """
        if self._decoding + len(given) > self.most_waiting:
            raise Busy
        if all(fields.keys() == {"text"} for fields in given):  # captions do not wait behind files
            features = [self._features(item) for item in self._parsed(given, Path(), prompt)]
            return np.stack(await self.batcher.answers(features)), features
        loop = asyncio.get_running_loop()
        self._decoding += len(given)
        try:
            with tempfile.TemporaryDirectory(prefix="omni_jax_") as folder:
                found = await loop.run_in_executor(self._threads, self._parsed, given, Path(folder), prompt)
                features = await asyncio.gather(*(loop.run_in_executor(self._threads, self._features, item) for item in found))
        finally:
            self._decoding -= len(given)
        return np.stack(await self.batcher.answers(features)), features

    def warm_up(self) -> None:
        """Compiles what one caption and a batch of captions need, so that the first clients need not wait for it."""
        self.model.encode(USUAL)
        self.model.encode([f"{USUAL} {number}" for number in range(self._batch_size)], batch_size=self._batch_size)

    def close(self) -> None:
        """Ends the decoding processes and their threads."""
        self._decode.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _parsed(self, given: Sequence[Mapping[str, Any]], folder: Path, prompt: str | None) -> list[Item]:
        return list(parse_items(given, self.model.preset, lambda: folder, prompt))

    def _features(self, item: Item) -> Features:
        try:
            if item.error is not None or not item.reads:
                return item_features(item, self.model.preset)
            found: Features = self._decode(item, f"item {item.record.id}")
            if found.silent:
                raise ClipError("its audio has no sound that can be read")  # silence is no query
            return found
        except ClipError as error:
            number, line = item.record.id, item.renamed(str(error)).removeprefix(f"item {item.record.id}: ")
            raise ClipError(f"item {number}: {line}") from None

    def _encode(self, items: Sequence[Features]) -> list[np.ndarray | ClipError]:
        """A vector for each item, in the encoder's thread."""
        records = [dataclasses.replace(item.record, id=str(number)) for number, item in enumerate(items)]
        pairs = [(record, dataclasses.replace(item, record=record)) for record, item in zip(records, items, strict=True)]
        found: list[np.ndarray | ClipError] = [ClipError("the item was not embedded; send it again") for _ in items]
        for part in self.model.embed_features(iter(pairs), TABLES, own_table, batch_size=self._batch_size, normalize=True):
            for table, rows in part.rows.items():
                for number, row in zip(part.own.get(table, part.ids), rows, strict=True):
                    found[int(number)] = row
            for number, reason in part.problems:
                found[int(number)] = ClipError(reason)
        return found


def _slots(item: Features) -> int:
    return 1 if item.vision is None and item.audio is None else MEDIA_SLOTS
