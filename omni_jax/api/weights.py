"""The weights of a model, from a folder that `convert to-jax` wrote or from the workdir of a training run."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
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
from omni_jax.io.remote import reaching
from omni_jax.tokens.tokenizer import Tokenizer
from omni_jax.train.workdir import TOKENIZER_FILES, WorkdirConfig, is_workdir, read_trained, read_workdir, run_of, trained_fingerprints
from omni_jax.types import InputError

Params = dict[tuple[str, ...], jax.Array]

FINGERPRINTS = "fingerprints:"
"""How a digest of trained weights begins that was made from a checkpoint's fingerprints; without it, from the weights."""


WEIGHTS = ("keep", "int8", "int8-dynamic")
"""How the matrices of a model may be asked for: as the folder or the run has them, or rounded (`ModelConfig.weights`)."""


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model on disk, opened once and passed on: what it is, and its parts when they are asked for.

    Attributes:
      home: the folder that was opened: a converted folder, or the workdir of a run.
      folder: the converted folder: base weights, tokenizer, side files.
      manifest: what that folder says of itself.
      config: the architecture, LoRA included.
      run: what the run of a workdir was started with; None for a converted folder.
      step: steps of that run; None likewise.
    """

    home: epath.Path
    folder: epath.Path
    manifest: Manifest
    config: ModelConfig
    run: WorkdirConfig | None = None
    step: int | None = None

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises InputError for one that cannot be read, or is another model's."""
        tokenizer = Tokenizer.from_pretrained(self.folder)
        tokenizer.check(self.config.tokens)
        return tokenizer

    @functools.cached_property
    def preset(self) -> Preset:
        """The one that the model was trained with: of a workdir the run's own, of a converted folder the backbone's.

        Raises ConfigError when a run's config is not known to this version.
        """
        return default_preset(self.config.prompt) if self.run is None else run_of(self.run).data.resolved_preset()

    def read_trained(self) -> dict[str, np.ndarray]:
        """Returns path -> float32 array of what a run trained, read from its checkpoint; empty for a converted folder."""
        return {} if self.step is None else read_trained(self.home, self.step)

    def to_torch(self, base_model: str | None = None, **outputs: Any) -> conversion.Summary:
        """Writes PyTorch folders, as `conversion.to_torch` and `write_trained` do, whose `outputs` these are.

        Args:
          base_model: `base_model_name_or_path` of an adapter that was trained here.
        """
        if self.step is None:
            return conversion.to_torch(self.folder, **outputs)
        trained = {tuple(name.split("/")): array for name, array in self.read_trained().items()}
        return conversion.write_trained(self.folder, self.config, trained, base_model=base_model, **outputs)

    def trained_digest(self, recorded: str | None = None) -> str | None:
        """Returns a digest of what `read_trained` gives; None where that is empty.

        It is made from the fingerprints that the checkpoint keeps of its values, which loading compares with them; the weights are read
        only for a checkpoint that keeps none, or to compare with a digest that an earlier version recorded.

        Args:
          recorded: the digest to compare with.
        """
        if self.step is None:
            return None
        known = trained_fingerprints(self.home, self.step)
        if known is None or (recorded is not None and not str(recorded).startswith(FINGERPRINTS)):
            return arrays_digest(self.read_trained())
        text = "".join(f"{name} {digits}\n" for name, digits in sorted(known.items()))
        return FINGERPRINTS + hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def open_model(directory: str | os.PathLike[str], step: int | None = None, weights: str = "keep") -> ModelSource:
    """Returns the model of a converted folder, or of a workdir at its newest checkpoint or the one after `step` steps.

    Args:
      weights: of WEIGHTS.

    Raises:
      InputError: when it is neither, or the base weights are no longer those of the run.
      ConfigError: for unknown `weights`.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"weights={weights!r}: choose one of {', '.join(WEIGHTS)}")
    source = _as_stored(epath.Path(directory), step)
    return source if weights == "keep" else dataclasses.replace(source, config=source.config.with_weights(weights))


def _as_stored(home: epath.Path, step: int | None) -> ModelSource:
    if not is_workdir(home):
        if step is not None:
            raise InputError(f"{home}: a step was asked for, but this is not the workdir of a training run")
        manifest = read_manifest(home)
        return ModelSource(home, home, manifest, manifest.model)
    run, base, step = read_workdir(home, step)
    source = ModelSource(home, base, read_manifest(base), run.model, run, step)
    if any(run.digests.get(name) != digest for name, digest in base_digests(source.manifest).items()):
        raise InputError(f"{base}: holds other weights than those {home} was trained from; put the right ones back")
    if TOKENIZER_FILES in run.digests and run.digests[TOKENIZER_FILES] != source.tokenizer.digest:
        raise InputError(f"{base}: holds another tokenizer than {home} was trained with; put the right files back")
    return source


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
    with reaching(name):
        ready = is_workdir(folder) or (folder / MANIFEST).exists()
        published = is_hub_name(name) or (not ready and (folder / "config.json").exists()) or adapter is not None
    if not published or ready:
        if adapter is not None or revision is not None:
            what = "an adapter" if adapter is not None else f"a revision ({revision})"
            raise InputError(f"{name}: is neither a PyTorch checkpoint nor a name on the Hub, so {what} cannot be chosen; omit it")
        return folder
    return epath.Path(converted(name, adapter, revision=revision, adapter_revision=adapter_revision, token=token))


def base_digests(manifest: Manifest) -> dict[str, str | None]:
    """Returns the digests of a converted folder by what they are of, as a run's `config.json` keeps them."""
    return {"base weights": manifest.base_digest, "adapter weights": manifest.adapter_digest}


