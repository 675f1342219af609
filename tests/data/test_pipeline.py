"""Training batches: the same for every number of processes and workers, rebuilt from their number, and what they refuse."""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
import pytest

from omni_jax.config import ConfigError, ModelConfig
from omni_jax.config.batches import AugmentConfig
from omni_jax.data.clips import ClipInfo
from omni_jax.data.pipeline import PipelineBatch
from omni_jax.data.plan import BatchConfig, row_sizes
from omni_jax.media.workers import ONE_THREAD
from omni_jax.train import LossConfig, fit_shapes, kinds_of_update
from omni_jax.types import BatchShapes, InputError, MicroBatch
from tests.data.training_clips import CONFIG, MemorySource, captions, pipeline, tokenizer
from tests.full_disk import files_of_at_most
from tests.repository import ROOT

ALL = LossConfig(pairs="all", negatives="global")
RELEASED = LossConfig()
SIZES = ("row_tokens", "hard_tokens")
BATCH = BatchConfig(micro_batch=4, micro_batches=2, blocks=2, seed=3)


def _same(one: PipelineBatch, other: PipelineBatch) -> None:
    assert (one.update, one.ids, one.errors, one.counts) == (other.update, other.ids, other.errors, other.counts)
    assert jax.tree.structure(one.batch) == jax.tree.structure(other.batch)
    for a, b in zip(jax.tree.leaves(one.batch), jax.tree.leaves(other.batch), strict=True):
        np.testing.assert_array_equal(a, b)


def _kept(micro_batches: Sequence[MicroBatch], shapes: Sequence[BatchShapes]) -> Any:
    """Packs nothing: tests look at the examples themselves."""
    return micro_batches, shapes


@pytest.mark.jit
@pytest.mark.parametrize("losses", [ALL, RELEASED], ids=["global", "micro"])
def test_any_update_made_alone_equals_the_one_of_the_stream(losses: LossConfig):
    source = MemorySource(captions(20))
    stream = list(pipeline(source, BATCH, losses).batches(0, 5))
    assert [made.update for made in stream] == list(range(5))
    for made in stream[::-1]:
        _same(pipeline(source, BATCH, losses).make(made.update), made)
    for one, other in zip(stream[3:], pipeline(source, BATCH, losses).batches(3, 5), strict=True):
        _same(one, other)


@pytest.mark.jit
@pytest.mark.parametrize("losses", [ALL, RELEASED], ids=["global", "micro"])
def test_slices_of_two_processes_join_to_the_batches_of_one(losses: LossConfig):
    source = MemorySource(captions(20), broken=[2, 9])
    for update in range(3):
        whole = pipeline(source, BATCH, losses).make(update)
        parts = [pipeline(source, BATCH, losses, process_index=i, process_count=2).make(update) for i in range(2)]
        assert whole.ids == tuple(a + b for a, b in zip(parts[0].ids, parts[1].ids, strict=True))
        assert whole.counts == {name: sum(p.counts[name] for p in parts) for name in whole.counts}
        assert sorted(whole.errors) == sorted(e for p in parts for e in p.errors)
        for a, b, c in zip(*(jax.tree.leaves(p.batch) for p in (whole, *parts)), strict=True):
            np.testing.assert_array_equal(a, np.concatenate([b, c], axis=1))


def test_features_that_are_kept_give_the_same_batches_and_are_read_once():
    kept: dict[int, Any] = {}
    source, quiet = MemorySource(captions(20), broken={3}), AugmentConfig(audio=False)
    read = list(pipeline(source, BATCH, augment=quiet).batches(0, 4))
    for _ in range(2):  # the second finds what the first kept
        for one, other in zip(read, pipeline(source, BATCH, augment=quiet, kept=kept).batches(0, 4), strict=True):
            _same(one, other)
    assert sorted(kept) == [n for n in range(20) if n != 3]


def test_an_epoch_reads_every_clip_once_and_the_next_one_in_another_order():
    source = MemorySource(captions(16))
    made = pipeline(source, BATCH, ALL)
    assert made.planner.updates_per_epoch == 2
    read = [name for batch in made.batches(0, 4) for micro in batch.ids for name in micro]
    assert sorted(read[:16]) == sorted(read[16:]) == sorted(source.ids)
    assert read[:16] != read[16:]


