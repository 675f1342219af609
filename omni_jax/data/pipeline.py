"""Batches of a training run: any step can be made from the seed and its number alone, by any process, in any worker.

Letters: M micro-batches, B clips of a micro-batch over all processes, b of one process.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import functools
import itertools
import logging
import multiprocessing.process
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from omni_jax.config import ModelConfig, Preset
from omni_jax.config.batches import AugmentConfig
from omni_jax.data.augment import augment_clip
from omni_jax.data.loading import training_features
from omni_jax.data.negatives import MinedNegatives
from omni_jax.data.order import stand_ins
from omni_jax.data.plan import BatchConfig, Planner, UpdatePlan
from omni_jax.data.sources import ClipSource
from omni_jax.media.workers import ONE_THREAD
from omni_jax.tokens.prompts import build_sequence
from omni_jax.tokens.tokenizer import Tokenizer
from omni_jax.tokens.training import PromptLengths, clip_media
from omni_jax.towers import media_tokens, towers_of
from omni_jax.types import AudioSegment, BatchShapes, Clip, ClipError, Example, Features, InputError, MicroBatch, StepKind, TokenSequence

_log = logging.getLogger(__name__)

CANDIDATES = 256  # clips looked at to replace one that cannot be read
ATTEMPTS = 16  # of them read, at most
RESTARTS = 3  # workers that may die in a row before the run gives up
NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.ENOMEM)
AHEAD = 2  # steps made ahead in a thread where there are no workers, and whose clips are read ahead by each worker


Pack = Callable[[Sequence[MicroBatch], Sequence[BatchShapes]], Any]
"""Micro-batches of this process to one batch, as `omni_jax.train.pack_update` with its config given."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=("batch", "counts"), meta_fields=("update", "ids", "errors"))
@dataclasses.dataclass(frozen=True)
class PipelineBatch:
    """One step's data of this process.

    Attributes:
      update: its number, from 0.
      batch: what `pack` returned.
      ids: M of b record ids.
      errors: (id, reason) of each clip that could not be used and was replaced by another.
      counts: numbers by name:
        silent: clips whose sound is silence because they have no audio track.
        repaired: clips of which something else was repaired while decoding.
        truncated: captions cut to the preset's length.
        mined: hard negatives that are mined.
        equal_hard: hard negatives that equal their anchor: the clip they take sound or picture from has the same (one file, or no sound).
        used_tokens, total_tokens: tower and decoder tokens that are not padding, and all.
    """

    update: int
    batch: Any
    ids: tuple[tuple[str, ...], ...]
    errors: tuple[tuple[str, str], ...]
    counts: dict[str, int]


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """A clip of the source that could be read, with its features and those of its augmented copy."""

    clip: int
    features: Features
    augmented: Features | None


