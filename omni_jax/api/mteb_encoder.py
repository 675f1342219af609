"""A model as mteb takes it: rows of its tasks through `OmniRetriever.encode`, and the record of the model. mteb (an extra) brings torch."""

from __future__ import annotations

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
from omni_jax.config import Preset, mteb_preset, preset_key
from omni_jax.config import preset as preset_named
from omni_jax.model import abstract_params

MODALITIES = ("text", "image", "audio", "video")
OPTIONS = ("batch_size", "precision", "truncate_dim", "workers", "on_error")
"""What `encode_kwargs` of `mteb.evaluate` may hold, as `OmniRetriever.encode` takes it."""

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
        """Takes a folder and what `model_meta` takes; or, as mteb does, the model's name and its `folder`, a revision and a device."""
        self._folder = folder or model_name
        settings |= {"name": model_name} if folder else {}
        self.mteb_model_meta = model_meta(self._folder, **settings)

    @functools.cached_property
    def model(self) -> OmniRetriever:
        settings: dict[str, Any] = self.mteb_model_meta.experiment_kwargs
        return OmniRetriever.from_pretrained(self._folder, **settings)

    def encode(
        self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, prompt_type: Any = None, **options: Any
    ) -> np.ndarray:
        """Returns the embeddings (N, D) of a DataLoader's rows. One that cannot be embedded is zeros, and is named in a warning."""
        prompt = PROMPTS.get(getattr(prompt_type, "value", prompt_type) or "") if self.model.prompts else None
        chosen: dict[str, Any] = {"on_error": "nan"} | {name: options[name] for name in OPTIONS if name in options}
        rows = self.model.encode(_items(inputs), prompt_name=prompt, show_progress=options.get("show_progress_bar"), **chosen)
        self.failed += int(np.isnan(rows).any(axis=1).sum())
        return np.nan_to_num(rows)


def model_meta(
    folder: str | os.PathLike[str],
    *,
    preset: str | Preset | dict[str, Any] | None = None,
    dtype: str = "keep",
    weights: str = "keep",
    step: int | None = None,
    **fields: Any,
) -> ModelMeta:
    """Returns mteb's record of a model, with a digest of weights, architecture and tokenizer as its revision; no weights are read for it.

    Args:
      folder, dtype, weights, step: as `OmniRetriever.from_pretrained` takes them, and raises for them.
      preset: None: what mteb's own wrapper of this backbone does.
      fields: of `ModelMeta`, in place of the defaults: name ("organization/model"), license, release_date, ...
    """
    source = open_model(find_model(folder), step, weights)
    chosen = preset_named(mteb_preset(source.config.prompt) if preset is None else preset)
    chosen.check(source.config.prompt)
    made = made_with(source, chosen, dtype=dtype)
    held = json.dumps([made["weights"], made["model"], made["tokenizer"]], sort_keys=True)
    sizes = {path: math.prod(leaf.shape) for path, leaf in abstract_params(source.config).items()}
    others = {name: value for name, value in {"weights": weights, "step": step}.items() if value not in (None, "keep")}
    known = {name: None for name, field in ModelMeta.model_fields.items() if field.is_required()} | {
        "loader": functools.partial(OmniRetrieverEncoder, folder=os.fspath(folder)),
        "name": f"omni_jax/{Path(folder).resolve().name}",
        "revision": hashlib.sha256(held.encode()).hexdigest()[:40],
        "languages": ["eng-Latn"],
        "n_parameters": sum(sizes.values()),
        "n_embedding_parameters": sizes["decoder", "embed", "embedding"],
        "max_tokens": chosen.max_text_tokens,
        "embed_dim": source.config.decoder.hidden_size,
        "framework": ["JAX"],
        "similarity_fn_name": ScoringFunction.COSINE,
        "use_instructions": source.config.prompt == "chat",
        "modalities": list(MODALITIES),
        "experiment_kwargs": {"preset": preset_key(chosen), "dtype": dtype, **others},
    }
    return ModelMeta(**known | fields)


def _items(inputs: Any) -> Iterator[dict[str, Any]]:
    """Yields the rows of a DataLoader as items of `encode`: sound and video as files, which the preset's own decoder reads."""
    dataset, kinds = inputs.dataset, getattr(inputs.dataset, "features", None)
    if kinds is None:  # a list, or a Dataset of torch's: batches of columns
        for batch in inputs:
            columns = {name: batch[name] for name in MODALITIES if name in batch}
            yield from (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        return
    names = [name for name in MODALITIES if name in kinds]
    for name in names:
        if isinstance(kinds[name], datasets.Audio | datasets.Video):
            dataset = dataset.cast_column(name, type(kinds[name])(decode=False))
    for row in dataset.select_columns(names):
        yield {name: value for name, value in row.items() if value is not None and not (name == "text" and not value.strip())}