def load_params(source: ModelSource, dtype: Any = None, mesh: Mesh | None = None) -> Params:
    """Returns every parameter on the devices, in `dtype` or as the base stores it, what was trained in place of what the base holds.

    Matrices are rounded as `source.config` says, those that were trained too.
    """
    from omni_jax.conversion.loader import place
    from omni_jax.model import param_shardings, rounded_maps  # with flax, slow: not before there is a model
    from omni_jax.model.int8 import SCALE, rounded

    config = source.config
    shardings = param_shardings(config, mesh) if mesh is not None else {}
    _, params = conversion.load(
        source.folder, manifest=source.manifest, dtype=dtype, weights=config.weights, kept=config.kept, shardings=shardings
    )
    kinds = {path: x.dtype for path, x in params.items()}
    maps = rounded_maps(config)
    for name, array in source.read_trained().items():
        path = tuple(name.split("/"))
        if path[-1] == "kernel" and path[:-1] in maps:
            for at, part in zip((path, (*path[:-1], SCALE)), rounded(array), strict=True):
                params[at] = place(part, shardings.get(at))
            continue
        # LoRA that the run added has no place in the base: it takes the type of the weights that it is added to.
        kind = kinds.get(path) or _beside(kinds, path)
        params[path] = place(array.astype(kind), shardings.get(path))
    return params


def arrays_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Returns a digest of named arrays: names, types, shapes and values."""

    def one(name: str) -> bytes:
        array = np.ascontiguousarray(arrays[name])
        digest = hashlib.blake2b(f"{name} {array.dtype} {array.shape}".encode(), digest_size=16)
        digest.update(array.reshape(-1).view(np.uint8).data)
        return digest.digest()

    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing lets other threads run
        return hashlib.blake2b(b"".join(pool.map(one, sorted(arrays))), digest_size=16).hexdigest()


def compute_type(params: Params) -> jnp.dtype:
    """Returns the type that a model computes in whose weights were kept as they are stored."""
    return _beside({path: x.dtype for path, x in params.items()}, ("decoder", "layers", "attn", "q", "kernel"))


def _beside(kinds: Mapping[tuple[str, ...], jnp.dtype], path: tuple[str, ...]) -> jnp.dtype:
    """Returns the type of a linear map's kernel, or where that is int8 the one of what is not rounded."""
    kind = kinds[(*path[:-1], "kernel")]
    return kinds["decoder", "embed", "embedding"] if kind == jnp.int8 else kind
