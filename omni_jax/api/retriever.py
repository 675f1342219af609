"""The Python face: a converted checkpoint as one object that embeds text, video, audio and any mix of them."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from omni_jax.api.encoding import ItemEncoder, check_batch_size
from omni_jax.api.made_with import made_with
from omni_jax.api.saving import save_model
from omni_jax.api.weights import ModelSource, compute_type, find_model, load_params, open_model
from omni_jax.config import TABLE_MODALITIES, TABLES, ConfigError, ModelConfig, Preset, preset_key
from omni_jax.config import preset as preset_named
from omni_jax.config.compile_cache import use_compile_cache
from omni_jax.data.loading import DECODE_LIMIT_S, load_features
from omni_jax.parallel import batch_shards, make_mesh
from omni_jax.retrieval.embedding_pass import Part, embedding_pass, start_group
from omni_jax.tokens.batching import Planner, build_batches
from omni_jax.tokens.prompts import able_records, tokenized_clip
from omni_jax.tokens.tokenizer import Tokenizer
from omni_jax.types import ClipError, EncoderBatch, Features, InputError, Record, TokenizedClip

if TYPE_CHECKING:
    from omni_jax.model import Encoder


class OmniRetriever(ItemEncoder):
    """Embeds clips and captions with a converted checkpoint.

    Attributes:
      preset: how clips and captions become tokens; assign another one at any time.
      row_multiple: rows of a batch are a multiple of it, so that they spread over the devices.
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
        self._mesh = mesh
        self.row_multiple = 1 if mesh is None else batch_shards(mesh)
        self._planners: dict[Preset, Planner] = {}
        self._origin = origin
        self._dtype = jnp.dtype(encoder.dtype)
        self._source: ModelSource | None = None  # that the weights were read from
        self._name = ""

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        *,
        adapter: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        adapter_revision: str | None = None,
        token: str | bool | None = None,
        dtype: str = "keep",
        weights: str = "keep",
        preset: str | Preset | None = None,
        step: int | None = None,
    ) -> OmniRetriever:
        """Loads a model on every device jax sees.

        Args:
          directory: a folder that `omni-jax convert to-jax` wrote, the workdir of `omni-jax train`, the folder of a checkpoint of torch's
            layout, or its name on the Hub ("owner/repository"). The latter two are converted once into the cache (OMNI_JAX_CACHE).
          adapter: of the latter two a PEFT adapter: its folder or its name on the Hub.
          revision, adapter_revision: of a name on the Hub the branch, tag or commit; None: "main".
          token: for the Hub; None: what `hf auth login` or HF_TOKEN say.
          dtype: "keep", "bfloat16" or "float32": of the weights in memory, and of the computation.
          weights: "keep", "int8" or "int8-dynamic": the large matrices as they are stored, or rounded to int8, which takes half the memory
            of bfloat16; `dtype` is then that of the rest. "int8-dynamic" rounds what they multiply too: faster on a TPU, less exact.
          preset: a preset, or the name of one; None takes the one that the model was trained with (a workdir's own).
          step: of a workdir the checkpoint after so many steps; None for the newest.

        Raises:
          ConfigError: for unknown weights, or a preset that is unknown or made for another kind of backbone.
          InputError: when the folder is no such model, cannot be fetched or converted, its tokenizer belongs to another model, or its
            towers take patches that the preprocessing does not make.
        """
        use_compile_cache()
        folder = find_model(directory, adapter, revision=revision, adapter_revision=adapter_revision, token=token)
        model = cls.from_source(open_model(folder, step, weights), dtype=dtype, preset=preset)
        model._name = " + ".join(os.fspath(name) for name in (directory, adapter) if name is not None)
        return model

    @classmethod
    def from_source(cls, source: ModelSource, *, dtype: str = "keep", preset: str | Preset | None = None) -> OmniRetriever:
        """Loads a model that `omni_jax.api.weights.open_model` opened, as `from_pretrained` does.

        Raises:
          ConfigError, InputError: as `from_pretrained`.
        """
        from omni_jax.model import abstract_encoder, with_params

        use_compile_cache()
        # Before the weights, which take minutes to read at full size.
        chosen = source.preset if preset is None else preset_named(preset)
        chosen.check(source.config.prompt)
        tokenizer = source.tokenizer
        mesh = make_mesh() if len(jax.devices()) > 1 else None
        params = load_params(source, None if dtype == "keep" else dtype, mesh)
        compute = jnp.dtype(dtype) if dtype != "keep" else compute_type(params)
        encoder = with_params(abstract_encoder(source.config, dtype=compute), params)
        model = cls(encoder, tokenizer, chosen, mesh, made_with(source, chosen, dtype=dtype))
        model._source, model._name = source, os.fspath(source.home)
        return model

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the model to a folder that `from_pretrained` and `--model` load; neither the preset nor int8 is kept there.

        Raises:
          InputError: `folder` exists or cannot be written, or the weights are no longer those of the folder that they were read from.
        """
        if self._source is None:
            raise InputError("save: these weights were read from no folder, or were assigned since; train or convert them into one")
        save_model(open_model(self._source.home, self._source.step), folder)  # opened again: it may have changed since

    def assign(self, params: Mapping[tuple[str, ...], jax.Array]) -> None:
        """Embeds with other parameters of the same shapes, types and places from now on; nothing is compiled again."""
        self._runner.assign(dict(params))
        self._origin = self._source = None

    def as_int8(self) -> OmniRetriever:
        """Returns the model with what its matrices multiply not rounded, as "int8" has it; both share one copy of the weights in memory."""
        from omni_jax.model import abstract_encoder, with_params

        encoder = abstract_encoder(self.config.with_weights("int8", self.config.kept), dtype=self._dtype)
        return OmniRetriever(with_params(encoder, self._runner.params), self._tokenizer, self.preset, self._mesh)

    def with_weights(
        self, params: Mapping[tuple[str, ...], jax.Array], config: ModelConfig, tokenizer: Tokenizer, preset: Preset
    ) -> OmniRetriever:
        """Returns a model of the same architecture with other parameters, tokenizer and preset, whose compiled programs are this one's.

        This one then has the parameters, too.
        """
        self.assign(params)
        model = copy.copy(self)
        model.config, model.preset, model._tokenizer, model._planners = config, preset, tokenizer, {}
        return model

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

    def count_tokens(self, text: str) -> int:
        """Returns the tokens of a caption, before it is cut. Raises ClipError for text that is not valid Unicode."""
        return len(self._tokenizer.encode_text(text))

    def __repr__(self) -> str:
        lora, devices = self.config.lora, len(jax.devices())
        preset = name if isinstance(name := preset_key(self.preset), str) else "of its own"
        adapter = f"LoRA of rank {lora.rank}" if lora is not None else "no adapter"
        return (
            f"OmniRetriever({self._name!r}, dim {self.dim}, {self.config.decoder.num_layers} layers, {adapter}, {self._dtype}, "
            f"preset {preset}, {', '.join(self.modalities)}; {devices} {jax.default_backend()} device{'s' * (devices > 1)})"
        )

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
        shapes: Mapping[str, Iterable[tuple[int, ...]]] | None = None,
    ) -> Iterator[Part]:
        """Embeds records into tables, a group at a time; a record that cannot be embedded is skipped and never stops the others.

        A record is embedded into every table whose modalities it has.

        `omni_jax.retrieval.embedding_pass.assemble(records, parts)` puts the parts together.

        Args:
          tables: names among `omni_jax.config.TABLES`.
          workers: decoding processes, 0 decodes in this one (then a decoder that hangs cannot be killed).
          timeout: seconds that the decoding of a clip may stand still; ten times as many it may take in all.
          share_prefix: whether prompts that start with the same media share its tokens; the embeddings are the same. None: where the
            backbone's attention is causal.
          load: gives the features of records, or the reason why there are none, in their order; None decodes their files.
          shapes: `Part.shapes` of the last part of an interrupted pass, {} to begin one, whose bits then depend on nothing that was
            embedded before. None: shapes of earlier calls are used again, too.

        Raises:
          ConfigError: for an unknown table, or prefixes that are to be shared and cannot be.
          InputError: for a batch size below 1.
        """
        check_batch_size(batch_size)
        unknown = [name for name in tables if name not in TABLES]
        if unknown or not tables:
            raise ConfigError(f"unknown table {', '.join(unknown) or '(none given)'}; choose among {', '.join(TABLES)}")
        share_prefix = self.config.shares_prefix if share_prefix is None else share_prefix
        self.config.check_share_prefix(share_prefix)
        needed = frozenset().union(*(TABLE_MODALITIES[name] for name in tables))
        able, unable = able_records(records, tables)
        if unable:
            yield Part(problems=unable)

        if workers is None:
            workers = max(1, (os.cpu_count() or 1) - 1) if needed != {"t"} else 0
        features = load_features(able, self.preset, needed, workers=workers, timeout_s=timeout) if load is None else load(able)
        clips = zip(able, features, strict=True)
        yield from self.embed_features(
            clips, tables, lambda _: tables, batch_size=batch_size, normalize=normalize, share_prefix=share_prefix, shapes=shapes
        )

    def embed_features(
        self,
        clips: Iterable[tuple[Record, Features | ClipError]],
        tables: Sequence[str],
        tables_of: Callable[[Features], Sequence[str]],
        *,
        batch_size: int,
        normalize: bool,
        share_prefix: bool | None = None,
        shapes: Mapping[str, Iterable[tuple[int, ...]]] | None = None,
    ) -> Generator[Part]:
        """Embeds decoded clips, a group at a time, as `embed` does.

        Args:
          clips: records with their features, or with the reason why there are none.
          tables: all that some clip may be embedded into.
          tables_of: those that a clip is embedded into.
          shapes: as in `embed`.
        """
        planner = Planner(shapes, row_multiple=self.row_multiple)
        if shapes is None:
            planner = self._planners.setdefault(self.preset, planner)
        planned: collections.deque[dict[str, list[tuple[int, ...]]]] = collections.deque()

        def tokenized(record: Record, item: Features | ClipError) -> tuple[Record, TokenizedClip | ClipError]:
            if isinstance(item, ClipError):
                return record, item
            return record, tokenized_clip(item, tables_of(item), self._tokenizer, self.config, self.preset)

        def plan(group: Sequence[TokenizedClip]) -> EncoderBatch:
            batch = build_batches(group, self.config, share_prefix=share_prefix, planner=planner)
            planned.append(planner.known())
            return batch

        for part in embedding_pass(
            itertools.starmap(tokenized, clips), tables, plan=plan, encode=self._encode, group=batch_size, normalize=normalize
        ):
            yield dataclasses.replace(part, shapes=planned.popleft()) if part.total_tokens else part

    def start_group(
        self, clips: Sequence[TokenizedClip], tables: Sequence[str], shapes: Mapping[str, Iterable[tuple[int, ...]]], *, normalize: bool
    ) -> Callable[[], Part]:
        """Starts the devices on one group of `embed`, planned elsewhere; the function that is returned waits for them and gives its part.

        Args:
          shapes: what the planner knew before this group.
        """
        planner = Planner(shapes, row_multiple=self.row_multiple)
        plan = functools.partial(build_batches, config=self.config, planner=planner)
        return start_group(clips, [], tables, plan=plan, encode=self._encode, normalize=normalize)

    def _encode(self, batch: EncoderBatch) -> Iterator[tuple[int, str, np.ndarray]]:
        return self._runner.embed(batch, self.preset.text_head)

    @contextlib.contextmanager
    def report_programs(self, log: Callable[[str], None]) -> Iterator[None]:
        """Within, `log` is called with the name of every program before it is compiled."""
        self._runner.compiling = log
        try:
            yield
        finally:
            self._runner.compiling = None
