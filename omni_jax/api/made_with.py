"""What a vector depends on besides its clip and caption: the one place that says it. `omni_jax.config.made_with` compares."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from omni_jax.api.weights import ModelSource, base_digests
from omni_jax.config import Preset
from omni_jax.data.loading import media_stat
from omni_jax.types import FilePart, Record


def made_with(
    source: ModelSource, preset: Preset, *, dtype: str = "keep", normalize: bool = True, recorded: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns all that embeddings by a model depend on, ready for JSON: where all is equal, vectors are, but for rounding between machines.

    {"weights": digests of the base, the adapter and what a run trained, "model": the architecture with its scales and constants,
    "tokenizer": digest of its files, "preset", "normalize", "dtype", "precision": of products, as jax is set, "code": version}

    Args:
      source: the model on disk.
      dtype: "keep", "bfloat16" or "float32", of the weights in memory and the computation.
      normalize: whether rows are scaled to length 1.
      recorded: such a record to compare with, perhaps of an earlier version.
    """
    weights = (recorded or {}).get("weights")
    before = weights.get("trained") if isinstance(weights, Mapping) else None
    return {
        "weights": {**base_digests(source.manifest), "trained": source.trained_digest(before)},
        "model": source.config.to_json(),
        "tokenizer": source.tokenizer.digest,
        "preset": dataclasses.asdict(preset),
        "normalize": normalize,
        "dtype": dtype,
        "precision": jax.config.jax_default_matmul_precision or "default",  # type: ignore[attr-defined]
        "code": _version(),
    }


def _version() -> str:
    try:
        return importlib.metadata.version("omni-jax")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def media_digest(records: Iterable[Record], *, times: bool = True) -> str:
    """Returns a digest of the sizes of all media files of some records and, with `times`, of when they were changed last.

    Paths are not in it: files may move. A file that is missing has a place, so that one that appears later is noticed.
    """
    digest = hashlib.blake2b(digest_size=16)
    for record in records:
        for path in (record.video, record.audio):
            part, found = path if isinstance(path, FilePart) else None, media_stat(path)
            known: Any = (found.st_size, found.st_mtime_ns if times else 0) if found is not None else None
            if part and known:  # another part of one file
                known = (*known, part.name, part.start, part.size, part.column, part.group, part.row)
            digest.update(f"{record.id} {known}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()
