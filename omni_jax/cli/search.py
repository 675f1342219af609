"""`omni-jax search`: the records of an embedding file nearest to a text, a sound, a video or both."""

from __future__ import annotations

import argparse
import functools
import json
import sys

from etils import epath

from omni_jax.cli.embed import add_preset_arguments, check_preset, choose_preset
from omni_jax.cli.printing import one_line
from omni_jax.config import TABLES, Preset
from omni_jax.config.made_with import ROUNDING, listed, made_otherwise
from omni_jax.types import EmbeddingTable, InputError

HELP = "search an embedding file by text, audio, video or audio and video together"
EXAMPLE = 'omni-jax search --model omni7b --index clips.npz --text "a whistle over a gradient sky" -k 5'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=epath.Path,
        required=True,
        metavar="DIR",
        help="converted folder, or workdir of 'omni-jax train'",
    )
    parser.add_argument(
        "--index", action="append", required=True, metavar="FILE.npz", help="embedding file; repeat it for parts of one set"
    )
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--text", metavar="TEXT", help="search by a caption")
    query.add_argument("--audio", metavar="FILE", help="search by a sound; a video file's track will do")
    query.add_argument("--video", metavar="FILE", help="search by the pictures of a video")
    query.add_argument("--av", metavar="FILE", help="search by the pictures and the sound of a video")
    parser.add_argument("-k", type=_count, default=10, metavar="N", help="results to print (default: %(default)s)")
    parser.add_argument(
        "--table", choices=TABLES, help="table to search in (default: for a text av, then video, audio; for other queries what they lack)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    add_preset_arguments(parser, "the one that the index was made with, or else the model's")
    parser.add_argument("--unchecked", action="store_true", help="search an index that was made by another model or preset all the same")
    parser.add_argument("--dtype", choices=("keep", "bfloat16", "float32"), default="keep", help="weights and computation (default: keep)")


def run(args: argparse.Namespace) -> int:
    """Prints rank, cosine and id of the nearest records and returns the exit status.

    Raises:
      InputError, ConfigError: for an index, a query or a model that cannot be used.
    """
    check_preset(args)
    kind = next(name for name in ("text", "audio", "video", "av") if getattr(args, name) is not None)
    given = getattr(args, kind)
    if kind == "text" and not given.strip():
        raise InputError("--text: is empty; say what to search for")
    if kind != "text" and args.prefix:
        raise InputError(f"--prefix {args.prefix}: says what a text is; omit it with --{kind}")

    # Late, so that `--help` and usage errors answer at once.
    from omni_jax.cli.inputs import read_tables
    from omni_jax.retrieval.search import search, target_table

    index = read_tables(args.index, functools.partial(target_table, kind, chosen=args.table), incomplete=True)
    (table,) = index.tables
    if not index.ids:
        raise InputError(f"{args.index[0]}: holds no records")
    chosen = choose_preset(args, index.made_with)
    _check_origin(args, index, chosen)

    from omni_jax.api import OmniRetriever

    model = OmniRetriever.from_pretrained(args.model, dtype=args.dtype, preset=chosen)
    query = model.encode(
        texts=[given] if kind == "text" else None,
        videos=[given] if kind in ("video", "av") else None,
        audios=[given] if kind in ("audio", "av") else None,
        # A text is what is searched with, whatever the captions of the index are.
        prefix=args.prefix or "query" if kind == "text" and chosen.prefix else None,
    )
    ids = index.ids_of(table)
    scores, rows = search(query, index.tables[table], args.k, name=table, ids=ids)
    found = [(ids[row], float(score)) for row, score in zip(rows[0].tolist(), scores[0], strict=True)]
    if args.json:
        print(json.dumps({"query": kind, "table": table, "records": len(ids), "results": [{"id": i, "score": s} for i, s in found]}))
        return 0
    print(f"{kind} in table {table} of {len(ids)} records, by cosine:")
    for rank, (name, score) in enumerate(found, 1):
        print(f"{rank:4d}  {score:7.4f}  {one_line(name)}")
    return 0


def _check_origin(args: argparse.Namespace, index: EmbeddingTable, chosen: Preset) -> None:
    """Compares what an index was made with and what searches it, before weights are read.

    Raises:
      InputError: where the model or the preset is another, unless the arguments say that it may be.
    """
    if index.made_with is None:
        print(f"{args.index[0]}: what it was made with is not recorded; search it with the model and preset that made it", file=sys.stderr)
        return
    from omni_jax.api.made_with import made_with
    from omni_jax.api.weights import open_model

    # Cosines do not depend on lengths, and a query may have another prefix than what it looks for.
    here = made_with(open_model(args.model), chosen, dtype=args.dtype)
    found = made_otherwise(index.made_with, here, (*ROUNDING, "normalize", "preset.prefix"))
    if found and not args.unchecked:
        raise InputError(
            f"{args.index[0]}: was made otherwise than --model {args.model} embeds: {listed(found)}; search with the model and preset that "
            f"made it, embed it again, or compare all the same with --unchecked"
        )
    if found:
        print(f"{args.index[0]}: was made otherwise: {listed(found)}", file=sys.stderr)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1 is needed")
    return value
