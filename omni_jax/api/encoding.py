"""`encode` and what goes with it: anything a caller hands over to one array of embeddings, in its order."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.config import PREFIXES, TABLE_MODALITIES, TABLES, ModelConfig, Preset
from omni_jax.data.items import Item, is_single, parse_items
from omni_jax.data.loading import DECODE_LIMIT_S, item_features
from omni_jax.data.times import interval
from omni_jax.media.workers import run_guarded
from omni_jax.retrieval.embedding_pass import Part
from omni_jax.retrieval.rows import PRECISIONS, finished, similarity
from omni_jax.types import ArgumentError, ClipError, Features, Record

ON_ERROR = ("raise", "skip", "nan")
SHOWN = 5  # items named in one line


class ItemEncoder:
    """The methods of `OmniRetriever` that take items as a caller has them, over the one that embeds decoded clips."""

    config: ModelConfig
    preset: Preset
    report_programs: Callable[..., contextlib.AbstractContextManager[None]]
    embed_features: Callable[..., Generator[Part]]

    def encode(
        self,
        inputs: Any = None,
        *,
        texts: Any = None,
        videos: Any = None,
        audios: Any = None,
        images: Any = None,
        timestamps: Any = None,
        prompt_name: str | None = None,
        batch_size: int = 16,
        normalize: bool = True,
        truncate_dim: int | None = None,
        precision: str = "float32",
        show_progress: bool | None = None,
        on_error: str = "raise",
        workers: int | None = None,
        prefix: str | None = None,
    ) -> np.ndarray:
        """Returns embeddings in the order given: (D,) of one item, (N, D) of a list or an iterator.

        An item is a caption (a string), a file (path, bytes or file object: a picture, or the pictures, the sound or both that it has), a
        PIL image, frames (n, height, width, 3), (waveform, rate), {"array", "fps"}, {"array", "sampling_rate"}, a decoder as torchcodec's,
        or a dict of what belongs together: {"text": ..., "video": ..., "audio": ..., "image": ..., "timestamps": (start, end)}. Items of
        all kinds may be in one list; each is embedded with what it has. {"video": path} takes the pictures of a file alone.

        Args:
          inputs: one item, or a list or iterator of items.
          texts, videos, audios, images: the items by modality in place of `inputs`: one each, or lists of equal length whose items of equal
            places belong together; None where an item has none. A string is a file name there, but for texts.
          timestamps: (start, end) seconds of the part of the media to take, for all items, or one for each (None: the whole).
          prompt_name: a key of `prompts`, what captions are, for a backbone trained with prompts; None: as the preset says.
          batch_size: items encoded together.
          normalize: whether rows are scaled to length 1.
          truncate_dim: how many of the first columns are kept.
          precision: "float32", "float16", "int8" (each row scaled so that its largest value is 127) or "binary" (packed bits, 8 to a byte).
          show_progress: whether to show a bar and a line while programs are compiled; None: on a terminal and in a notebook.
          on_error: what an item that cannot be embedded leads to: "raise" an error at once; "skip" leaves it out of the rows and warns;
            "nan" puts NaN in its place and warns.
          workers: processes that decode, 0 decodes in this one (then a decoder that hangs cannot be killed); None: by the number of cores.
          prefix: the earlier name of `prompt_name`.

        Raises:
          ArgumentError: an InputError and a ValueError, for arguments that cannot be used, and under "raise" naming the items.

        Warns:
          UserWarning: where items were left out, where a caption is the name of a media file, and once where something of the media was
            replaced (silence for a missing audio track) or captions cut.
        """
        width = self.dim
        prompt = _prompt(self.prompts, prompt_name if prefix is None else prefix)
        check_batch_size(batch_size)
        _check_choice("precision", precision, PRECISIONS)
        _check_choice("on_error", on_error, ON_ERROR)
        if on_error == "nan" and precision in ("int8", "binary"):
            raise ArgumentError(f"encode: on_error='nan': {precision} has no NaN; take float32 or float16, or on_error='skip'")
        if truncate_dim is not None and not (_whole(truncate_dim) and 1 <= truncate_dim <= width):
            raise ArgumentError(f"encode: truncate_dim is {truncate_dim!r}; it must be a whole number from 1 to {width}")
        if workers is not None and not (_whole(workers) and workers >= 0):
            raise ArgumentError(f"encode: workers is {workers!r}; it must be a whole number of at least 0")
        given, count, single = _given(inputs, {"text": texts, "video": videos, "audio": audios, "image": images}, timestamps)
        run = _Run()
        with contextlib.ExitStack() as stack:

            @functools.cache
            def folder() -> Path:
                return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="omni_jax_")))

            items = run.distinct(parse_items(given, self.preset, folder, prompt))
            workers = max(1, (os.cpu_count() or 1) - 1) if workers is None else workers
            function = functools.partial(item_features, preset=self.preset)
            # A single array is computed at once; starting a process would take longer.
            here = functools.partial(_needs_no_process, single)
            loaded = run.loaded(run_guarded(function, items, workers, DECODE_LIMIT_S, name=_name, here=here))
            bar = stack.enter_context(_Progress(show_progress, count, batch_size))
            stack.enter_context(self.report_programs(bar.compiling))
            parts = self.embed_features(loaded, TABLES, own_table, batch_size=batch_size, normalize=normalize and truncate_dim is None)
            for part in stack.enter_context(contextlib.closing(parts)):
                bar.update(part.records)
                run.add(part)
                if run.problems and on_error == "raise":
                    raise ArgumentError(
                        f"encode: {len(run.problems)} of the first {run.seen} items cannot be embedded: {run.listed()}; correct them, or "
                        f"leave them out with on_error='skip' or 'nan'"
                    )
        rows = run.rows(width, keep_bad=on_error == "nan")
        for line in run.notes(on_error, self.preset.max_text_tokens):
            warnings.warn(f"encode: {line}", stacklevel=_level_of_caller())
        rows = finished(rows, truncate_dim, normalize, precision)
        return rows[0] if single and len(rows) else rows

    def encode_query(self, inputs: Any = None, **options: Any) -> np.ndarray:
        """Returns embeddings of what is searched with, as `encode`; captions get the query prompt of a backbone with prompts."""
        options.setdefault("prompt_name", "query" if self.prompts else None)
        return self.encode(inputs, **options)

    def encode_document(self, inputs: Any = None, **options: Any) -> np.ndarray:
        """Returns embeddings of what is searched in, as `encode`; captions get the passage prompt of a backbone with prompts."""
        options.setdefault("prompt_name", "passage" if self.prompts else None)
        return self.encode(inputs, **options)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Returns cosines (N, M) float32 of embeddings (N, D) or (D,) and (M, D) or (D,), in float32, float16 or int8.

        Raises:
          ArgumentError: for what is no array of vectors of one width.
        """
        return similarity(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Returns cosines (N,) float32 of `embeddings1[i]` and `embeddings2[i]`.

        Raises:
          ArgumentError: as `similarity`, and for other lengths.
        """
        return similarity(embeddings1, embeddings2, pairwise=True)

    @property
    def modalities(self) -> tuple[str, ...]:
        """What items may have: in any combination, but for an image, which is a video of one frame."""
        return ("text", "image", "video", "audio")

    @property
    def dim(self) -> int:
        """D, the width of an embedding."""
        return self.config.decoder.hidden_size

    @property
    def prompts(self) -> dict[str, str]:
        """Prompt name -> what precedes a caption; empty for a backbone that was trained without."""
        return {name: f"{name}: " for name in PREFIXES} if self.config.prompt == "chat" else {}


class _Run:
    """What is known of the items while they pass."""

    def __init__(self) -> None:
        self.seen = 0
        self.problems: dict[int, str] = {}
        self._same: dict[int, int] = {}  # an item that was given before -> the first of its kind
        self._vectors: dict[int, np.ndarray] = {}
        self._hints: list[tuple[int, str]] = []
        self._repaired: list[tuple[int, str]] = []
        self._cut = 0

    def distinct(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items of which there was none alike before: equal prompts have equal embeddings, to the bit."""
        first: dict[Any, int] = {}
        for number, item in enumerate(items):
            self.seen = number + 1
            self._hints += [(number, note) for note in item.notes]
            record = item.record
            if item.error is None and item.frames is None and item.sound is None and not item.named:
                key = record.text, record.video, record.audio, record.timestamps, item.file, item.image
                if (known := first.setdefault(key, number)) != number:
                    self._same[number] = known
                    continue
            yield item

    def loaded(self, outcomes: Iterable[tuple[Item, Features | ClipError]]) -> Iterator[tuple[Record, Features | ClipError]]:
        """Yields records with their features; messages name no temporary file, and none of them stays."""
        for item, outcome in outcomes:
            item.discard()
            if isinstance(outcome, ClipError):
                yield item.record, ClipError(item.renamed(str(outcome)))
            else:
                yield item.record, dataclasses.replace(outcome, warnings=tuple(map(item.renamed, outcome.warnings)))

    def add(self, part: Part) -> None:
        for table, rows in part.rows.items():
            self._vectors.update(zip(map(int, part.own.get(table, part.ids)), rows, strict=True))
        self.problems.update((int(number), reason) for number, reason in part.problems)
        self._repaired += [(int(number), line) for number, line in part.warnings]
        self._cut += part.truncated

    def rows(self, width: int, keep_bad: bool) -> np.ndarray:
        """Returns (N, D) float32 in the order given, bad items as NaN or left out."""
        for number, known in self._same.items():
            if known in self.problems:
                self.problems[number] = self.problems[known]
            else:
                self._vectors[number] = self._vectors[known]
        kept = range(self.seen) if keep_bad else sorted(self._vectors)
        rows = np.full((len(kept), width), np.nan, np.float32)
        for place, number in enumerate(kept):
            if number in self._vectors:
                rows[place] = self._vectors[number]
        return rows

    def listed(self) -> str:
        shown = [f"item {number}: {reason}" for number, reason in sorted(self.problems.items())[:SHOWN]]
        return "; ".join(shown) + (f"; and {len(self.problems) - SHOWN} more" if len(self.problems) > SHOWN else "")

    def notes(self, on_error: str, most_tokens: int) -> Iterator[str]:
        """Yields the lines to warn of."""
        if self.problems:
            what = "are left out" if on_error == "skip" else "are NaN"
            yield f"{len(self.problems)} of {self.seen} items cannot be embedded and {what}: {self.listed()}"
        if self._hints:
            number, note = self._hints[0]
            more = f" (and {len(self._hints) - 1} more such notes)" if len(self._hints) > 1 else ""
            yield f"item {number}: {note}{more}"
        notes = []
        if self._repaired:
            number, line = self._repaired[0]
            notes.append(f"{len({n for n, _ in self._repaired})} of {self.seen} items were repaired, the first: item {number}: {line}")
        if self._cut:
            notes.append(f"{self._cut} of {self.seen} captions were cut to max_text_tokens={most_tokens}")
        if notes:
            yield "; ".join(notes)


class _Progress:
    """A bar over the items (tqdm), on a terminal and in a notebook where the caller does not say, and one line before a compilation."""

    def __init__(self, show: bool | None, count: int | None, batch_size: int) -> None:
        self._visible = sys.stderr.isatty() if show is None else show  # a notebook's stderr says that it is one
        self._bar: Any = None
        self._announced = False
        if self._visible and (show or count is None or count > batch_size):
            from tqdm.auto import tqdm

            self._bar = tqdm(total=count, desc="encode", unit="item")

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, items: int) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str("", refresh=False)
            self._bar.update(items)

    def compiling(self, program: str) -> None:
        if self._visible and not self._announced:
            from tqdm.auto import tqdm

            tqdm.write(
                "encode: compiling programs for these shapes, up to a minute the first time; later batches need none", file=sys.stderr
            )
        self._announced = True
        if self._bar is not None:
            self._bar.set_postfix_str(f"compiling {program}")


