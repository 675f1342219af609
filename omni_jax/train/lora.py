"""LoRA matrices as PEFT starts them: A uniform, B zero, so that the first step starts from the base model."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.config import ModelConfig
from omni_jax.model import abstract_params
from omni_jax.train.trainable import is_lora

Path = tuple[str, ...]


def fresh_lora(config: ModelConfig, seed: int, shardings: Mapping[Path, jax.sharding.Sharding] | None = None) -> dict[Path, jax.Array]:
    """Returns path -> float32 array of every LoRA matrix of an architecture.

    Source: PEFT `LoraLayer.reset_lora_parameters`: A is Kaiming-uniform with a = sqrt(5), that is, uniform within 1 / sqrt(inputs).
    """
    made: dict[Path, jax.Array] = {}
    for path, leaf in abstract_params(config).items():
        name = "/".join(path)
        if not is_lora(name):
            continue
        array = np.zeros(leaf.shape, np.float32)
        if path[-1] == "lora_a":
            bound = 1 / math.sqrt(leaf.shape[-2])
            array = np.random.default_rng([zlib.crc32(name.encode()), seed]).uniform(-bound, bound, leaf.shape).astype(np.float32)
        place = (shardings or {}).get(path)
        made[path] = jnp.asarray(array) if place is None else jax.make_array_from_callback(array.shape, place, array.__getitem__)
    return made