class TrainPipeline:
    """Training batches of one process, in order.

    The order of clips, their augmented copies and their hard negatives depend on the seed and the step's number alone: they are
    the same for any number of processes, of which each makes its contiguous slice of every micro-batch, and of workers. An epoch is a
    shuffle by (seed, epoch); the clips that fill no whole step at its end are left out of it.

    Attributes:
      planner: what every step holds before anything is read; `planner.updates_per_epoch`.
    """

    def __init__(
        self,
        source: ClipSource,
        *,
        tokenizer: Tokenizer,
        config: ModelConfig,
        preset: Preset,
        batch: BatchConfig,
        kinds: Callable[[int], tuple[StepKind, ...]],
        pack: Pack,
        workers: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        augment: AugmentConfig | None = None,
        kept: dict[int, tuple[Clip, Features]] | None = None,
        negatives: MinedNegatives | None = None,
    ) -> None:
        """Takes the clips and all that a batch depends on; nothing is read yet.

        Args:
          batch: sizes, seed and rules of the batches.
          kinds: update -> the step kind of each of its micro-batches.
          workers: processes that make batches, a step each; 0 makes them in a thread.
          process_index, process_count: of this process among those that share every micro-batch.
          augment: which changes the augmented copies have; default all.
          kept: clip of the source -> what was read of it, with its features: filled before the first batch and used, for sets that fit in
            memory; None keeps nothing.
          negatives: mined hard negatives; default none, all come from the other clips of a step.

        Raises:
          InputError: where the clips, the processes or the captions do not allow such batches.
        """
        if workers < 0:
            raise InputError(f"workers {workers}: must be 0 (a thread) or more")
        if batch.blocks % process_count:
            raise InputError(
                f"{batch.blocks} blocks of a micro-batch do not divide over {process_count} processes; make batch.blocks a multiple of them"
            )
        self._augment = augment or AugmentConfig()
        self.planner = Planner(source, batch, kinds, tokenizer, config, preset, self._augment, negatives)
        self._source, self._tokenizer, self._config, self._preset, self._pack = source, tokenizer, config, preset, pack
        self._workers, self._stop, self._kept = workers, 0, kept
        self._prompts: dict[tuple[Any, ...], TokenSequence] = {}
        size = batch.micro_batch // process_count
        self._slice = slice(process_index * size, (process_index + 1) * size)
        self._local_blocks = slice(process_index * batch.blocks // process_count, (process_index + 1) * batch.blocks // process_count)

    def batches(self, start: int, stop: int) -> Generator[PipelineBatch]:
        """Yields the batches of steps start, start + 1, ..., stop - 1.

        A worker that dies is replaced and its step made again.

        Raises:
          InputError: when workers die again and again or have no memory to hand a batch over, or nearly no clip can be read.
        """
        for clip in range(len(self._source)) if self._kept is not None else ():
            with contextlib.suppress(ClipError):  # it is replaced where it is met
                self._known(clip)
        restarts, self._stop = 0, stop
        update = start
        while update < stop:
            iterator = self._iterator(update, stop)
            try:
                while update < stop:
                    made = next(iterator)
                    restarts = 0
                    if self._workers:
                        made = jax.tree.map(lambda x: _own(x) if isinstance(x, np.ndarray) else x, made)
                    yield made
                    update += 1
            except RuntimeError as error:
                if "terminated unexpectedly" not in str(error):
                    raise
                restarts += 1
                if restarts > RESTARTS:
                    # Workers import the script that started them, and it must not start them again.
                    script = "; a script calls omni_jax.train below if __name__ == '__main__':" if update == start else ""
                    raise InputError(
                        f"data workers died {restarts} times in a row at step {update + 1}; they need more memory than there is, or more "
                        f"space in /dev/shm: lower data.workers or the batch{script}"
                    ) from None
                _log.warning("a data worker died; step %d is made again", update + 1)
            except OSError as error:
                if not self._workers or error.errno not in NO_ROOM:
                    raise
                # Workers write nothing else: this is the memory in which one hands a batch over.
                raise InputError(
                    f"a data worker cannot hand over step {update + 1} in shared memory (/dev/shm): {error.strerror or error}; give it "
                    f"more space, or lower data.workers or the batch (data.workers=0 needs none)"
                ) from error
            finally:
                iterator.close()

    def _iterator(self, start: int, stop: int) -> Any:
        made = grain.MapDataset.range(start, stop).map(self.make)
        if not self._workers:
            return iter(made.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)))
        ahead = made.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        if not flags.FLAGS.is_parsed():  # grain reads its own in the parent of its workers
            flags.FLAGS.mark_as_parsed()
        for name, value in ONE_THREAD.items():  # read when a library is loaded: by the workers, as this process has loaded its own
            os.environ.setdefault(name, value)
        workers = min(self._workers, stop - start)
        return iter(ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_begin_worker))

    def make(self, update: int) -> PipelineBatch:
        """Returns the batch of one step, made in this thread."""
        self._read_ahead(update)
        plan = self.planner.plan(update)
        parts, ids, errors = [], [], []
        counts: collections.Counter[str] = collections.Counter()
        for micro, kind in enumerate(plan.kinds):
            loaded = [self._load(plan, micro, place, errors) for place in range(*self._slice.indices(plan.clips.shape[1]))]
            shuffle = plan.shuffles[micro][self._local_blocks]
            # Blocks lie within a process: a clip of this slice takes features of another one of it.
            taken = plan.taken(micro)[self._slice] - self._slice.start
            others = [self._other(plan, micro, n, got, loaded[taken[n]], errors) for n, got in enumerate(loaded)]
            examples = [self._example(plan, micro, n, *pair) for n, pair in enumerate(zip(loaded, others, strict=True))]
            parts.append(MicroBatch(tuple(examples), kind, shuffle))
            ids.append(tuple(self._source.ids[got.clip] for got in loaded))
            planned = plan.mined[micro, self._slice]
            pairs = zip(planned.tolist(), others, strict=True)
            counts["mined"] += sum(n >= 0 and (not kind.hard_media or n == other.clip) for n, other in pairs)
            for got, other, example in zip(loaded, others, examples, strict=True):
                quiet = self._silent(got)
                counts["silent"] += quiet
                counts["repaired"] += bool(got.features.warnings) and not quiet
                counts["truncated"] += any(p.truncated for p in example.prompts.values())
                counts["equal_hard"] += self._equal(kind, got, other)
                used, total = _tokens(example, kind, plan.shapes[micro], self._config)
                counts.update(used_tokens=used, total_tokens=total)
        return PipelineBatch(update, self._pack(parts, plan.shapes), tuple(ids), tuple(errors), dict(counts))

    def _read_ahead(self, update: int) -> None:
        """Has a source that reads from afar begin with the clips of a step, and of the next ones that this worker makes."""
        if (ahead := getattr(self._source, "ahead", None)) is not None:
            step = max(1, self._workers)
            coming = [n for n in range(update, update + (AHEAD + 1) * step, step) if n == update or n < self._stop]
            ahead(np.concatenate([self.planner.clips(n)[:, self._slice].ravel() for n in coming]).tolist())

    def _silent(self, got: _Loaded) -> bool:
        return self._source.record(got.clip).silent or got.features.silent

    def _equal(self, kind: StepKind, got: _Loaded, taken: _Loaded) -> bool:
        """Whether a hard negative takes what its clip has already."""
        if not kind.shuffles:
            return False
        one, other = self.planner.alike(kind.hard, np.array([got.clip, taken.clip]))
        return bool(one == other or (kind.hard == "audio" and self._silent(got) and self._silent(taken)))

    def _other(self, plan: UpdatePlan, micro: int, place: int, got: _Loaded, shuffled: _Loaded, errors: list[tuple[str, str]]) -> _Loaded:
        """Returns the clip whose sound or picture a hard negative takes: the mined one, where there is one and it can be used."""
        kind, mined = plan.kinds[micro], int(plan.mined[micro, self._slice.start + place])
        # A clip that stands in for another one may be the mined one, or equal to it.
        if not kind.hard_media or mined < 0 or not self.planner.alike(kind.hard, np.array([got.clip, mined])).any():
            return shuffled
        try:
            return _Loaded(mined, self._fitting(self._source.load(mined)), None)
        except ClipError as error:
            errors.append((self._source.ids[mined], str(error)))
            return shuffled

    def _load(self, plan: UpdatePlan, micro: int, place: int, errors: list[tuple[str, str]]) -> _Loaded:
        """Returns the clip of a place, or another clip of the source where it cannot be used; the first is then added to `errors`.

        The other is drawn by (seed, step, place): every process count and every repetition gets the same one. It is none that the
        step holds already, has no more tokens than fit in its place, and is of a group that the step lacks if there is such.
        Places draw from clips of their own first, so that no clip stands in twice while those are enough.
        """
        planned = int(plan.clips[micro, place])
        try:
            return self._read(plan, micro, planned)
        except ClipError as error:
            errors.append((self._source.ids[planned], str(error)))
            first = str(error)
        held = plan.clips.ravel()
        number = micro * plan.clips.shape[1] + place
        drawn = stand_ins(self.planner.batch.seed, plan.update, number, held, len(self._source), CANDIDATES)
        groups = self.planner.groups(np.concatenate([drawn, held[held != planned]]))
        twice = np.isin(groups[: len(drawn)], groups[len(drawn) :])
        most = self.planner.lengths(plan, micro, place, planned)
        order = drawn[np.argsort(twice, kind="stable")].tolist()
        fitting = (n for n in order if self._fits(self.planner.lengths(plan, micro, place, n), most, plan, micro))
        for other in itertools.islice(fitting, ATTEMPTS):
            try:
                return self._read(plan, micro, other)
            except ClipError as error:
                errors.append((str(self._source.ids[other]), str(error)))
        raise InputError(f"a clip cannot be used and no other can replace it; check the data: {first}")

    def _fits(self, lengths: PromptLengths, most: PromptLengths, plan: UpdatePlan, micro: int) -> bool:
        kind, shapes, share = plan.kinds[micro], plan.shapes[micro], self._config.shares_prefix
        media = lengths.video <= most.video and lengths.audio <= most.audio
        rows = lengths.row(kind, share) <= shapes.row_tokens and lengths.hard_row(kind, share) <= shapes.hard_tokens
        return media and rows and lengths.reach(kind, share) <= kind.reach

    def _read(self, plan: UpdatePlan, micro: int, clip: int) -> _Loaded:
        read, features = self._known(clip)
        augmented = None
        if plan.kinds[micro].positive:
            copy = augment_clip(read, self.planner.streams(plan.update, clip)[1], self._augment)
            augmented = self._fitting(copy, None if self._augment.audio else features.audio)
        return _Loaded(clip, features, augmented)

    def _known(self, clip: int) -> tuple[Clip, Features]:
        """Returns a clip of the source with its features, which are computed once where they are kept."""
        known = None if self._kept is None else self._kept.get(clip)
        if known is None:
            read = self._source.load(clip)
            known = read, self._fitting(read)
            if self._kept is not None:
                self._kept[clip] = known
        return known

    def _fitting(self, clip: Clip, audio: tuple[AudioSegment, ...] | None = None) -> Features:
        """Returns features, those of the sound where they are known. Raises ClipError where they exceed what the source says its largest
        clip has."""
        features = training_features(clip, self._preset, audio)
        limits = self._source.limits
        assert features.vision is not None
        assert clip.waveform is not None
        t, h, w = features.vision.grid.thw
        if t > limits.steps or h * w > limits.patches or clip.waveform.size > limits.samples:
            raise ClipError(
                f"{clip.record.video}: {t} steps of {h}x{w} patches do not fit the {limits.steps} of {limits.patches} that streaming "
                f"allows; prepare shards with 'omni-jax prepare', or crop it"
            )
        return features

    def _example(self, plan: UpdatePlan, micro: int, place: int, got: _Loaded, taken: _Loaded) -> Example:
        kind = plan.kinds[micro]
        caption = self._source.captions[got.clip]
        prompts = {name: self._prompt(name, caption, got.features, got.features) for name in (*kind.singles, *kind.duals)}
        if kind.anchor:
            prompts["anchor"] = self._prompt("tva", caption, got.features, got.features)
        if kind.positive:
            prompts["positive"] = self._prompt("tva", self.planner.positive_caption(plan.update, got.clip), got.features, got.features)
        if kind.hard is not None:
            seen, heard = (taken if kind.hard == name else got for name in ("video", "audio"))
            text = self._hard_caption(plan, micro, self._slice.start + place, caption) if kind.hard == "text" else caption
            prompts["hard"] = self._prompt("tva", text, seen.features, heard.features)
        media = clip_media(got.features, self._config)
        copy = clip_media(got.augmented, self._config) if got.augmented else None
        return Example(media, copy, prompts, clip_media(taken.features, self._config) if kind.hard_media else None)

    def _hard_caption(self, plan: UpdatePlan, micro: int, place: int, caption: str) -> str:
        """Returns the planned caption; where a clip that stands in for another has that very one, the caption of the clip it replaced."""
        planned = self._source.captions[int(plan.texts[micro, place])]
        return planned if planned != caption else self._source.captions[int(plan.clips[micro, place])]

    def _prompt(self, table: str, caption: str, seen: Features, heard: Features) -> TokenSequence:
        assert seen.vision is not None
        media = seen.vision.grid, heard.audio_tokens
        key = table, caption, *media
        if key in self._prompts:
            return self._prompts[key]
        made = build_sequence(self._tokenizer, self._config, self._preset, table, caption, *media)
        if self._kept is not None:
            self._prompts[key] = made
        return made


