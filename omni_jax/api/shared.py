"""What the training runs of one process share: compiled programs, and features of clips that all fit in memory.

A small run compiles for longer than it trains. Runs of one recipe, which differ in their seeds and clips alone, need one set of programs.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from jax.sharding import Mesh

from omni_jax.api.retriever import OmniRetriever
from omni_jax.config import ModelConfig, Preset
from omni_jax.model import abstract_encoder, with_params
from omni_jax.tokens.tokenizer import Tokenizer
from omni_jax.train import StepConfig, TrainStep
from omni_jax.types import Clip, Features


class Shared:
    """Steps, encoders and features by what they depend on; hand one to every `run_training` of a process."""

    def __init__(self, keep_features: bool = False) -> None:
        """Takes whether clips' features are kept, which their memory must allow."""
        self._keep_features = keep_features
        self._steps: dict[str, TrainStep] = {}
        self._retrievers: dict[str, OmniRetriever] = {}
        self._features: dict[str, dict[int, tuple[Clip, Features]]] = {}

    def step(self, model: ModelConfig, config: StepConfig, dtype: Any, mesh: Mesh | None) -> TrainStep:
        """Returns a step of this recipe, whose programs are those of an earlier run where its seed and its control tokens alone differ."""
        key = repr((_without_tokens(model), dataclasses.replace(config, seed=0), str(dtype), mesh))
        if key not in self._steps:
            self._steps[key] = TrainStep(model, config, dtype=dtype, mesh=mesh)
        step = copy.copy(self._steps[key])
        step.config = config  # the first state alone depends on its seed
        return step

    def retriever(
        self, model: ModelConfig, params: dict[tuple[str, ...], Any], tokenizer: Tokenizer, preset: Preset, dtype: Any, mesh: Mesh | None
    ) -> OmniRetriever:
        """Returns a model with these parameters; one that an earlier run got takes them, too."""
        key = repr((_without_tokens(model), str(dtype), mesh))
        if key not in self._retrievers:
            self._retrievers[key] = OmniRetriever(with_params(abstract_encoder(model, dtype=dtype), params), tokenizer, preset, mesh)
            return self._retrievers[key]
        return self._retrievers[key].with_weights(params, model, tokenizer, preset)

    def features(self, clips: str, preset: Preset) -> dict[int, tuple[Clip, Features]] | None:
        """Returns what is kept of the clips of a folder, for `TrainPipeline`, None for nothing; `clips` is a digest of them."""
        return None if not self._keep_features else self._features.setdefault(repr((clips, preset)), {})


def _without_tokens(model: ModelConfig) -> ModelConfig:
    """The architecture: no program depends on the ids of control tokens, which follow from the captions of fresh weights."""
    return dataclasses.replace(model, tokens=dataclasses.replace(model.tokens, **{f.name: 0 for f in dataclasses.fields(model.tokens)}))
