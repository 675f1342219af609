"""The Python face: a converted checkpoint as one object that embeds text, video, audio and any mix of them."""

from __future__ import annotations

import dataclasses
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from omni_jax.api.made_with import made_with
from omni_jax.api.weights import load_params, open_model, own_preset
from omni_jax.config import PREFIXES, TABLE_MODALITIES, TABLES, ConfigError, ModelConfig, Preset
from omni_jax.config import preset as preset_named
from omni_jax.config.compile_cache import use_compile_cache
from omni_jax.data.loading import DECODE_LIMIT_S, load_features
from omni_jax.parallel import batch_shards, make_mesh
from omni_jax.retrieval.embedding_pass import Part, assemble, embedding_pass, one_row_a_prompt
from omni_jax.tokens.batching import Planner, build_batches
from omni_jax.tokens.prompts import build_sequences
from omni_jax.tokens.tokenizer import Tokenizer
from omni_jax.types import ClipError, EncoderBatch, Features, InputError, Record, TokenizedClip

if TYPE_CHECKING:
    from omni_jax.model import Encoder


class OmniRetriever:
    """Embeds clips and captions with a converted checkpoint.

    Attributes:
      preset: how clips and captions become tokens; assign another one at any time.
    """

    def __init__(
        self, encoder: Encoder, tokenizer: Tokenizer, preset: Preset, mesh: Mesh | None = None, origin: Mapping[str, Any] | None = None
    ):
        """`origin`: what `omni_jax.api.made_with.made_with` says of the model; None: what it embeds is of unknown making."""
        from omni_jax.model.runner import Runner  # with flax, slow: not before there is a model

        self.config = encoder.config
        self.preset = preset
        self._tokenizer = tokenizer
        self._runner = Runner(encoder, mesh)
        self._rows = 1 if mesh is None else batch_shards(mesh)
        self._planners: dict[Preset, Planner] = {}
        self._origin = origin

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike[str], *, dtype: str = "keep", preset: str | Preset | None = None, step: int | None = None
    ) -> OmniRetriever:
        """Loads a folder that `omni-jax convert to-jax` wrote, or the workdir of `omni-jax train`, on every device jax sees.

        Args:
          directory: the converted folder or the workdir.
          dtype: "keep", "bfloat16" or "float32": of the weights in memory, and of the computation.
          preset: a preset, or the name of one; None takes the one that the model was trained with (a workdir's own).
          step: of a workdir the checkpoint after so many updates; None for the newest.

        Raises:
          ConfigError: for a preset that is unknown or made for another kind of backbone.
          InputError: when the folder is not a converted checkpoint, its tokenizer belongs to another model, or its towers take patches
            that the preprocessing does not make.
        """
        from omni_jax.model import abstract_encoder, with_params

        use_compile_cache()
        # Before the weights, which take minutes to read at full size.
        source = open_model(directory, step)
        prompt = source.config.prompt
        chosen = own_preset(directory) if preset is None else preset_named(preset) if isinstance(preset, str) else preset
        chosen.check(prompt)
        check_preprocessing(source.folder, source.config)
        tokenizer = Tokenizer.from_pretrained(source.folder)
        tokenizer.check(source.config.tokens)
        mesh = make_mesh() if len(jax.devices()) > 1 else None
        params = load_params(source, None if dtype == "keep" else dtype, mesh)
        compute = jnp.dtype(dtype) if dtype != "keep" else params["decoder", "layers", "attn", "q", "kernel"].dtype
        encoder = with_params(abstract_encoder(source.config, dtype=compute), params)
        return cls(encoder, tokenizer, chosen, mesh, made_with(source, chosen, dtype=dtype))

    def assign(self, params: Mapping[tuple[str, ...], jax.Array]) -> None:
        """Embeds with other parameters of the same shapes, types and places from now on; nothing is compiled again."""
        self._runner.assign(dict(params))
        self._origin = None

    def made_with(self, *, normalize: bool = True) -> dict[str, Any] | None:
        """Returns what embeddings by this model depend on under its preset, for `EmbeddingTable.made_with` (see `omni_jax.api.made_with`).

        None for a model that was not read from a folder, or was assigned other parameters.
        """
        if self._origin is None:
            return None
        return {**self._origin, "preset": dataclasses.asdict(self.preset), "normalize": normalize}

    @property
    def programs(self) -> list[str]:
        """Programs compiled so far: what and which shapes."""
        return self._runner.programs

    def encode(
        self,
        texts: Sequence[str] | None = None,
        videos: Sequence[str | os.PathLike[str]] | None = None,
        audios: Sequence[str | os.PathLike[str]] | None = None,
        *,
        prefix: str | None = None,
        batch_size: int = 16,
        normalize: bool = True,
        workers: int | None = None,
    ) -> np.ndarray:
        """Returns one embedding per item, (N, D) float32: of the modalities given, taken together.

        `encode(texts=..., videos=...)` embeds each text with the video of the same place. Audio may be read from a video file.

        Args:
          texts, videos, audios: lists of equal length; at least one.
          prefix: "passage" or "query", what the texts are, for a backbone trained with prefixes; None: as the preset says.
          batch_size: clips encoded together.
          normalize: whether rows are scaled to length 1.
          workers: decoding processes; None chooses by the number of cores.

        Raises:
          InputError: for an unknown prefix or one that the backbone does not take, lists of unequal length, items that are no captions or
            paths, and naming the items that cannot be read.

        Warns:
          UserWarning: once, where something of the media was replaced (silence for a missing audio track) or captions cut.
        """
        _check_batch_size(batch_size)
        if prefix is not None and (prefix not in PREFIXES or self.config.prompt == "plain"):
            choice = f"choose one of {', '.join(PREFIXES)}" if self.config.prompt == "chat" else "this backbone takes none; omit it"
            raise InputError(f"encode: prefix {prefix!r}: {choice}")
        given = {
            "text": _listed("texts", texts, "captions"),
            "video": _listed("videos", videos, "paths"),
            "audio": _listed("audios", audios, "paths"),
        }
        lengths = {name: len(values) for name, values in given.items() if values is not None}
        if not lengths or len(set(lengths.values())) != 1:
            raise InputError(f"encode: give at least one of texts, videos, audios, all of the same length; got {lengths or 'none'}")
        count = next(iter(lengths.values()))
        modalities = frozenset(name[0] for name in lengths)
        table = next(name for name in TABLES if TABLE_MODALITIES[name] == modalities)
        records = [
            Record(
                id=str(i),
                text=given["text"][i] if given["text"] is not None else None,
                video=Path(given["video"][i]).absolute() if given["video"] is not None else None,
                audio=Path(given["audio"][i]).absolute() if given["audio"] is not None else None,
                prefix=prefix,
            )
            for i in range(count)
        ]
        if not records:
            return np.zeros((0, self.config.decoder.hidden_size), np.float32)
        parts = self.embed(records, (table,), batch_size=batch_size, normalize=normalize, workers=workers)
        outcome = one_row_a_prompt(records, assemble(records, list(parts)))
        if outcome.problems:
            lines = "; ".join(f"item {record.id}: {reason}" for record, reason in outcome.problems[:5])
            raise InputError(f"encode: {len(outcome.problems)} of {count} items cannot be embedded: {lines}")
        notes = []
        if outcome.warnings:
            item, line = outcome.warnings[0]
            repaired = len({item for item, _ in outcome.warnings})
            notes.append(f"{repaired} of {count} items were repaired, the first: item {item}: {line}")
        if outcome.truncated:
            notes.append(f"{outcome.truncated} of {count} captions were cut to max_text_tokens={self.preset.max_text_tokens}")
        if notes:
            warnings.warn(f"encode: {'; '.join(notes)}", stacklevel=2)
        return outcome.table.tables[table]

    def embed(
        self,
        records: Sequence[Record],
        tables: Sequence[str],
        *,
        batch_size: int = 16,
        normalize: bool = True,
        workers: int | None = None,
        timeout: float = DECODE_LIMIT_S,
        share_prefix: bool | None = None,
        load: Callable[[Sequence[Record]], Iterable[Features | ClipError]] | None = None,
    ) -> Iterator[Part]:
        """Embeds records into tables, a group at a time; a record that cannot be embedded is set aside and never stops the others.

        A record is embedded into every table whose modalities it has.

        `omni_jax.retrieval.embedding_pass.assemble(records, parts)` puts the parts together.

        Args:
          tables: names among `omni_jax.config.TABLES`.
          workers: decoding processes, 0 decodes in this one (then a decoder that hangs cannot be killed).
          timeout: seconds that the decoding of a clip may stand still; ten times as many it may take in all.
          share_prefix: whether prompts that start with the same media share its tokens; the embeddings are the same. None: where the
            backbone's attention is causal.
          load: gives the features of records, or the reason why there are none, in their order; None decodes their files.

        Raises:
          ConfigError: for an unknown table, or prefixes that are to be shared and cannot be.
          InputError: for a batch size below 1.
        """
        _check_batch_size(batch_size)
        unknown = [name for name in tables if name not in TABLES]
        if unknown or not tables:
            raise ConfigError(f"unknown table {', '.join(unknown) or '(none given)'}; choose among {', '.join(TABLES)}")
        share_prefix = self.config.shares_prefix if share_prefix is None else share_prefix
        self.config.check_share_prefix(share_prefix)
        needed = frozenset().union(*(TABLE_MODALITIES[name] for name in tables))
        fits = [any(TABLE_MODALITIES[name] <= r.modalities for name in tables) for r in records]
        unable = [(r.id, _missing(r, tables)) for r, fit in zip(records, fits, strict=True) if not fit]
        if unable:
            yield Part(problems=tuple(unable))
        able = [r for r, fit in zip(records, fits, strict=True) if fit]

        planner = self._planners.setdefault(self.preset, Planner(row_multiple=self._rows))

        def tokenized(record: Record, item: Features | ClipError) -> tuple[Record, TokenizedClip | ClipError]:
            if isinstance(item, ClipError):
                return record, item
            try:
                return record, TokenizedClip(item, build_sequences(item, tables, self._tokenizer, self.config, self.preset))
            except ClipError as e:
                return record, ClipError(f"{_who(record)}: {e}")

        def plan(group: Sequence[TokenizedClip]) -> EncoderBatch:
            return build_batches(
                [clip.features for clip in group],
                tables,
                self._tokenizer,
                self.config,
                self.preset,
                share_prefix=share_prefix,
                planner=planner,
                sequences=[clip.sequences for clip in group],
            )

        def encode(batch: EncoderBatch) -> Iterator[tuple[int, str, np.ndarray]]:
            return self._runner.embed(batch, self.preset.text_head)

        if workers is None:
            workers = max(1, (os.cpu_count() or 1) - 1) if needed != {"t"} else 0
        features = load_features(able, self.preset, needed, workers=workers, timeout_s=timeout) if load is None else load(able)
        clips = itertools.starmap(tokenized, zip(able, features, strict=True))
        yield from embedding_pass(clips, tables, plan=plan, encode=encode, group=batch_size, normalize=normalize)


