"""A model as sentence-transformers takes it: the one module of a `SentenceTransformer`, which hands every batch to `OmniRetriever.encode`.

`convert to-jax` and `OmniRetriever.save` name this class in `modules.json`. Of other people's code this module needs sentence-transformers
6 (extra `sentence-transformers`), which brings torch; torch holds the vectors that are handed back and computes nothing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from sentence_transformers.base.modality import is_audio_url_or_path, is_image_url_or_path, is_video_url_or_path
from sentence_transformers.base.modules import InputModule

from omni_jax.api.retriever import OmniRetriever
from omni_jax.types import ArgumentError

KINDS = {"image": is_image_url_or_path, "video": is_video_url_or_path, "audio": is_audio_url_or_path}
"""Modality -> whether sentence-transformers takes a string for the name of such a file."""


class OmniRetrieverModule(InputModule):
    """`SentenceTransformer(modules=[OmniRetrieverModule("omni7b")])`: all of a model in one module.

    Attributes:
      model: what embeds.
    """

    forward_kwargs: ClassVar[set[str]] = {"workers"}
    save_in_root = True

    def __init__(self, model: OmniRetriever | str | os.PathLike[str], **settings: Any) -> None:
        """Takes a loaded model, or what `OmniRetriever.from_pretrained` takes."""
        super().__init__()
        self.model = model if isinstance(model, OmniRetriever) else OmniRetriever.from_pretrained(model, **settings)

    @classmethod
    def load(  # type: ignore[override]  # fewer of sentence-transformers' names are of use here, and the others are taken all the same
        cls,
        model_name_or_path: str,
        *,
        token: bool | str | None = None,
        revision: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        **others: Any,
    ) -> OmniRetrieverModule:
        """Returns the module of a folder or a name on the Hub. `model_kwargs`: more for `from_pretrained` (dtype, weights, preset)."""
        return cls(model_name_or_path, token=token, revision=revision, **model_kwargs or {})

    @property
    def modalities(self) -> list[Any]:
        """Single modalities, and the pairs and triples that one item may have."""
        return [
            *self.model.modalities,
            ("image", "text"),
            ("text", "video"),
            ("audio", "text"),
            ("audio", "video"),
            ("audio", "text", "video"),
        ]

    def get_embedding_dimension(self) -> int:
        """D, the width of an embedding."""
        return self.model.dim

    def get_config_dict(self) -> dict[str, Any]:
        return {"model": repr(self.model)}

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **options: Any) -> dict[str, Any]:
        """Returns the items as they are, strings that name media as paths; `encode` decodes and tokenises.

        Raises:
          ArgumentError: for a prompt that is not one of the model's, and options of torch processors.
        """
        names = {text: name for name, text in self.model.prompts.items()}
        if prompt and prompt not in names:
            known = ", ".join(map(repr, names)) or "none"
            raise ArgumentError(f"prompt {prompt!r}: the prompts are those of the training ({known}); omit it")
        if options.get("processing_kwargs"):
            raise ArgumentError("processing_kwargs: media become tokens as a preset says; choose one by model_kwargs={'preset': ...}")
        return {"items": [_item(value) for value in inputs], "prompt_name": names.get(prompt or "")}

    def forward(self, features: dict[str, Any], workers: int | None = None) -> dict[str, Any]:
        """Returns `features` with `sentence_embedding` (N, D) float32, rows of length 1."""
        items = features["items"]
        rows = self.model.encode(items, prompt_name=features["prompt_name"], batch_size=len(items), show_progress=False, workers=workers)
        return features | {"sentence_embedding": torch.from_numpy(rows)}

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **others: Any) -> None:
        """Writes the model's folder beside what `SentenceTransformer.save` writes there itself."""
        target = Path(output_path)
        with tempfile.TemporaryDirectory(prefix=".omni_jax-", dir=target) as place:
            self.model.save(Path(place) / "model")
            for path in (Path(place) / "model").iterdir():
                if not (target / path.name).exists():
                    path.rename(target / path.name)

    def __getstate__(self) -> Any:
        raise ArgumentError(
            "sentence-transformers' pools copy a model to other processes; leave pool and lists of devices out: jax uses all"
        )


def _item(value: Any) -> Any:
    """A string names a file here where sentence-transformers says so, and is a caption otherwise."""
    if isinstance(value, str):
        for kind, named in KINDS.items():
            if named(value):
                if not os.path.isfile(value):
                    raise ArgumentError(f"{value[:80]!r}: addresses are not followed; fetch the file, and give its path")
                return {kind: value}
    return value
