"""What runs in Ray's processes for `omni-jax embed`: decoding in tasks, models in actors."""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from omni_jax.config import ModelConfig, Preset
from omni_jax.data.loading import media_name, record_features
from omni_jax.engines.ray_cluster import check_code
from omni_jax.media.workers import Guarded
from omni_jax.tokens.batching import ClipSizes, clip_sizes
from omni_jax.tokens.prompts import tokenized_clip
from omni_jax.tokens.tokenizer import Tokenizer
from omni_jax.types import ClipError, Features, InputError, Record, TokenizedClip

if TYPE_CHECKING:
    from omni_jax.retrieval.embedding_pass import Part

TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}
"""Chips of a host -> the environment by which libtpu uses no others."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """All that a run is, but for its records. `key`: of the run; `stamp`: of the code; `needed`: modalities to decode."""

    key: str
    stamp: str
    model: str
    step: int | None
    dtype: str
    weights: str
    preset: Preset
    tables: tuple[str, ...]
    needed: frozenset[str]
    normalize: bool
    timeout_s: float
    config: ModelConfig
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True)
class Status:
    """What the command must know of a decoded clip. `size`: bytes of its features."""

    sizes: ClipSizes | None = None
    error: ClipError | None = None
    silent: bool = False
    size: int = 0


_held: dict[str, tuple[Setup, Guarded]] = {}  # of this process, for the run it works for


def decode(key: str, box: list[Any], record: Record) -> tuple[Status, TokenizedClip | None]:
    """In a task: returns what is known of a clip, and the clip. The process that can be killed is kept for the next task."""
    if key not in _held:
        import ray

        setup: Setup = ray.get(box[0])
        check_code(setup.stamp)
        function = functools.partial(record_features, preset=setup.preset, modalities=setup.needed)
        _held.clear()
        _held[key] = setup, Guarded(function, setup.timeout_s)
    setup, guarded = _held[key]
    media = setup.needed & record.modalities - {"t"}
    features = (guarded.outcome if media else guarded.unguarded)(record, media_name(record))
    if isinstance(features, ClipError):
        return Status(error=features), None
    clip = tokenized_clip(features, setup.tables, setup.tokenizer, setup.config, setup.preset)
    if isinstance(clip, ClipError):
        return Status(error=clip), None
    sizes = clip_sizes(clip, setup.config, setup.config.shares_prefix)
    return Status(sizes, None, features.silent, _bytes(features)), clip


def _bytes(features: Features) -> int:
    vision = 0 if features.vision is None else features.vision.patches.nbytes
    return vision + sum(s.log_mel.nbytes + s.fbank.nbytes for s in features.audio or ())


class Model:
    """In an actor: one model. Two calls may run at once, so that a group is prepared while the devices work on the one before it."""

    def __init__(self, box: list[Any]):
        self._box, self._lock = box, threading.Lock()

    def ready(self) -> int:
        """Loads the model and returns what the rows of its batches are a multiple of. Raises InputError where it cannot be loaded."""
        import ray

        self._setup: Setup = ray.get(self._box[0])
        check_code(self._setup.stamp)
        leave_the_slice(os.environ, ray.get_runtime_context().get_accelerator_ids().get("TPU", []))
        from omni_jax.api import OmniRetriever

        setup = self._setup
        try:
            chosen = {"dtype": setup.dtype, "weights": setup.weights, "preset": setup.preset, "step": setup.step}
            self._model = OmniRetriever.from_pretrained(setup.model, **chosen)
        except InputError as error:
            raise InputError(f"{error} (on node {ray.util.get_node_ip_address()}; all nodes that embed must see the model)") from None
        return self._model.row_multiple

    def embed(self, shapes: Mapping[str, list[tuple[int, ...]]], *clips: TokenizedClip) -> Part:
        """Returns the part of a group of clips. `shapes`: what the planner knew before it."""
        with self._lock:
            finish = self._model.start_group(clips, self._setup.tables, shapes, normalize=self._setup.normalize)
        return finish()


def leave_the_slice(environment: Any, chips: list[str]) -> None:
    """Makes libtpu take the chips of this host for all there are, where the host is one of several of a slice: each has a whole model."""
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") and len(chips) in TPU_BOUNDS:
        environment |= {
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
            "TPU_PROCESS_BOUNDS": "1,1,1",
            "TPU_CHIPS_PER_PROCESS_BOUNDS": TPU_BOUNDS[len(chips)],
        }
