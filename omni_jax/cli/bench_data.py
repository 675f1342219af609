"""`omni-jax bench-data`: a benchmark's annotations and a folder of media to a manifest."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from omni_jax.cli.printing import one_line
from omni_jax.cli.source import check_jsonl, write_fetch_list
from omni_jax.types import InputError

if TYPE_CHECKING:
    from omni_jax.data.benchmarks import Annotations, Coverage

EXAMPLE = "omni-jax bench-data clotho --annotations clotho_captions_evaluation.csv --media evaluation --out clotho.jsonl --audit"

NAMES = "omniretriever clotho clotho_v2 audiocaps sounddescs msrvtt msvd didemo vatex youcook2 youcook2_train".split()
"""Those of `omni_jax.data.benchmarks`, which is imported late."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=NAMES, help="the benchmark")
    parser.add_argument("--annotations", required=True, metavar="FILE", help="annotation file as published")
    parser.add_argument("--media", required=True, metavar="DIR", help="folder of the clips, or of whole sources; searched recursively")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="manifest of the clips that are present")
    parser.add_argument(
        "--training", action="store_true", help="write one record per caption, with the video and sound of its clip, for train"
    )
    parser.add_argument("--split", metavar="FILE", help="keep the clips whose ids are listed in this file, one a line")
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="ROLE=NAME",
        help="omniretriever: the column of a role (source, start, caption ...)",
    )
    parser.add_argument("--fetch-list", metavar="FILE", help="write id, URL, start and end of the missing clips, tab-separated")
    parser.add_argument("--audit", action="store_true", help="print how many clips of the benchmark are present")


def run(args: argparse.Namespace) -> int:
    """Writes the manifest and returns the exit status: 0, or 1 when clips are missing."""
    if not (args.out or args.audit or args.fetch_list):
        raise InputError("nothing to do: give --out FILE.jsonl, --fetch-list FILE or --audit")
    if args.out:
        check_jsonl(args.out)
    columns = dict(_role(text) for text in args.column)

    from omni_jax.data.benchmarks import BENCHMARKS, match_media, read_annotations

    found = read_annotations(args.name, args.annotations, split=args.split, columns=columns)
    media = BENCHMARKS[args.name].media
    coverage = match_media(found.items, args.media, media)
    if args.fetch_list:
        _write_fetch_list(args.fetch_list, coverage)
    if args.audit:
        print(_audit(args.name, args.annotations, found, coverage))
    if found.problems:
        print(f"entries that cannot be used: {len(found.problems)}; the first: {one_line(str(found.problems[0]))}", file=sys.stderr)
    if found.empty_captions:
        print(f"empty captions left out: {found.empty_captions}", file=sys.stderr)
    if coverage.doubtful:
        names = ", ".join(coverage.doubtful[:5])
        print(f"names of several files of the same content, the first taken: {len(coverage.doubtful)}: {names}", file=sys.stderr)
    if args.out:
        _write_manifests(args.out, args.media, media, found, coverage, args.training)
    return 1 if coverage.missing or found.problems else 0


def _write_manifests(out: Path, folder: str, media: tuple[str, ...], found: Annotations, coverage: Coverage, training: bool) -> None:
    from omni_jax.data.benchmarks import manifest_rows, training_rows
    from omni_jax.data.manifest import write_jsonl_atomic

    if not coverage.found:
        first = coverage.missing[0].id
        raise InputError(f"{folder}: holds no file of the {len(found.items)} clips; the first, {first!r}: {coverage.reasons[first]}")
    folder_of_rows = out.absolute().parent
    clips, captions = (list(training_rows(coverage, folder_of_rows)), []) if training else manifest_rows(coverage, media, folder_of_rows)
    beside = {kind: out.with_name(f"{out.stem}.{kind}.jsonl") for kind in ("captions", "missing")}
    missing = [{"id": item.id, "url": item.url, "reason": coverage.reasons[item.id]} for item in coverage.missing]
    missing += [{"id": None, "url": None, "reason": line} for line in found.problems]
    write_jsonl_atomic(out, clips)
    for path, rows in ((beside["captions"], captions), (beside["missing"], missing)):
        path.unlink(missing_ok=True)
        if rows:
            write_jsonl_atomic(path, rows)
    rest = f", {len(captions)} captions in {beside['captions']}" if captions else ""
    records = f", {len(clips)} records to train on" if training else ""
    print(f"{out}: {len(coverage.found)} of {len(found.items)} clips{records}{rest}")
    if missing:
        print(f"not in it: {len(missing)}, listed in {beside['missing']}", file=sys.stderr)


def _write_fetch_list(path: str, coverage: Coverage) -> None:
    from omni_jax.data.benchmarks import fetch_rows

    rows = list(fetch_rows(coverage.missing))
    if coverage.missing and not rows:
        raise InputError("--fetch-list: these annotations do not name the sources of the media; see the benchmark's own page")
    without = len(coverage.missing) - len(rows)
    rest = f"; of {without} more the annotations do not say where they are to be had" if without else ""
    print(write_fetch_list(path, rows) + rest)


def _audit(name: str, annotations: str, found: Annotations, coverage: Coverage) -> str:
    total, here = len(found.items), len(coverage.found)
    captions = sum(len(item.captions) for item, _, _ in coverage.found)
    lines = [
        f"{name}: {total} clips in {annotations}",
        f"  at hand       {here:6d}  ({100 * here / total:.1f} %), {coverage.whole} of them to be cut out of their source",
        f"  missing       {len(coverage.missing):6d}"
        + (f"  the first: {', '.join(item.id for item in coverage.missing[:5])}" if coverage.missing else ""),
        f"  empty files   {len(coverage.empty):6d}",
        f"  unused files  {coverage.unused:6d}",
    ]
    if found.problems:
        lines.append(f"  bad entries   {len(found.problems):6d}")
    lines.append(f"A score on this subset is over a gallery of {here} clips and {captions} captions; a smaller gallery scores higher.")
    return "\n".join(lines)


def _role(text: str) -> tuple[str, str]:
    role, sign, name = text.partition("=")
    if not sign or not name:
        raise InputError(f"--column {text}: write ROLE=NAME")
    return role, name