def test_an_incomplete_last_update_is_left_out():
    source = MemorySource(captions(21))
    made = pipeline(source, BATCH, ALL)
    assert made.planner.updates_per_epoch == 2
    assert len({name for batch in made.batches(0, 2) for micro in batch.ids for name in micro}) == 16


@pytest.mark.costly
def test_no_update_holds_a_caption_or_a_prefix_twice():
    texts = [text for text in captions(30) for _ in range(2)]
    source = MemorySource(texts, [f"combination-{i // 2}-{i}" for i in range(60)])
    for rule in ("caption", "id_prefix"):
        made = pipeline(source, BatchConfig(8, 2, distinct=rule), ALL)
        for update in range(made.planner.updates_per_epoch):
            names = [name for micro in made.make(update).ids for name in micro]
            assert len({name.rpartition("-")[0] for name in names}) == 16
    loose = pipeline(source, BatchConfig(8, 2, distinct="none"), ALL)
    assert any(len({source.ids[i].rpartition("-")[0] for i in loose.planner.plan(u).clips.ravel()}) < 16 for u in range(3))


def test_hard_negatives_exchange_what_their_kind_says():
    source = MemorySource(captions(16))
    words = tokenizer()
    made = pipeline(source, BATCH, LossConfig(negatives="global"), pack=_kept, augment=AugmentConfig(False, False, False))
    text_of = {name: words.encode_text(text) for name, text in zip(source.ids, source.captions, strict=True)}
    for update, hard in enumerate(("text", "audio", "video")):
        batch = made.make(update)
        micro_batches, _ = batch.batch
        assert CONFIG.shares_prefix
        for micro, names in zip(micro_batches, batch.ids, strict=True):
            assert micro.kind.hard == hard
            assert micro.kind.branches(CONFIG.shares_prefix) == (hard == "text")
            taken = (micro.shuffle + np.arange(0, 4, 2)[:, None]).ravel()
            assert (taken != np.arange(4)).all()
            for b, example in enumerate(micro.examples):
                anchor, negative = example.prompts["anchor"], example.prompts["hard"]
                assert anchor.ids[anchor.prefix : -1].tolist() == text_of[names[b]]
                assert np.array_equal(example.prompts["positive"].ids, anchor.ids)
                text = negative.ids[negative.prefix : -1].tolist()
                if hard == "text":
                    assert text != text_of[names[b]]
                    assert text in text_of.values()
                else:
                    assert text == text_of[names[b]]
                    layout = micro.examples[taken[b]].prompts["anchor"] if hard == "video" else anchor
                    assert np.array_equal(negative.ids[: negative.prefix], layout.ids[: layout.prefix])