def _missing(record: Record, tables: Sequence[str]) -> str:
    names = {"t": "text", "v": "video", "a": "audio"}
    # Of the table that needs least besides what is there.
    lacks = min((TABLE_MODALITIES[name] - record.modalities for name in tables), key=len)
    lacking = [names[m] for m in "tva" if m in lacks]
    return f"{_who(record)}: has no {' and no '.join(lacking)}, which the requested tables need; add the field or choose other --tables"


def _who(record: Record) -> str:
    return f"record {record.id!r}" + (f" (line {record.line} of the manifest)" if record.line else "")


def _listed(name: str, values: Any, kind: str) -> list[Any] | None:
    """Returns the items of one argument of `encode`; raises InputError for what is no list of captions or paths."""
    if values is None:
        return None
    if isinstance(values, (str, bytes, os.PathLike, Mapping, Set)) or not hasattr(values, "__len__") or getattr(values, "ndim", 1) != 1:
        raise InputError(f"encode: {name} is of type {type(values).__name__}; give a list of {kind}, also for a single one")
    wanted = str if kind == "captions" else (str, os.PathLike)
    items = list(values)
    for i, item in enumerate(items):
        if not isinstance(item, wanted) or not isinstance(os.fspath(item), str):
            give = "strings" if wanted is str else "strings or pathlib paths"
            raise InputError(f"encode: {name}[{i}] is of type {type(item).__name__}; give {give}")
        if not os.fspath(item).strip():
            raise InputError(f"encode: {name}[{i}] is empty; leave the item out of every list or fill it in")
    return items


