"""What commands over embedding files read: tables in every form, and results written before."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from conversion.torch_pickle import read_torch_file
from omni_jax.retrieval.inputs import read_inputs, with_captions
from omni_jax.types import EmbeddingTable, InputError


def read_tables(names: Sequence[str], captions: str | None = None) -> tuple[EmbeddingTable, dict[str, list[str]] | None]:
    """Returns tables, and the relevance of their rows where captions stand apart from their clips (then `ids` are those of the clips)."""
    found = read_inputs(names, read_torch_file)
    if captions is None:
        return found, {name: list(found.ids_of(name)) for name in found.tables} if found.own else None
    tables, relevance = with_captions(found, read_inputs([captions], read_torch_file))
    return EmbeddingTable(found.ids, tables, own=found.own), relevance


def read_result(path: str) -> dict[str, Any]:
    """Returns a result that `omni-jax eval --json` wrote.

    Raises:
      InputError: for a file of another kind.
    """
    try:
        result = json.loads(epath.Path(path).read_text())
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: not JSON ({e}); give a result that `omni-jax eval --json` wrote") from e
    try:
        cells = [float(metrics["R@1"]) for metrics in result["directions"].values()]
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise InputError(f"{path}: not a result of `omni-jax eval --json` (no directions with R@1)") from e
    if not cells:
        raise InputError(f"{path}: holds no directions")
    return result
