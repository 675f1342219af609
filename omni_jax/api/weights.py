"""The weights of a model, from a folder that `convert to-jax` wrote or from the workdir of a training run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from omni_jax import conversion
from omni_jax.config import ConfigError, ModelConfig, Preset, default_preset
from omni_jax.config.hub_name import is_hub_name
from omni_jax.conversion.cached import converted
from omni_jax.conversion.folder import MANIFEST, Manifest, read_manifest
from omni_jax.tokens.tokenizer import tokenizer_digest
from omni_jax.train.workdir import TOKENIZER_FILES, is_workdir, read_config, read_workdir, run_of
from omni_jax.types import InputError

Params = dict[tuple[str, ...], jax.Array]


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model on disk.

    Attributes:
      folder: the converted folder: base weights, tokenizer, side files.
      config: the architecture, LoRA included.
      trained: path -> float32 array of what a run trained; empty for a converted folder.
      step: updates of that run; None likewise.
      digests: of the base and the adapter of the folder, as `base_digests` gives them.
    """

    folder: epath.Path
    config: ModelConfig
    trained: Mapping[str, np.ndarray]
    step: int | None
    digests: Mapping[str, str | None]


WEIGHTS = ("keep", "int8", "int8-dynamic")
"""How the matrices of a model may be asked for: as the folder or the run has them, or rounded (`ModelConfig.weights`)."""


def open_model(directory: str | os.PathLike[str], step: int | None = None, weights: str = "keep") -> ModelSource:
    """Returns the model of a converted folder, or of a workdir at its newest checkpoint or the one after `step` updates.

    Args:
      weights: of WEIGHTS.

    Raises:
      InputError: when it is neither, or the base weights are no longer those of the run.
      ConfigError: for unknown `weights`.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"weights={weights!r}: choose one of {', '.join(WEIGHTS)}")
    source = _as_stored(directory, step)
    return source if weights == "keep" else dataclasses.replace(source, config=source.config.with_weights(weights))


def _as_stored(directory: str | os.PathLike[str], step: int | None) -> ModelSource:
    folder = epath.Path(directory)
    if not is_workdir(folder):
        if step is not None:
            raise InputError(f"{folder}: a step was asked for, but this is not the workdir of a training run")
        manifest = read_manifest(folder)
        return ModelSource(folder, manifest.model, {}, None, base_digests(manifest))
    run = read_workdir(folder, step)
    manifest = read_manifest(run.base)
    digests = base_digests(manifest)
    if any(run.digests.get(name) != digest for name, digest in digests.items()):
        raise InputError(f"{run.base}: holds other weights than those {folder} was trained from; put the right ones back")
    if run.digests.get(TOKENIZER_FILES, tokenizer_digest(run.base)) != tokenizer_digest(run.base):
        raise InputError(f"{run.base}: holds another tokenizer than {folder} was trained with; put the right files back")
    return ModelSource(run.base, run.model, run.trainable, run.step, digests)


def find_model(
    name: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    adapter_revision: str | None = None,
    token: str | bool | None = None,
) -> epath.Path:
    """Returns the folder that `open_model` reads of a model that people name; nothing is fetched for a folder that is there.

    Args:
      name: a converted folder, a workdir, a checkpoint's folder of torch's layout, or its name on the Hub; the latter two are converted
        once into the cache (`omni_jax.conversion.cached`).
      adapter: a PEFT adapter's folder or its name on the Hub, for the latter two.

    Raises:
      InputError: for what is not there, cannot be fetched or converted, and an adapter or a revision for what has its own.
    """
    folder = epath.Path(name)
    ready = is_workdir(folder) or (folder / MANIFEST).exists()
    published = is_hub_name(name) or (not ready and (folder / "config.json").exists()) or adapter is not None
    if not published or ready:
        if adapter is not None or revision is not None:
            what = "an adapter" if adapter is not None else f"a revision ({revision})"
            raise InputError(f"{name}: is no checkpoint of torch's layout and no name on the Hub, so that {what} cannot be chosen; omit it")
        return folder
    return epath.Path(converted(name, adapter, revision=revision, adapter_revision=adapter_revision, token=token))


def prompt_kind(directory: str | os.PathLike[str]) -> str:
    """Returns `ModelConfig.prompt` of a converted folder or a workdir, reading no weights.

    Raises:
      InputError: when it is neither.
    """
    run = read_config(directory) if is_workdir(directory) else None
    return (run.model if run is not None else read_manifest(directory).model).prompt


def own_preset(directory: str | os.PathLike[str]) -> Preset:
    """Returns the preset that a model was trained with: of a workdir the run's own, of a converted folder the backbone's.

    Raises:
      InputError: when it is neither.
      ConfigError: when a run's config is not known to this version.
    """
    run = read_config(directory) if is_workdir(directory) else None
    return run_of(run).data.resolved_preset() if run is not None else default_preset(read_manifest(directory).model.prompt)


def base_digests(manifest: Manifest) -> dict[str, str | None]:
    """Returns the digests of a converted folder by what they are of, as a run's `config.json` keeps them."""
    return {"base weights": manifest.base_digest, "adapter weights": manifest.adapter_digest}


def load_params(source: ModelSource, dtype: Any = None, mesh: Mesh | None = None) -> Params:
    """Returns every parameter on the devices, in `dtype` or as the base stores it, what was trained in place of what the base holds.

    Matrices are rounded as `source.config` says, those that were trained too.
    """
    from omni_jax.model import param_shardings, rounded_maps  # with flax, slow: not before there is a model
    from omni_jax.model.int8 import SCALE, rounded

    config = source.config
    shardings = param_shardings(config, mesh) if mesh is not None else {}
    _, params = conversion.load(source.folder, dtype=dtype, weights=config.weights, kept=config.kept, shardings=shardings)
    kinds = {path: x.dtype for path, x in params.items()}
    maps = rounded_maps(config)
    for name, array in source.trained.items():
        path = tuple(name.split("/"))
        if path[-1] == "kernel" and path[:-1] in maps:
            for at, part in zip((path, (*path[:-1], SCALE)), rounded(array), strict=True):
                params[at] = _place(part, shardings.get(at))
            continue
        # LoRA that the run added has no place in the base: it takes the type of the weights that it stands beside.
        kind = kinds.get(path) or _beside(kinds, path)
        params[path] = _place(array.astype(kind), shardings.get(path))
    return params


def compute_type(params: Params) -> jnp.dtype:
    """Returns the type that a model computes in whose weights were kept as they are stored."""
    return _beside({path: x.dtype for path, x in params.items()}, ("decoder", "layers", "attn", "q", "kernel"))


def _beside(kinds: Mapping[tuple[str, ...], jnp.dtype], path: tuple[str, ...]) -> jnp.dtype:
    """Returns the type of a linear map's kernel, or where that is int8 the one of what is not rounded."""
    kind = kinds[(*path[:-1], "kernel")]
    return kinds["decoder", "embed", "embedding"] if kind == jnp.int8 else kind


def _place(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
