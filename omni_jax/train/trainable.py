"""Which parameters train, and the split of a parameter tree into what trains and what stays.

Paths are written with slashes here ("decoder/layers/attn/q/lora_a"), which is what optimizers and checkpoints take as keys.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu.parameter_overview import count_parameters, make_table

from omni_jax.config import ConfigError, ModelConfig
from omni_jax.model import abstract_params, carried_shapes, rounded_maps
from omni_jax.model.int8 import SCALE
from omni_jax.objectives import SCALARS
from omni_jax.types import InputError

Arrays = dict[str, jax.Array]
Path = tuple[str, ...]

HEADS = {"classify_linear": "head/", "beats_ln": "bridge/norm/", "beats_proj": "bridge/fc"}
"""Modules that every recipe trains, by their names in a PEFT adapter, and their paths."""

RECIPES = ("adapter", "all")


@dataclasses.dataclass(frozen=True)
class TrainableConfig:
    """What trains.

    Attributes:
      recipe: "adapter": LoRA, and of the fusion head and the BEATs bridge what the backbone has, as OmniRetriever-7B was trained; "all":
        every parameter.
      freeze: path prefixes that stay as they are all the same ("vision", "decoder/embed").
    """

    recipe: str = "adapter"
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise ConfigError(f"trainable recipe {self.recipe!r}: choose one of {', '.join(RECIPES)}")


def is_lora(path: str) -> bool:
    return path.rpartition("/")[2].startswith("lora_")


def group_of(path: str) -> str:
    """Returns the group a parameter is reported under: "lora", or the first part of its path ("head", "bridge", "vision" ...)."""
    return "lora" if is_lora(path) else path.partition("/")[0]


def select(config: ModelConfig, choice: TrainableConfig) -> frozenset[str]:
    """Returns the paths that train.

    Raises:
      InputError: when LoRA is asked for where there is no linear map, or a head that should train would not, or would be lost on the way
        back to PyTorch.
    """
    paths = ["/".join(path) for path in abstract_params(config)]
    targets = config.lora.targets if config.lora else ()
    known = {*paths, *("/".join(path) for path in carried_shapes(config))}
    if missed := [target for target in targets if f"{target}/lora_a" not in known]:
        maps = [p.removesuffix("/kernel") for p in paths if p.startswith("decoder/layers/") and p.endswith("/kernel")]
        raise InputError(f"lora.targets names {', '.join(missed)}, no linear map of this model; choose among {', '.join(sorted(maps))} ...")
    frozen = [p for p in choice.freeze if not any(_under(path, p) for path in paths)]
    if frozen:
        raise InputError(f"trainable.freeze names {', '.join(frozen)}, which no parameter path starts with")
    kept = [p for p in paths if not p.endswith(f"/{SCALE}") and not any(_under(p, prefix) for prefix in choice.freeze)]
    if choice.recipe == "adapter":
        if not any(map(is_lora, kept)):
            raise InputError("trainable recipe 'adapter' trains LoRA, but no LoRA parameter would train; set lora.rank and lora.targets")
        kept = [p for p in kept if is_lora(p) or p.startswith(tuple(HEADS.values()))]
    for name, place in HEADS.items():
        if not any(p.startswith(place) for p in paths):
            continue  # a backbone without this head
        if any(p.startswith(place) and p not in kept for p in paths):
            raise InputError(f"the head {name} ({place.rstrip('/')}) should train, but would not; take it out of trainable.freeze")
        if choice.recipe == "adapter" and config.lora and name not in config.lora.modules_to_save:
            raise InputError(
                f"the head {name} should train, but lora.modules_to_save does not list it, so an exported adapter would lose it; add it"
            )
    return frozenset(kept)


def over_int8(config: ModelConfig, choice: TrainableConfig) -> ModelConfig:
    """Returns the architecture with every matrix that stays in int8, and those that train as they are.

    Raises:
      InputError: as `select`, or where every matrix trains.
    """
    names = select(config.with_weights("float"), choice)
    made = config.with_weights("int8", tuple(sorted(name.removesuffix("/kernel") for name in names if name.endswith("/kernel"))))
    if not rounded_maps(made):
        raise InputError(f"int8 weights are for what stays, and with trainable.recipe={choice.recipe!r} every matrix trains; freeze some")
    return made


def split(params: Mapping[tuple[str, ...], Any], names: Iterable[str], frozen_dtype: Any = None) -> tuple[Arrays, Arrays]:
    """Returns (trainable, frozen): the first float32 copies, the second as stored, or in `frozen_dtype` (but int8 matrices, their scales).

    Raises:
      ValueError: for a name that is no parameter.
    """
    wanted = set(names)
    flat = {"/".join(path): array for path, array in params.items()}
    if unknown := wanted - flat.keys():
        raise ValueError(f"{len(unknown)} trainable names are no parameters: {', '.join(sorted(unknown)[:5])}")
    # Copies: a training step gives its input buffers away, and the caller's arrays must outlive it.
    trainable = {name: jnp.array(flat[name], jnp.float32, copy=True) for name in sorted(wanted)}
    rounded = {name for name in flat if name.endswith(f"/{SCALE}") or flat[name].dtype == jnp.int8}
    stays = {name: array for name, array in sorted(flat.items()) if name not in wanted}
    return trainable, {name: jnp.asarray(array, None if name in rounded else frozen_dtype) for name, array in stays.items()}


def join(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """Returns the encoder's whole tree, path -> array, as `model.with_params` takes it."""
    scalars = loss_scalars(trainable)
    return {tuple(name.split("/")): array for name, array in {**frozen, **trainable}.items() if name not in scalars}


def loss_scalars(trainable: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the trainable arrays by path that are not the encoder's but the losses'."""
    paths = {scalar.path for scalar in SCALARS.values()}
    return {name: array for name, array in trainable.items() if name in paths}


@dataclasses.dataclass(frozen=True)
class GroupCount:
    """Parameters of one group: values that train and values that stay."""

    group: str
    trainable: int
    frozen: int


def count_groups(config: ModelConfig, names: frozenset[str]) -> tuple[GroupCount, ...]:
    """Returns the start-up report: the counts of each group, in the order of the tree."""
    groups: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for path, leaf in abstract_params(config).items():
        name = "/".join(path)
        groups.setdefault(group_of(name), ({}, {}))[name not in names][name] = leaf
    return tuple(GroupCount(group, *(int(count_parameters(leaves)) for leaves in both)) for group, both in groups.items())


def report(counts: Iterable[GroupCount]) -> str:
    """Returns the counts as a table, a line for each group and one for the total."""
    rows = list(counts)
    return make_table([*rows, GroupCount("total", sum(r.trainable for r in rows), sum(r.frozen for r in rows))])


def _under(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix.rstrip("/") + "/")


def fresh_lora(config: ModelConfig, seed: int, shardings: Mapping[Path, jax.sharding.Sharding] | None = None) -> dict[Path, jax.Array]:
    """Returns path -> float32 array of every LoRA matrix of an architecture: A uniform, B zero, so that a run starts from its base.

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
