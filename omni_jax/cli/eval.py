"""`omni-jax eval`: the 12-direction table of an embedding file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from etils import epath

from omni_jax.types import InputError

HELP = "score an embedding file in the 12 directions between text, video, audio and their pairs"
EXAMPLE = "omni-jax eval bench.npz --ties worst --json bench.json --compare published --compare wave7b.npz"

TIES = ("optimistic", "average", "worst")  # those of omni_jax.retrieval, which is imported late
PUBLISHED = "published"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="embedding file (.npz); several are parts of one set and are read together"
    )
    parser.add_argument(
        "--ties", choices=TIES, default="optimistic", help="how candidates of equal similarity count (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="OUT", help="also write the result as JSON")
    parser.add_argument(
        "--compare",
        metavar="FILE",
        action="append",
        default=[],
        help=f"put another embedding file, a result written with --json, or the word {PUBLISHED!r} beside it; may be repeated",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the table and returns the exit status.

    Raises:
      InputError: for anything in the files that cannot be scored.
    """
    # The library imports come late so that `--help` and usage errors answer at once.
    import jax
    import numpy as np
    from jax.sharding import Mesh

    from omni_jax.retrieval import evaluate, format_comparison, format_table, read_embeddings
    from omni_jax.retrieval.embedding_file import replacing
    from omni_jax.retrieval.published import OMNIRETRIEVER_BENCH

    mesh = Mesh(np.array(jax.devices()), ("rows",))
    result = evaluate(read_embeddings(args.files), ties=args.ties, mesh=mesh)
    columns: dict[str, dict[str, Any]] = {}
    _add(columns, args.files[0] if len(args.files) == 1 else f"{args.files[0]} +{len(args.files) - 1}", result)
    for other in args.compare:
        if other == PUBLISHED:
            columns |= {f"{name} (published)": row for name, row in OMNIRETRIEVER_BENCH.items()}
        elif other.endswith(".json"):
            _add(columns, other, _read_result(other))
        else:
            _add(columns, other, evaluate(read_embeddings(other), ties=args.ties, mesh=mesh))
    if jax.process_index() != 0:
        return 0
    if args.json:
        with replacing(args.json) as file:
            file.write(json.dumps(result, indent=2, allow_nan=False).encode() + b"\n")
    print(format_table(result))
    if args.compare:
        print("\n" + format_comparison(columns))
    return 0


def _add(columns: dict[str, dict[str, Any]], path: str, result: dict[str, Any]) -> None:
    """Files are headed by their names, and by their paths where two names are equal."""
    name = Path(path).name
    columns[path if name in columns else name] = result


def _read_result(path: str) -> dict[str, Any]:
    try:
        result = json.loads(epath.Path(path).read_text())
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror or e}") from e
    except ValueError as e:
        raise InputError(f"{path}: not JSON ({e}); give a result that `omni-jax eval --json` wrote") from e
    try:
        cells = [float(metrics["R@1"]) for metrics in result["directions"].values()]
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise InputError(f"{path}: not a result of `omni-jax eval --json` (no directions with R@1)") from e
    if not cells:
        raise InputError(f"{path}: holds no directions")
    return result