def check_batch_size(batch_size: Any) -> None:
    """Raises ArgumentError for what is no whole number of at least 1."""
    if not _whole(batch_size) or batch_size < 1:
        raise ArgumentError(f"batch_size is {batch_size!r}; it must be a whole number of at least 1")


def _given(inputs: Any, fields: Mapping[str, Any], timestamps: Any) -> tuple[Iterator[Mapping[str, Any]], int | None, bool]:
    """Returns what was given for each item, the number of items where it is known, and whether it is one item and no list.

    Raises:
      ArgumentError: for nothing, items in two places, or lists of unequal length.
    """
    columns = {name: value for name, value in fields.items() if value is not None}
    if inputs is not None and columns:
        raise ArgumentError(f"encode: gives inputs and {'s, '.join(columns)}s; give the items once, as inputs or by modality")
    columns = {"item": inputs} if inputs is not None else columns
    if not columns:
        raise ArgumentError("encode: give inputs, or at least one of texts, videos, audios, images")
    single = {name: is_single(value) for name, value in columns.items()}
    if len(set(single.values())) > 1:
        one, many = ([f"{name}s" for name, alone in single.items() if alone is kind] for kind in (True, False))
        raise ArgumentError(f"encode: {', '.join(one)} is one item, {', '.join(many)} a list; give lists of the same length")
    alone = all(single.values())
    if timestamps is not None:
        columns["timestamps"] = timestamps
    if alone:
        return iter([columns]), 1, True
    shared = {}
    if timestamps is not None and _is_interval(timestamps):  # one for all
        shared["timestamps"] = columns.pop("timestamps")
    lengths = {f"{name}s" if name in fields else name: len(value) for name, value in columns.items() if hasattr(value, "__len__")}
    if len(set(lengths.values())) > 1:
        raise ArgumentError(f"encode: the lists must be of the same length; got {', '.join(f'{n} {c}' for n, c in lengths.items())}")

    def rows() -> Iterator[Mapping[str, Any]]:
        try:
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True)) | shared
        except ValueError as error:
            if not str(error).startswith("zip()"):
                raise
            raise ArgumentError("encode: the iterators do not give the same number of items") from None

    return rows(), next(iter(lengths.values()), None), False


