"""What `eval` shows a result beside: files and results that `--compare` names, and published rows."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omni_jax.cli.inputs import read_result, read_tables
from omni_jax.config.made_with import listed, made_otherwise
from omni_jax.retrieval import compare, format_differences
from omni_jax.retrieval.metrics import Scores
from omni_jax.retrieval.published import BENCH, published, sources
from omni_jax.retrieval.report import Other
from omni_jax.retrieval.storage import stored
from omni_jax.types import EmbeddingTable, InputError

PUBLISHED = "published"


@dataclasses.dataclass
class Beside:
    """What a result is shown beside.

    Attributes:
      columns: heading -> result; the first is the one that others are shown beside.
      others: those of the report, published ones first.
      notes: lines about them.
    """

    columns: dict[str, dict[str, Any]]
    others: list[Other]
    notes: list[str] = dataclasses.field(default_factory=list)

    def add(self, path: str, found: dict[str, Any], made: Mapping[str, Any]) -> str:
        """Adds a column and returns its heading: the file's name, or its path where two names are equal. `made`: see `_made_otherwise`."""
        own, result = next(iter(self.columns.items()))
        name = path if Path(path).name in self.columns else Path(path).name
        self.columns[name] = found
        self.notes += _made_otherwise(own, result, name, made)
        return name


def set_beside(args: argparse.Namespace, scores: Scores, score_of: Callable[[EmbeddingTable], Scores]) -> Beside:
    """Returns what the result of the files is shown beside, and adds "comparisons" to it."""
    result = scores.result
    own = Path(args.files[0]).name + (f" +{len(args.files) - 1}" if len(args.files) > 1 else "")
    benchmarks = {path: path.partition(":")[2] or BENCH for path in args.compare if path.partition(":")[0] == PUBLISHED}
    known = [row for benchmark in list(benchmarks.values()) or [BENCH][: not args.captions] for row in published(benchmark).items()]
    beside = Beside({own: result}, [Other(name, row, True) for name, row in known])
    for path in args.compare:
        if path in benchmarks:
            rows = published(benchmarks[path])
            beside.columns |= rows
            beside.notes.append(sources(rows))
        elif path.endswith(".json"):
            read = read_result(path)
            beside.others.append(Other(beside.add(path, read, read), read))
        else:
            if args.captions:
                raise InputError(f"--compare {path}: with --captions, score it alone with --json and compare with that file")
            table = read_tables([path] if Path(path).exists() else path.split(","), incomplete=args.incomplete)
            theirs = score_of(stored(table, args.storage))
            name = beside.add(path, theirs.result, {"made_with": table.made_with, "storage": result.get("storage")})
            differences = None
            try:
                differences = compare(scores.hit_counts, theirs.hit_counts)
                result.setdefault("comparisons", {})[name] = {key: found.row() for key, found in differences.items()}
                beside.notes.append(format_differences(own, name, differences))
            except InputError as e:
                beside.notes.append(f"No paired test with {name}: {e}.")
            beside.others.append(Other(name, theirs.result, differences=differences))
    return beside


def _made_otherwise(own: str, result: Mapping[str, Any], name: str, other: Mapping[str, Any]) -> list[str]:
    """Lines about what two results shown side by side do not have in common, besides their vectors."""
    lines = []
    ours, theirs = result.get("made_with"), other.get("made_with")
    if ours is not None and theirs is not None:
        found = made_otherwise(theirs, ours)
        lines += [f"Made otherwise: {name} there, {own} here: {listed(found)}."] if found else []
    elif ours is not None or theirs is not None:
        lines.append(f"What {own if ours is None else name} was made with is not recorded: whether both were made alike is unknown.")
    kept, other_kept = ((row.get("storage") or {}).get("dtype", "float32") for row in (result, other))
    if kept != other_kept:
        lines.append(f"Note: {own} was scored with tables kept as {kept}, {name} as {other_kept}.")
    return lines