def test_the_augmented_copy_differs_between_updates_and_keeps_its_shapes():
    source = MemorySource(captions(8))
    made = pipeline(source, BatchConfig(8, 1, blocks=2), ALL, pack=_kept)
    copies = []
    for update in range(3):
        batch = made.make(update)
        place = batch.ids[0].index("clip-1")
        example = batch.batch[0][0].examples[place]
        copies.append(example.augmented)
        assert example.augmented.vision.patches.shape == example.media.vision.patches.shape
    assert not np.array_equal(copies[0].vision.patches, copies[1].vision.patches) or not np.array_equal(
        copies[0].audio.mel, copies[1].audio.mel
    )


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, beats=None)], ids=["with-beats", "without-beats"])
def test_counts_agree_with_the_packed_arrays(config: ModelConfig):
    source = MemorySource(captions(32))
    made = pipeline(source, BatchConfig(8, 2, blocks=2), ALL, config)
    for update in range(3):
        batch = made.make(update)
        rows = [batch.batch.rows, *([batch.batch.hard] if batch.batch.hard is not None else [])]
        clips = batch.batch.clips
        decoder = sum(int((r.segment > 0).sum()) for r in rows)
        vision = int((clips.vision.window >= 0).sum()) // 4
        audio = config.audio_repeat * int((((clips.audio.frames - 1) // 2 + 1) // 2).sum())
        assert batch.counts["used_tokens"] == decoder + vision + audio
        whole = sum(r.ids.size for r in rows) + clips.vision.window.size // 4 + config.audio_repeat * clips.audio.frames.size * 50
        assert batch.counts["total_tokens"] == whole
        assert batch.counts["silent"] == sum(int(name.split("-")[1]) % 5 == 0 for micro in batch.ids for name in micro)


@pytest.mark.jit
def test_shapes_are_few_and_no_row_is_longer_than_its_clips_ask():
    source = MemorySource(captions(64))
    made = pipeline(source, BatchConfig(8, 2, blocks=2, row_multiple=8), ALL, pack=_kept)
    found: dict[Any, set[int]] = {}
    for update in range(12):
        micro_batches, shapes = made.make(update).batch
        needs = [fit_shapes(m.examples, m.kind, CONFIG.shares_prefix) for m in micro_batches]
        (size,) = set(shapes)  # of equal kinds
        for name in SIZES:
            assert getattr(size, name) >= max(getattr(n, name) for n in needs)
            assert getattr(size, name) % 8 == 0
        assert (size.hard_tokens > 0) == any(n.hard_tokens for n in needs)
        assert (size.steps, size.patches, size.chunks) == (2, 8, 1)
        assert size.fbank_frames >= max(n.fbank_frames for n in needs)
        found.setdefault(micro_batches[0].kind, set()).add(size.row_tokens)
    assert all(len(sizes) <= 2 for sizes in found.values())


def test_a_second_row_length_must_save_a_tenth():
    assert row_sizes([41, 44, 47], 8) == [48]
    assert row_sizes([41, 42, 43, 200], 8) == [48, 200]


def test_planned_row_lengths_are_those_of_the_prompts():
    source = MemorySource(captions(32))
    joint = LossConfig({"joint": 1, "tuple": 1})
    for losses in (LossConfig(negatives="global"), RELEASED, LossConfig(pairs="all", hard_scope="global", negatives="global"), joint):
        made = pipeline(source, BatchConfig(4, 2, row_multiple=1), losses, pack=_kept)
        for update in range(3):
            plan = made.planner.plan(update)
            share, (micro_batches, _) = CONFIG.shares_prefix, made.make(update).batch
            needs = [fit_shapes(m.examples, m.kind, share) for m in micro_batches]
            longest = [max(len(e.prompts[name].ids) for e in m.examples for name in m.kind.prompts) for m in micro_batches]
            assert all(size <= m.kind.reach and m.kind.reach % 128 == 0 for size, m in zip(longest, micro_batches, strict=True))
            planned = [
                (lengths.row(kind, share), lengths.hard_row(kind, share))
                for m, kind in enumerate(plan.kinds)
                for b, clip in enumerate(plan.clips[m])
                for lengths in [made.planner.lengths(plan, m, b, int(clip))]
            ]
            assert tuple(map(max, zip(*planned, strict=True))) == tuple(max(getattr(n, name) for n in needs) for name in SIZES)


@pytest.mark.jit
@pytest.mark.parametrize("known", [True, False], ids=["shards", "streamed"])
def test_a_clip_that_cannot_be_read_is_replaced_the_same_way_every_time(known: bool):
    source = MemorySource(captions(20), broken=[1, 5, 6], known=known)
    first, again = (list(pipeline(source, BATCH, ALL).batches(0, 4)) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        _same(one, other)
        names = [name for micro in one.ids for name in micro]
        assert not {"clip-1", "clip-5", "clip-6"} & set(names)
        assert len(names) == len(set(names)) == 8
    failed = {name for made in first for name, _ in made.errors}
    assert failed == {"clip-1", "clip-5", "clip-6"}
    assert all("truncated" in reason for made in first for _, reason in made.errors)


def test_a_run_stops_when_nothing_can_be_read():
    source = MemorySource(captions(20), broken=range(20))
    with pytest.raises(InputError, match="no other can replace it; check the data"):
        pipeline(source, BATCH, ALL).make(0)


def test_an_error_in_the_stream_reaches_the_caller():
    with pytest.raises(InputError, match="no other can replace it"):
        list(pipeline(MemorySource(captions(20), broken=range(20)), BATCH, ALL).batches(0, 2))


def test_fewer_clips_than_an_update_takes_are_refused():
    with pytest.raises(InputError, match=r"7 clips are fewer than the 8 of a step; lower batch.micro_batch"):
        pipeline(MemorySource(captions(7)), BATCH)


def test_equal_captions_are_refused_where_text_is_exchanged():
    source = MemorySource(["a red disc"] * 16)
    with pytest.raises(InputError, match="all captions are equal"):
        pipeline(source, BATCH)
    assert pipeline(source, BATCH, LossConfig(hn_audio_only=True)).make(0).batch is not None


def test_blocks_of_one_clip_are_refused_where_features_are_exchanged():
    source = MemorySource(captions(8))
    with pytest.raises(InputError, match=r"blocks of one clip; raise batch.micro_batch"):
        pipeline(source, BatchConfig(1, 2))
    with pytest.raises(InputError, match="micro-batch of 4 in 4 blocks"):
        pipeline(source, BatchConfig(4, 1, blocks=4))
    assert pipeline(source, BatchConfig(1, 2), LossConfig({"distillation": 1, "pairwise": 1})).make(0).batch is not None


def test_processes_share_whole_blocks():
    with pytest.raises(InputError, match="1 blocks of a micro-batch do not divide over 2 processes"):
        pipeline(MemorySource(captions(8)), BatchConfig(4), process_count=2)


def test_fields_out_of_range_are_refused():
    for wrong, message in (
        ({"micro_batch": 0}, "at least 1"),
        ({"micro_batch": 4, "blocks": 3}, "blocks=3: must divide batch.micro_batch=4"),
        ({"micro_batch": 4, "distinct": "tune"}, "distinct='tune'"),
        ({"micro_batch": 4, "seed": -1}, "seed=-1"),
    ):
        with pytest.raises(ConfigError, match=message):
            BatchConfig(**wrong)
    with pytest.raises(InputError, match="workers -1"):
        pipeline(MemorySource(captions(8)), BatchConfig(4), workers=-1)


@pytest.mark.slow
def test_workers_change_nothing_and_one_that_is_killed_is_replaced(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    for name in ONE_THREAD:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    source = MemorySource(captions(20), broken=[4])
    # More than workers make ahead: the one that is killed must have work left.
    expected = list(pipeline(source, BATCH, ALL).batches(0, 24))
    stream = pipeline(source, BATCH, ALL, workers=2).batches(0, 24)
    made = [next(stream) for _ in range(3)]
    workers = [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
    assert len(workers) == 2
    assert all(ONE_THREAD.items() <= worker.environ().items() for worker in workers)
    workers[0].kill()
    made += list(stream)
    assert "a data worker died" in caplog.text
    for one, other in zip(made, expected, strict=True):
        _same(one, other)


@pytest.mark.slow
def test_workers_that_always_die_end_the_run_with_one_line():
    with pytest.raises(InputError, match=r"data workers died 4 times in a row at step 1; .*lower data.workers.*'__main__'"):
        list(pipeline(_Deadly(captions(20)), BATCH, ALL, workers=1).batches(0, 2))


def test_no_room_to_hand_a_batch_over_is_one_line():
    """A limit on the size of files stands for a full /dev/shm."""
    told = r"cannot hand over step 1 in shared memory \(/dev/shm\): File too large; .*data.workers=0"
    with files_of_at_most(1000), pytest.raises(InputError, match=told):  # semaphores need some bytes
        next(pipeline(MemorySource(captions(20)), BATCH, ALL, workers=1).batches(0, 2))


@pytest.mark.jit
def test_another_failure_of_a_worker_is_not_taken_for_that():
    with pytest.raises(OSError, match="no descriptor is left"):
        next(pipeline(_Exhausted(captions(20)), BATCH, ALL, workers=1).batches(0, 2))


class _Exhausted(MemorySource):
    def load(self, index: int) -> Any:
        raise OSError(errno.EMFILE, "no descriptor is left")


class _Deadly(MemorySource):
    """Takes its process down, as the kernel does when memory ends; not the one it was made in."""

    def load(self, index: int) -> Any:
        psutil.Process().kill()


def test_kinds_and_micro_batches_must_agree():
    kinds = functools.partial(kinds_of_update, micro_batches=1, losses=ALL)
    with pytest.raises(ValueError, match="1 step kinds for 2 micro-batches"):
        pipeline(MemorySource(captions(20)), BATCH, kinds=kinds)


_STREAM = """
import sys
import psutil
from omni_jax.data.plan import BatchConfig
from omni_jax.train import LossConfig
from tests.data.training_clips import MemorySource, captions, pipeline
if __name__ == "__main__":
    stream = pipeline(MemorySource(captions(20)), BatchConfig(4, seed=3), LossConfig(pairs="all"), workers=1).batches(0, 100)
    next(stream)
    print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
    sys.stdin.read()
"""


@pytest.mark.jit
def test_workers_end_when_their_process_is_killed(tmp_path: Path):
    script = tmp_path / "stream.py"
    script.write_text(_STREAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
        assert workers
    finally:
        process.kill()
        process.communicate()
    left = psutil.wait_procs(workers, timeout=60)[1]
    for worker in left:
        worker.kill()
    assert not left


_LEFT = """
import sys
from omni_jax.data.plan import BatchConfig
from omni_jax.train import LossConfig
from tests.data.training_clips import MemorySource, captions, pipeline
if __name__ == "__main__":
    stream = pipeline(MemorySource(captions(20)), BatchConfig(4, seed=3), LossConfig(pairs="all"), workers=1).batches(0, int(sys.argv[1]))
    print(*(next(stream).update for _ in range(3)))
    stream.close()
"""


@pytest.mark.jit
@pytest.mark.parametrize("made", [3, 100], ids=["all", "some"])
def test_a_process_that_has_read_all_or_some_leaves_no_shared_memory_and_says_nothing(tmp_path: Path, made: int):
    script = tmp_path / "left.py"
    script.write_text(_LEFT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run([sys.executable, str(script), str(made)], capture_output=True, text=True, env=environment, timeout=300)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "0 1 2\n", "")


@pytest.mark.costly
@pytest.mark.parametrize(("count", "broken"), [(120, 3), (24, 4)], ids=["many", "few"])
def test_no_clip_stands_in_twice_within_an_update_of_any_number_of_processes(count: int, broken: int):
    source = MemorySource(captions(count), broken=range(0, count, broken))
    whole = pipeline(source, BATCH, ALL)
    halves = [pipeline(source, BATCH, ALL, process_index=i, process_count=2) for i in range(2)]
    replaced = 0
    for update in range(6):
        batch = whole.make(update)
        names = [name for micro in batch.ids for name in micro]
        assert len(names) == len(set(names)) == 8
        replaced += len(batch.errors)
        parts = [half.make(update) for half in halves]
        assert [tuple(one + other) for one, other in zip(parts[0].ids, parts[1].ids, strict=True)] == list(batch.ids)
    assert replaced > 6


def test_silent_clips_take_sound_from_others_and_what_cannot_be_helped_is_counted():
    class Half(MemorySource):
        every = 2

        def record(self, index: int) -> ClipInfo:
            return dataclasses.replace(super().record(index), silent=index % self.every == 0)

    batch = BatchConfig(micro_batch=8, micro_batches=1, blocks=1)
    audio = LossConfig(hn_audio_only=True)
    for every, expected in ((2, 0), (1, 8)):
        source = Half(captions(64))
        source.every = every
        made = pipeline(source, batch, audio)
        equal = 0
        for update in range(6):
            plan = made.planner.plan(update)
            silent = np.array([source.record(int(clip)).silent for clip in plan.clips[0]])
            both = int((silent & silent[plan.taken(0)]).sum())
            assert both == max(0, 2 * int(silent.sum()) - 8)
            made_batch = made.make(update)
            assert made_batch.counts["equal_hard"] == both
            equal += both
        assert every == 2 or equal == 6 * expected
