"""`omni-jax mine`: a manifest with the hard negatives of each record."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni_jax.cli.argtypes import check_apart, finite, positive, whole
from omni_jax.cli.source import check_jsonl
from omni_jax.cli.status import DONE, DONE_WITH_SKIPPED
from omni_jax.types import InputError

if TYPE_CHECKING:
    from omni_jax.data.manifest import Manifest
    from omni_jax.retrieval.mining import Mined

EXAMPLE = "omni-jax mine --manifest clips.jsonl --embeddings clips.npz --out mined.jsonl --directions t2v,v2t"

SAMPLING = ("top", "random")  # those of omni_jax.retrieval.mining, which is imported late


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--manifest", required=True, metavar="FILE.jsonl", help="manifest whose records get negatives")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--embeddings", nargs="+", metavar="FILE", help="embedding file of its records; several are parts of one set")
    source.add_argument("--model", metavar="DIR", help="converted folder or workdir; embeds the manifest first, into OUT.npz")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.jsonl", help="a copy of the manifest with a field `negatives`")
    parser.add_argument("--directions", metavar="LIST", help="comma-separated, such as t2v,v2t (default: all that the tables allow)")
    parser.add_argument("--num-negatives", type=whole, default=5, metavar="N", help="negatives per record and direction (default: 5)")
    parser.add_argument("--range-min", type=whole, default=0, metavar="RANK", help="leave the hardest RANK candidates out (default: 0)")
    parser.add_argument("--range-max", type=whole, default=100, metavar="RANK", help="consider candidates up to this rank (default: 100)")
    parser.add_argument("--min-score", type=finite, metavar="COSINE", help="lowest cosine of a negative (default: none)")
    parser.add_argument("--max-score", type=finite, metavar="COSINE", help="highest cosine of a negative (default: none)")
    parser.add_argument(
        "--absolute-margin",
        type=_margin,
        default=0.0,
        metavar="M",
        help="a negative scores at least M below the relevant item; others may be false negatives (default: 0; none: no guard)",
    )
    parser.add_argument(
        "--relative-margin", type=_margin, metavar="M", help="a negative scores at most (1 - M) times the relevant item (default: none)"
    )
    parser.add_argument(
        "--search",
        choices=("exact", "faiss"),
        default="exact",
        help="faiss searches only the nearest cells of a large gallery, and holds a second copy of it in memory (default: exact)",
    )
    parser.add_argument(
        "--probe", type=positive(int), metavar="N", help="with --search faiss: cells to search (default: 1 in 32, at least 16)"
    )
    parser.add_argument("--sampling", choices=SAMPLING, default="top", help="the hardest candidates, or random ones (default: top)")
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="seed of --sampling random (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Writes the mined manifest and returns the exit status: 0, 1 when records were skipped."""
    check_jsonl(args.out)
    check_apart("--out", args.out, [args.manifest, *(args.embeddings or [])])
    if args.probe is not None and args.search != "faiss":
        raise InputError(f"--probe {args.probe}: is for --search faiss; leave it out")

    from omni_jax.cli.inputs import read_tables
    from omni_jax.cli.progress import Progress
    from omni_jax.data.manifest import read_manifest, row_of, write_jsonl_atomic
    from omni_jax.retrieval.directions import DIRECTIONS, possible
    from omni_jax.retrieval.faiss_search import FaissIndex
    from omni_jax.retrieval.mining import MiningConfig, mine

    config = MiningConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(MiningConfig)})
    directions = args.directions.split(",") if args.directions else list(DIRECTIONS)
    if unknown := [name for name in directions if name not in DIRECTIONS]:
        raise InputError(f"--directions {args.directions}: unknown direction {unknown[0]!r}; choose among {', '.join(DIRECTIONS)}")
    manifest = read_manifest(args.manifest)
    for problem in manifest.problems[:1]:
        print(f"{args.manifest}: {len(manifest.problems)} entries are skipped; the first: {problem.reason}", file=sys.stderr)
    files = args.embeddings or [_embedded(args)]
    table = read_tables(files)
    known = set(table.ids)
    absent = [record.id for record in manifest.records if record.id not in known]
    if len(absent) == len(manifest.records):
        raise InputError(f"{args.manifest}: none of its records is in {', '.join(files)}; name the file of this manifest")
    if absent:
        print(f"{args.manifest}: {len(absent)} records are not embedded and get no negatives; the first: {absent[0]!r}", file=sys.stderr)
    chosen = [name for name in possible(table.tables) if name in directions]
    with Progress(sum(len(table.ids_of(DIRECTIONS[name][0])) for name in chosen), "mine", unit="queries") as bar:
        nearest = functools.partial(FaissIndex, probed=args.probe) if args.search == "faiss" else None
        mined = mine(table, config, same=_same(manifest), directions=directions, nearest=nearest, progress=lambda done: bar.update(done))
    folder, found = args.out.absolute().parent, mined.negatives
    write_jsonl_atomic(args.out, ({**row_of(record, folder), "negatives": found.get(record.id, {})} for record in manifest.records))
    print(_summary(mined))
    print(f"{args.out}: {len(found)} of {len(manifest.records)} records have negatives")
    return DONE_WITH_SKIPPED if manifest.problems or absent else DONE


def _embedded(args: argparse.Namespace) -> str:
    """Embeds the manifest as `omni-jax embed` does, which resumes, and returns the file.

    Raises:
      InputError: for one that exists: it may be of another model, or of an earlier state of the manifest.
    """
    from omni_jax.cli.main import main

    file = str(args.out.with_suffix(".npz"))
    if Path(file).exists():
        raise InputError(f"{file}: exists already; mine in it with --embeddings {file}, or remove it to embed the manifest again")
    if main(["embed", "--model", args.model, "--manifest", args.manifest, "--out", file]) not in (0, 1):
        raise InputError(f"--model {args.model}: {args.manifest} was not embedded; see the message above and run it again to resume")
    return file


def _same(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Returns what makes two records equal: the caption, whatever its case and spaces, and the media file, whatever the interval."""
    return {
        "same caption": {record.id: " ".join(record.text.lower().split()) for record in manifest.records if record.text is not None},
        "same source": {record.id: str(file) for record in manifest.records if (file := record.video or record.audio) is not None},
    }


def _summary(mined: Mined) -> str:
    reasons = list(dict.fromkeys(reason for counts in mined.removed.values() for reason in counts))
    rows = [f"{'direction':<10}{'queries':>9}{'without':>9}" + "".join(f"{reason:>18}" for reason in reasons)]
    for name, queries in mined.queries.items():
        counts = mined.removed[name]
        rows.append(f"{name:<10}{queries:>9}{mined.without[name]:>9}" + "".join(f"{counts[reason]:>18}" for reason in reasons))
    return "\n".join(rows)


def _margin(text: str) -> float | None:
    try:
        return None if text == "none" else finite(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a finite number nor the word none") from None
