"""The 12 directions of held-out clips in the midst of a training run, with the weights as they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from omni_jax.api.retriever import OmniRetriever
from omni_jax.api.shared import Shared
from omni_jax.config import ModelConfig
from omni_jax.data.formats.table import is_source
from omni_jax.data.loading import load_features, training_features
from omni_jax.data.manifest import Problem, read_manifest
from omni_jax.data.sources import open_source
from omni_jax.io import atomic_write_text
from omni_jax.retrieval import evaluate
from omni_jax.retrieval.directions import AVERAGES
from omni_jax.retrieval.embedding_pass import assemble
from omni_jax.retrieval.rows import truncated
from omni_jax.tokens.tokenizer import Tokenizer
from omni_jax.train import RunConfig
from omni_jax.train.trainable import Arrays, join
from omni_jax.types import ClipError, Features, InputError, Record

FOLDER = "evaluations"
TABLES = ("text", "video", "audio", "av", "tv", "at")


class Evaluator:
    """Embeds and scores the manifest or prepared folder that a run's config names; programs are compiled at the first call and kept.

    Attributes:
      problems: lines of the manifest that cannot be used, and records that lack text, video or sound.
      records: those that are embedded; some turn out to be silent when they are decoded, and are skipped.
    """

    def __init__(
        self,
        run: RunConfig,
        workdir: epath.Path,
        tokenizer: Tokenizer,
        model: ModelConfig,
        frozen: Arrays,
        mesh: Mesh | None,
        log: Callable[[str], None],
        stopping: Callable[[], bool],
        programs: Shared | None = None,
    ):
        """Reads the manifest, or the index of the folder; `programs` has those that an earlier run compiled.

        Raises:
          InputError: when it cannot be read, was prepared under another preset, or has no record with text, video and audio.
        """
        self._settings, self._workdir, self._log, self._stopping = run.evaluation, workdir, log, stopping
        self._preset, clips = run.data.resolved_preset(), Path(self._settings.manifest)
        self._source = open_source(clips, self._preset) if clips.is_dir() and not is_source(clips) else None
        problems: Sequence[Problem] = ()
        if self._source is None:
            manifest = read_manifest(clips, self._settings.media_root or None)
            records, problems = manifest.records, manifest.problems
            for note in manifest.notes:
                log(f"{clips}: {note}")
        else:
            # Silence would be found by nothing: a clip without sound is one without audio. Each clip has a name of its own, since
            # records of the same files are one prompt.
            infos = (self._source.record(n) for n in range(len(self._source)))
            records = [Record(at.id, at.caption, video=clips / at.id, audio=None if at.silent else clips / at.id) for at in infos]
        self.records = [record for record in records if record.modalities == {"t", "v", "a"}]
        self.problems: Sequence[Problem] = (*problems, *(_lacking(record) for record in records if record.modalities != {"t", "v", "a"}))
        if not self.records:
            first = f"; the first: {self.problems[0].reason}" if self.problems else ""
            raise InputError(f"{self._settings.manifest}: no record has text, video and audio, which the 12 directions need{first}")
        self._frozen, self._model, self._dtype, self._mesh = frozen, model, jnp.dtype(run.model.dtype), mesh
        self._workers, self._tokenizer, self._timeout = run.data.workers, tokenizer, run.data.timeout
        self._retriever: OmniRetriever | None = None
        self._programs = programs or Shared()

    def __call__(self, number: int, trainable: Arrays) -> Mapping[str, float] | None:
        """Returns averages and R@1 by name, and writes the whole result to evaluations/N.json; None when the run is to stop meanwhile."""
        # As a checkpoint of this step would be loaded: in the type of the weights that stay.
        params = join({name: x.astype(self._dtype) for name, x in trainable.items()}, self._frozen)
        if self._retriever is None:
            self._retriever = self._programs.retriever(self._model, params, self._tokenizer, self._preset, self._dtype, self._mesh)
        else:
            self._retriever.assign(params)
        parts = []
        load = self._decoded if self._source is None else self._prepared
        for part in self._retriever.embed(self.records, TABLES, batch_size=self._settings.batch_size, load=load):
            parts.append(part)
            if jax.process_count() == 1 and self._stopping():
                return None
        outcome = assemble(self.records, parts)
        if outcome.problems:
            _, reason = outcome.problems[0]
            self._log(f"evaluation: {len(outcome.problems)} of {len(self.records)} records were skipped; the first: {reason}")
        try:
            result = evaluate(outcome.table, resamples=0)
            if dims := self._settings.truncate_dims:
                cut = {dim: evaluate(truncated(outcome.table, dim), resamples=0) for dim in dims}
                result["truncated"] = {str(dim): {name: found[name] for name in AVERAGES} for dim, found in cut.items()}
        except InputError as e:
            self._log(f"evaluation after step {number} gave nothing: {e}")
            return {}
        if jax.process_index() == 0:
            (self._workdir / FOLDER).mkdir(exist_ok=True)
            atomic_write_text(self._workdir / FOLDER / f"{number}.json", json.dumps(result, indent=1) + "\n")
        averages = {name: result[name] for name in AVERAGES if result[name] is not None}
        tied = max((metrics["ties"] for metrics in result["directions"].values()), default=0)
        note = f"; up to {tied} of {result['n']} queries of a direction are decided by a tie, which counts as a hit" if tied else ""
        self._log(f"held-out R@1 after step {number}: " + ", ".join(f"{name} {value:.1f}" for name, value in averages.items()) + note)
        return averages | {name: metrics["R@1"] for name, metrics in result["directions"].items()}

    def _decoded(self, records: Sequence[Record]) -> Iterator[Features | ClipError]:
        """Yields the features of clips of the manifest; one without sound is skipped, as in a prepared folder."""
        found = load_features(records, self._preset, "tva", workers=self._workers, timeout_s=self._timeout)
        for record, features in zip(records, found, strict=True):
            if isinstance(features, Features) and features.silent:
                yield ClipError(f"{record.audio}: has no sound that can be read, which the 12 directions need")
            else:
                yield features

    def _prepared(self, records: Sequence[Record]) -> Iterator[Features | ClipError]:
        """Yields the features of clips of the prepared folder."""
        assert self._source is not None
        places = {name: n for n, name in enumerate(self._source.ids)}
        for record in records:
            try:
                yield training_features(self._source.load(places[record.id]), self._preset)
            except ClipError as error:
                yield error


def _lacking(record: Record) -> Problem:
    names = {"t": "text", "v": "video", "a": "audio"}
    lacking = [names[m] for m in "tva" if m not in record.modalities]
    return Problem(record.id, record.line, "", f"record {record.id!r}: has no {' and no '.join(lacking)}, which the 12 directions need")