def _is_interval(value: Any) -> bool:
    if not hasattr(value, "__len__"):
        return False  # an iterator, of an item each
    return (len(value) == 2 and all(isinstance(x, int | float | np.number) for x in value)) or interval(value) is not None


def _prompt(prompts: Mapping[str, str], name: str | None) -> str | None:
    if name is not None and name not in prompts:
        choice = f"choose one of {', '.join(PREFIXES)}" if prompts else "this backbone takes none; omit it"
        raise ArgumentError(f"encode: prompt_name {name!r}: {choice}")
    return name


def own_table(features: Features) -> tuple[str, ...]:
    """Returns the table of all that an item has."""
    has = {"t": features.record.text is not None, "v": features.vision is not None, "a": features.audio is not None}
    return (_TABLE_OF[frozenset(modality for modality, there in has.items() if there)],)


_TABLE_OF = {modalities: name for name, modalities in TABLE_MODALITIES.items()}


def _needs_no_process(single: bool, item: Item) -> bool:
    in_memory = not item.record.modalities - {"t"} and item.file is None and item.image is None
    return not item.reads or (single and in_memory)


def _name(item: Item) -> str:
    files = dict.fromkeys(str(p) for p in (item.file, item.image, item.record.video, item.record.audio) if p is not None)
    return " + ".join(files) or f"record {item.record.id!r}"


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ArgumentError(f"encode: {name} is {value!r}; choose one of {', '.join(choices)}")


def _whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _level_of_caller() -> int:
    """Returns the `stacklevel` of a warning that is shown where this package was called from."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("omni_jax."):
        level, frame = level + 1, frame.f_back
    return level
