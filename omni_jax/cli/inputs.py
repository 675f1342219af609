"""What commands over embedding files read: tables in every form, and results written before."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from etils import epath

from omni_jax.config.made_with import ROUNDING
from omni_jax.io.messages import as_input_error
from omni_jax.retrieval.embedding_file import Choose, check_alike, missing_parts
from omni_jax.retrieval.inputs import captions_left_out, read_inputs, with_captions
from omni_jax.types import EmbeddingTable, InputError


def read_tables(names: Sequence[str], choose: Choose | None = None, *, incomplete: bool = False) -> EmbeddingTable:
    """Returns the tables of all files together, or the one that `choose` picks; what is doubtful about them goes to stderr.

    Args:
      incomplete: takes some parts of a set without the others, and says so.

    Raises:
      InputError: for files that cannot be read or do not belong together.
    """
    found = read_inputs(names, choose)
    if lacking := missing_parts(names[0].partition("=")[2] or names[0], found):
        if not incomplete:
            raise InputError(lacking)
        print(lacking, file=sys.stderr)
    return found


def read_captioned(
    names: Sequence[str], captions: str | None, *, incomplete: bool = False
) -> tuple[EmbeddingTable, dict[str, list[str]] | None, dict[str, list[str]]]:
    """Returns tables, the relevance of their rows where captions have rows of their own, and the captions and clips left out then.

    The `ids` are those of the clips.
    """
    found = read_tables(names, incomplete=incomplete)
    if captions is None:
        return found, None, {}
    texts = read_tables([captions], incomplete=incomplete)
    check_alike(captions, texts.made_with, names[0], found.made_with, (*ROUNDING, "preset", "normalize"))
    tables, relevance = with_captions(found, texts)
    own = {name: ids for name, ids in found.own.items() if name != "text"}
    return dataclasses.replace(found, tables=tables, own=own), relevance, captions_left_out(found, texts)


def read_result(path: str) -> dict[str, Any]:
    """Returns a result that `omni-jax eval --json` wrote. Raises InputError for a file of another kind."""
    other = as_input_error(f"{path}: not JSON", "give a result that `omni-jax eval --json` wrote", ValueError, RecursionError)
    with as_input_error(f"{path}: cannot be read"), other:
        result = json.loads(epath.Path(path).read_text())
    try:
        cells = [float(metrics["R@1"]) for metrics in result["directions"].values()]
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise InputError(f"{path}: not a result of `omni-jax eval --json` (no directions with R@1)") from e
    if not cells:
        raise InputError(f"{path}: holds no directions")
    return result
