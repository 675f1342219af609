"""Mined hard negatives in training batches: which list serves which exchange, what stands in where there is none, and what is refused."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from omni_jax.data.augment import AugmentConfig
from omni_jax.data.negatives import LISTS, MinedNegatives, read_negatives
from omni_jax.data.pipeline import PipelineBatch, TrainPipeline
from omni_jax.data.plan import BatchConfig
from omni_jax.tokens.training import clip_media
from omni_jax.train import LossConfig, kinds_of_update, pack_update
from omni_jax.types import BatchShapes, InputError, MicroBatch
from tests.data.training_clips import CONFIG, MemorySource, captions, pipeline, tokenizer

BATCH = BatchConfig(micro_batch=4, micro_batches=2, blocks=2, seed=3)
KINDS = ("text", "audio", "video")


def written(path: Path, lists: Sequence[dict[str, Any]], more: Sequence[str] = ()) -> Path:
    """Writes a mined manifest of clips `clip-0` ..., and records without lists."""
    rows = [{"id": f"clip-{i}", "text": "x", "negatives": found} for i, found in enumerate(lists)]
    rows += [{"id": name, "text": "y"} for name in more]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mined(source: MemorySource, path: Path, how: str = "mined") -> MinedNegatives:
    """Returns negatives of which clip i has clip i + 1 for text, i + 2 for audio, i + 3 for video, the last three clips none."""
    lists = [{name: [f"clip-{i + n}"] for n, name in enumerate(("av2t", "v2a", "t2v"), 1)} for i in range(len(source) - 3)]
    return read_negatives(written(path, [*lists, {}, {}, {}]), source, how)


def kept(micro_batches: Sequence[MicroBatch], shapes: Sequence[BatchShapes]) -> Any:
    return micro_batches


def made_with(source: MemorySource, negatives: MinedNegatives | None, **changes: Any) -> TrainPipeline:
    losses = LossConfig(negatives="global")

    def kinds(update: int) -> Any:
        return kinds_of_update(update, BATCH.micro_batches, losses, negatives is not None)

    changes = {"pack": kept, "augment": AugmentConfig(False, False, False), **changes}
    return pipeline(source, BATCH, losses, negatives=negatives, kinds=kinds, **changes)


def clips_of(batch: PipelineBatch) -> list[tuple[int, Any, MicroBatch, int]]:
    """(number of the clip, example, micro-batch, place) of each place of a step."""
    found = zip(batch.ids, batch.batch, strict=True)
    return [(int(name.removeprefix("clip-")), e, m, b) for ids, m in found for b, (name, e) in enumerate(zip(ids, m.examples, strict=True))]


def test_each_exchange_takes_the_list_that_the_rest_of_the_tuple_asks(tmp_path: Path) -> None:
    source = MemorySource([*captions(5), *captions(5)[:1]])  # the last has the caption of the first
    lists = [
        {"v2t": ["clip-1"], "av2t": ["clip-5", "clip-2", "clip-3"], "t2v": ["clip-4"], "tv2a": ["gone"]},
        {"a2t": ["clip-3"], "t2v": ["clip-0"], "a2v": ["clip-2"]},
        {"t2av": ["clip-0"]},
    ]
    found = read_negatives(written(tmp_path / "mined.jsonl", lists, more=["gone"]), source)
    of = {name: [found.clips[name][found.starts[name][i] : found.starts[name][i + 1]].tolist() for i in range(6)] for name in LISTS}
    assert of["text"][:3] == [[2, 3], [3], []] and of["video"][:3] == [[4], [2], []] and not any(of["audio"])
    assert found.unknown == 1 and found.without("text").tolist() == [2, 3, 4, 5]


def test_hard_negatives_are_the_mined_clips_and_the_shuffle_serves_the_others(tmp_path: Path) -> None:
    source = MemorySource(captions(16))
    words, count = tokenizer(), len(source)
    made = made_with(source, mined(source, tmp_path / "mined.jsonl"))
    plain = made_with(source, None)
    for update, hard in enumerate(KINDS):
        batch = made.make(update)
        assert batch.ids == plain.make(update).ids and batch.counts["mined"] == sum(n < count - 3 for n, *_ in clips_of(batch))
        for number, example, micro, place in clips_of(batch):
            taken = (micro.shuffle + np.arange(0, 4, 2)[:, None]).ravel()[place]
            negative = example.prompts["hard"]
            text = negative.ids[negative.prefix : -1].tolist()
            if hard == "text":
                assert example.hard_media is None
                assert number >= count - 3 or text == words.encode_text(source.captions[number + 1])
                continue
            assert text == words.encode_text(source.captions[number])
            expected = micro.examples[taken].media
            if number < count - 3:
                expected = clip_media(made._fitting(source.load(number + KINDS.index(hard) + 1)), CONFIG)
            assert jax.tree.all(jax.tree.map(np.array_equal, example.hard_media, expected))


def test_both_mines_about_half_and_any_update_can_be_made_again(tmp_path: Path) -> None:
    source = MemorySource(captions(64))
    negatives = mined(source, tmp_path / "mined.jsonl", "both")
    made, again = (made_with(source, negatives, pack=functools.partial(pack_update, config=CONFIG)) for _ in range(2))
    share = np.mean([made.planner.plan(update).mined >= 0 for update in range(24)])
    assert 0.35 < share < 0.6
    for batch in [made.make(update) for update in range(3)][::-1]:
        other = again.make(batch.update)
        assert (other.ids, other.counts) == (batch.ids, batch.counts)
        assert jax.tree.all(jax.tree.map(np.array_equal, other.batch, batch.batch))


def test_a_mined_clip_that_cannot_be_read_is_reported_and_the_shuffle_stands_in(tmp_path: Path) -> None:
    source = MemorySource(captions(20), broken=range(8, 12))
    made = made_with(source, mined(source, tmp_path / "mined.jsonl"))
    parts = [made_with(source, made.planner.negatives, process_index=i, process_count=2) for i in range(2)]
    seen = 0
    for update in range(6):
        batch, halves = made.make(update), [part.make(update) for part in parts]
        assert batch.ids == tuple(a + b for a, b in zip(halves[0].ids, halves[1].ids, strict=True))
        assert batch.counts["mined"] == sum(half.counts["mined"] for half in halves)
        if (hard := KINDS[update % 3]) == "text":
            continue
        named = {name for name, _ in batch.errors}
        for number, example, micro, place in clips_of(batch):
            wanted = number + KINDS.index(hard) + 1
            if f"clip-{wanted}" in named and number < 17:
                taken = (micro.shuffle + np.arange(0, 4, 2)[:, None]).ravel()[place]
                assert example.hard_media is not None
                seen += np.array_equal(example.hard_media.audio.mel, micro.examples[taken].media.audio.mel)
    assert seen > 3


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ([{"t2v": ["strange"]}], r"mined.jsonl:1: record 'clip-0': its negatives of t2v name 'strange', which is neither trained on nor"),
        ([{"t2v": "clip-1"}], r"mined.jsonl:1: record 'clip-0': field negatives must hold lists of ids by direction"),
        ([{}], r"mined.jsonl: lists no negatives of the clips that are trained on"),
    ],
)
def test_lists_that_cannot_be_used_are_one_line(tmp_path: Path, lists: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        read_negatives(written(tmp_path / "mined.jsonl", lists), MemorySource(captions(4)))
    assert "\n" not in str(error.value) and re.search("mine", str(error.value))
