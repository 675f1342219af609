"""A model as mteb takes it: text, images, audio and video of a task's rows through `OmniRetriever.encode`, and the record of the model.

Of other people's code this module needs mteb (extra `mteb`), which brings datasets, torch and sentence-transformers.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction

from omni_jax.api.made_with import made_with
from omni_jax.api.retriever import OmniRetriever
from omni_jax.api.weights import find_model, open_model
from omni_jax.config import PRESETS, Preset, mteb_preset
from omni_jax.config import preset as preset_named
from omni_jax.model import abstract_params

MODALITIES = ("text", "image", "audio", "video")
OPTIONS = ("precision", "truncate_dim", "workers", "on_error")
"""What `encode_kwargs` of `mteb.evaluate` may hold besides `batch_size`, as `OmniRetriever.encode` takes it."""

PROMPTS = {"query": "query", "document": "passage"}


class OmniRetrieverEncoder(AbsEncoder):
    """An encoder for `mteb.evaluate`. The weights are read at the first `encode`: results that mteb has kept need none.

    Attributes:
      failed: items so far that could not be embedded.
    """

    failed = 0

    def __init__(
        self, model_name: str, revision: str | None = None, *, device: str | None = None, folder: str = "", **settings: Any
    ) -> None:
        """Takes a folder as `OmniRetriever.from_pretrained` does, and what `model_meta` takes.

        Args:
          model_name: the folder; where `folder` is given, as mteb does, the name of the model.
          revision, device: what mteb hands over, without effect: the folder says the one, jax the other.
        """
        self._folder = folder or model_name
        settings |= {"name": model_name} if folder else {}
        self.mteb_model_meta = model_meta(self._folder, **settings)

    @functools.cached_property
    def model(self) -> OmniRetriever:
        settings: dict[str, Any] = dict(self.mteb_model_meta.experiment_kwargs)
        settings["preset"] = _preset(settings["preset"])
        return OmniRetriever.from_pretrained(self._folder, **settings)

    def encode(
        self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, prompt_type: Any = None, **options: Any
    ) -> np.ndarray:
        """Returns the embeddings (N, D) of a DataLoader's rows. One that cannot be embedded is zeros, and is named in a warning."""
        name = PROMPTS.get(getattr(prompt_type, "value", prompt_type) or "")
        chosen: dict[str, Any] = {"on_error": "nan"} | {option: options[option] for option in OPTIONS if option in options}
        rows = self.model.encode(
            _items(inputs),
            prompt_name=name if self.model.prompts else None,
            batch_size=options.get("batch_size", 16),
            show_progress=options.get("show_progress_bar"),
            **chosen,
        )
        self.failed += int(np.isnan(rows).any(axis=1).sum())
        return np.nan_to_num(rows)


def model_meta(
    folder: str | os.PathLike[str],
    *,
    preset: Any = None,
    dtype: str = "keep",
    weights: str = "keep",
    step: int | None = None,
    **fields: Any,
) -> ModelMeta:
    """Returns mteb's record of a model; no weights are read for it.

    Its revision is a digest of weights, architecture and tokenizer; preset and dtype are its `experiment_kwargs`.

    Args:
      folder, dtype, weights, step: as `OmniRetriever.from_pretrained` takes them.
      preset: a preset, its name or its fields; None: what mteb's own wrapper of this backbone does.
      fields: of `ModelMeta`, in place of the defaults: name ("organization/model"), license, release_date, ...

    Raises:
      InputError, ConfigError: as `OmniRetriever.from_pretrained`.
    """
    source = open_model(find_model(folder), step, weights)
    chosen = _preset(mteb_preset(source.config.prompt) if preset is None else preset)
    chosen.check(source.config.prompt)
    made = made_with(source, chosen, dtype=dtype)
    digest = hashlib.sha256(json.dumps([made["weights"], made["model"], made["tokenizer"]], sort_keys=True).encode()).hexdigest()
    shapes = {path: math.prod(leaf.shape) for path, leaf in abstract_params(source.config).items()}
    held = {"weights": weights, "step": step}
    known = {name: None for name, field in ModelMeta.model_fields.items() if field.is_required()} | {
        "loader": functools.partial(OmniRetrieverEncoder, folder=os.fspath(folder)),
        "name": f"omni_jax/{Path(folder).resolve().name}",
        "revision": digest[:40],
        "languages": ["eng-Latn"],
        "n_parameters": sum(shapes.values()),
        "n_embedding_parameters": shapes["decoder", "embed", "embedding"],
        "max_tokens": chosen.max_text_tokens,
        "embed_dim": source.config.decoder.hidden_size,
        "framework": ["JAX"],
        "similarity_fn_name": ScoringFunction.COSINE,
        "use_instructions": source.config.prompt == "chat",
        "modalities": list(MODALITIES),
        "experiment_kwargs": {"preset": _recorded(chosen), "dtype": dtype}
        | {name: x for name, x in held.items() if x not in (None, "keep")},
    }
    return ModelMeta(**known | fields)


def _preset(value: Any) -> Preset:
    return value if isinstance(value, Preset) else preset_named(value) if isinstance(value, str) else Preset(**value)


def _recorded(chosen: Preset) -> str | dict[str, Any]:
    """The name of a preset or, of one without, its fields that are not those of the training preset."""
    named = next((name for name, preset in PRESETS.items() if preset == chosen), None)
    usual = dataclasses.asdict(Preset())
    return named or {field: value for field, value in dataclasses.asdict(chosen).items() if value != usual[field]}


def _items(inputs: Any) -> Iterator[dict[str, Any]]:
    """Yields the rows of a DataLoader as items of `encode`: sound and video as files, which the preset's own decoder reads."""
    dataset, features = inputs.dataset, getattr(inputs.dataset, "features", None)
    if features is None:  # a list, or a Dataset of torch's: batches of columns
        for batch in inputs:
            columns = {name: batch[name] for name in MODALITIES if name in batch}
            yield from (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        return
    for name, kind in (("audio", datasets.Audio), ("video", datasets.Video)):
        if isinstance(features.get(name), kind):
            dataset = dataset.cast_column(name, kind(decode=False))
    for row in dataset.select_columns([name for name in MODALITIES if name in features]):
        yield {name: value for name, value in row.items() if value is not None and not (name == "text" and not value.strip())}
