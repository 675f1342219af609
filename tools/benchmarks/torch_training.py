"""The torch side of the training benchmark: the thinker with a PEFT adapter, run as the release runs it (SPEC section 6).

Six forwards a step, each of its own: the tuple, its augmented copy, the hard negative without gradient, and text, audio and video alone,
though one of them is not active. Negatives are those of the micro-batch. Towers run once for the clips and once for the augmented copies.

Letters: B clips, D decoder width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from omni_jax.config import ModelConfig
from omni_jax.objectives import active_hard_negative, active_pairs, active_students
from omni_jax.types import Features, TokenSequence
from tools.benchmarks.thinker import MediaTokens, Thinker

Prompts = Sequence[Mapping[str, TokenSequence]]


class Adapted(Thinker):
    """The thinker with an adapter that PEFT loaded; LoRA, the fusion head and the bridge train."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, np.ndarray], adapter: Path):
        super().__init__(config, weights)

        class Root(nn.Module):
            """The modules that an adapter touches, under their names in a checkpoint."""

            def prepare_inputs_for_generation(self, *_: object) -> None:
                raise AssertionError("PEFT looks for it in a causal language model; nothing is generated here")

        root = Root()
        root.model, root.classify_linear = self.text, self.head
        root.beats_ln, root.beats_proj = self.bridge.beats_ln, self.bridge.beats_proj
        for module in (self.vision, self.audio, self.bridge.beats):
            module.requires_grad_(False)
        PeftModel.from_pretrained(root, str(adapter), is_trainable=True)
        # PEFT puts wrappers around the modules that it saves whole.
        self.head, self.bridge.beats_ln, self.bridge.beats_proj = root.classify_linear, root.beats_ln, root.beats_proj
        self.trained = [p for p in root.parameters() if p.requires_grad]


class Trainer:
    """Runs steps of the release's kind."""

    def __init__(self, model: Adapted, temperature: float, learning_rate: float):
        self.model, self.temperature = model, temperature
        self.optimizer = torch.optim.AdamW(model.trained, lr=learning_rate, weight_decay=0.01)

    def update(self, step: int, clips: Sequence[Features], copies: Sequence[Features], prompts: Prompts, shuffle: np.ndarray) -> float:
        """Returns the loss, after a step; `prompts` are by clip as in `types.Example`."""
        loss = self.loss(step, clips, copies, prompts, shuffle)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def loss(self, step: int, clips: Sequence[Features], copies: Sequence[Features], prompts: Prompts, shuffle: np.ndarray) -> Tensor:
        """Returns the sum of the three losses of a step."""
        z = self.embeddings(step, clips, copies, prompts, shuffle)
        contrast = self._info_nce(z["anchor"], z["positive"], z["hard"])
        taught = [self._info_nce(z["anchor"].detach(), z[name]) for name in active_students(step)]
        pairs = [self._info_nce(z[x], z[y]) for x, y in active_pairs(step)]
        return contrast + sum(taught) / len(taught) + sum(pairs) / len(pairs)

    def embeddings(
        self, step: int, clips: Sequence[Features], copies: Sequence[Features], prompts: Prompts, shuffle: np.ndarray
    ) -> dict[str, Tensor]:
        """Returns the six embeddings (B, D) of a step."""
        media, augmented = self.model.media_tokens(clips), self.model.media_tokens(copies)
        kind = active_hard_negative(step)
        swapped = [
            (media[other if kind == "video" else own][0], media[other if kind == "audio" else own][1])
            for own, other in enumerate(shuffle.tolist())
        ]
        z = {"anchor": self._embed("anchor", prompts, media), "positive": self._embed("positive", prompts, augmented)}
        with torch.no_grad():
            z["hard"] = self._embed("hard", prompts, swapped)
        return z | {name: self._embed(name, prompts, media) for name in ("text", "audio", "video")}

    def _embed(self, name: str, prompts: Prompts, media: Sequence[MediaTokens]) -> Tensor:
        states = self.model.last_states([p[name] for p in prompts], media)
        return states[-1] if name == "text" else self.model.head(torch.cat(states, dim=-1))

    def _info_nce(self, a: Tensor, b: Tensor, hard: Tensor | None = None) -> Tensor:
        a, b = normalize(a, dim=-1), normalize(b, dim=-1)
        own = torch.arange(len(a))
        extra: list[Any] = [] if hard is None else [normalize(hard, dim=-1)]
        return sum(cross_entropy(x @ torch.cat([y, *extra]).T / self.temperature, own) for x, y in ((a, b), (b, a))) / 2