def _check_batch_size(batch_size: Any) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise InputError(f"batch_size is {batch_size!r}; it must be a whole number of at least 1")


def check_preprocessing(folder: epath.Path, config: ModelConfig) -> None:
    """Raises InputError for towers whose input the preprocessing, which has one patch size, does not make."""
    from omni_jax.features import audio, vision
    from omni_jax.tokens import buckets

    made = {
        "vision.patch_size": (config.vision.patch_size, vision.PATCH),
        "vision.merge_size": (config.vision.merge_size, vision.MERGE),
        "vision.temporal_patch_size": (config.vision.temporal_patch_size, vision.FRAMES_PER_STEP),
        "vision.in_channels": (config.vision.in_channels, len(vision.MEAN)),
        "audio.num_mel_bins": (config.audio.num_mel_bins, audio.MEL_BINS),
    }
    if config.beats is not None:
        made["beats.patch_size"] = (config.beats.patch_size, buckets.BEATS_PATCH)
        made["beats.num_mel_bins"] = (config.beats.num_mel_bins, audio.MEL_BINS)
    for name, (value, fixed) in made.items():
        if value != fixed:
            raise InputError(
                f"{folder}: the model's {name} is {value}, must be {fixed}: the preprocessing is fixed at 14/2/2/16 "
                f"(patch, merge, temporal patch, fbank patch); use a WAVE-7B or Qwen2.5-Omni checkpoint"
            )
