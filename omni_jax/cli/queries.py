"""What `omni-jax search` asks: one query of its arguments, or many of a file."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_jax.config import TABLE_MODALITIES
from omni_jax.io.messages import as_input_error, lines_of_text
from omni_jax.types import InputError

FIELDS = {"text": ("text",), "audio": ("audio",), "video": ("video",), "av": ("video", "audio")}
"""Option -> the fields of an item of `encode` that its value fills."""


@dataclasses.dataclass(frozen=True)
class Queries:
    """Queries in their order.

    Attributes:
      kind: the table that they are rows of; None where they are of several.
      names: what each is called in what is printed.
      items: each as an item of `encode`.
      problems: lines of the file that are no queries.
    """

    kind: str | None
    names: tuple[str, ...]
    items: tuple[Mapping[str, Any], ...]
    problems: int = 0


_MANIFESTS = (".jsonl", ".json", ".csv", ".tsv", ".tab", ".parquet", ".tar")
"""How a file of queries is called that is no text of one caption a line."""


def read_queries(args: argparse.Namespace) -> Queries:
    """Returns the queries that --text, --audio, --video, --av or --queries gives; says which lines of a file are none.

    Raises:
      InputError: for an empty text, or a file that cannot be read or has no queries.
    """
    if args.queries is not None:
        return _of_file(args.queries, args.media_root)
    kind = next(name for name in FIELDS if getattr(args, name) is not None)
    given = getattr(args, kind)
    if kind == "text" and not given.strip():
        raise InputError("--text: is empty; say what to search for")
    return Queries(kind, (given,), (dict.fromkeys(FIELDS[kind], given),))


def _of_file(file: str, media_root: str | None) -> Queries:
    problems: Sequence[Any] = ()
    if file.lower().endswith(_MANIFESTS):
        from omni_jax.data.manifest import read_manifest

        manifest = read_manifest(file, media_root)
        problems = manifest.problems
        names = tuple(record.id for record in manifest.records)
        items = tuple({"text": r.text, "video": r.video, "audio": r.audio, "timestamps": r.timestamps} for r in manifest.records)
    else:
        with as_input_error(f"--queries {file}: cannot be read", "give UTF-8 text", OSError, UnicodeDecodeError):
            lines = lines_of_text(Path(file).read_bytes())
        names = tuple(line for line in lines if line.strip())
        items = tuple({"text": line} for line in names)
    if problems:
        print(f"{file}: {len(problems)} lines are not queries; the first: {problems[0].reason}", file=sys.stderr)
    if not items:
        raise InputError(f"--queries {file}: holds no queries; give a caption a line, or a manifest (.jsonl, .csv, .parquet or .tar)")
    kinds = {frozenset(field[0] for field in ("text", "video", "audio") if item.get(field) is not None) for item in items}
    kind = next((name for name, modalities in TABLE_MODALITIES.items() if {modalities} == kinds), None)
    return Queries(kind, names, items, len(problems))