def _tokens(example: Example, kind: StepKind, shapes: BatchShapes, config: ModelConfig) -> tuple[int, int]:
    """Returns one example's tokens of towers and rows that are not padding, and all of them."""
    copies = [m for m in (example.media, example.augmented) if m is not None]
    used = sum(int(np.sum(tower.valid(getattr(m, tower.name)))) for m in copies for tower in towers_of(config))
    used += sum(len(example.prompts[name].ids) for name in kind.prompts)
    whole = len(copies) * media_tokens(shapes, config) + len(kind.rows) * shapes.row_tokens
    if kind.hard is not None:
        hard, branch = example.prompts["hard"], kind.branches(config.shares_prefix)
        used += len(hard.ids) - (hard.prefix if branch else 0)
        whole += 0 if branch else shapes.hard_tokens
    return used, whole


def _own(array: Any) -> np.ndarray:
    """Returns a copy of an array that a worker may have handed over in shared memory, whose name is then given back.

    Grain would give it back in a thread when the array ends; the end of a process waits for neither, and complains of a leak.
    """
    copy, memory = np.array(array), getattr(array, "shm", None)
    if memory is not None:
        array._unlink_on_del = False
        memory.unlink()
    return copy


def _begin_worker(index: int, count: int) -> None:
    """Keeps a worker from taking a device, since it makes arrays for the process that does, and lets it end with that process, not by the
    Ctrl-C that a terminal sends to both."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_after, args=(parent,), name="parent", daemon=True).start()


def _end_after(parent: multiprocessing.process.BaseProcess) -> None:
    """Ends this process when its parent has: one that was killed does not notify its workers, and they would wait forever."""
    parent.join()
    os._exit(1)
