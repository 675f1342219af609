"""`omni-jax embed`: a manifest of clips to one file of embeddings."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from etils import epath

from omni_jax.config import PRESETS, TABLE_MODALITIES, TABLES, ConfigError, Preset, preset
from omni_jax.types import InputError, Record

if TYPE_CHECKING:
    from omni_jax.api import OmniRetriever
    from omni_jax.data.manifest import Manifest
    from omni_jax.retrieval.embedding_pass import Outcome

HELP = "embed a manifest of clips and captions"
EXAMPLE = "omni-jax embed --model omni7b --manifest clips.jsonl --out clips.npz --tables text,video,audio,av,tv,at"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_input_arguments(parser)
    parser.add_argument("--out", type=epath.Path, required=True, metavar="FILE.npz", help="embedding file to write")
    parser.add_argument("--preset", default="training", help=f"one of {', '.join(PRESETS)} (default: %(default)s)")
    parser.add_argument("--no-normalize", action="store_true", help="keep the vectors' own lengths")
    parser.add_argument("--official-keys", action="store_true", help="write '{id}__table' arrays, as the published extractor does")


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what every command that embeds a manifest takes."""
    parser.add_argument("--model", type=epath.Path, required=True, metavar="DIR", help="folder written by 'omni-jax convert to-jax'")
    parser.add_argument("--manifest", required=True, metavar="FILE.jsonl", help="plain or official manifest, one JSON record a line")
    parser.add_argument("--tables", metavar="LIST", help=f"comma-separated, among {','.join(TABLES)} (default: all that the fields allow)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="overrides", help="override a preset field")
    parser.add_argument("--batch-size", type=_positive(int), default=16, metavar="N", help="clips encoded together (default: %(default)s)")
    parser.add_argument("--dtype", choices=("keep", "bfloat16", "float32"), default="keep", help="weights and computation (default: keep)")
    parser.add_argument("--media-root", metavar="DIR", help="folder that media paths start from (default: the manifest's)")
    parser.add_argument("--workers", type=int, metavar="N", help="decoding processes (default: one less than the cores)")
    parser.add_argument(
        "--timeout", type=_positive(float), default=120.0, metavar="SECONDS", help="a clip that takes longer is set aside (default: 120)"
    )


def run(args: argparse.Namespace) -> int:
    """Embeds and returns the exit status: 0, or 1 when records were set aside.

    Raises:
      InputError, ConfigError: for anything in the arguments that cannot be used.
    """
    chosen = preset(args.preset).override(args.overrides)
    tables = parse_tables(args.tables)
    if args.out.suffix != ".npz":
        raise InputError(f"--out {args.out}: the name of an embedding file ends in .npz")

    # Late, so that `--help` and usage errors answer at once.
    from omni_jax.data.manifest import read_manifest
    from omni_jax.retrieval.embedding_file import check_place, write_embeddings

    check_place(args.out)
    manifest = read_manifest(args.manifest, args.media_root)
    outcome = embed(args, load_model(args, chosen), manifest, tables or tables_of(manifest.records), "embed")
    bad = report(args.out, manifest, outcome)
    if not outcome.table.ids:
        raise InputError(f"{args.manifest}: no record could be embedded; {_beside(args.out, 'errors')} says why")
    write_embeddings(args.out, outcome.table, args.official_keys)
    names = ", ".join(outcome.table.tables)
    print(
        f"{args.out}: {len(outcome.table.ids)} records x {len(outcome.table.tables)} tables ({names}), {outcome.padded_share:.0%} padding"
    )
    return 1 if bad else 0


def load_model(args: argparse.Namespace, chosen: Preset) -> OmniRetriever:
    from omni_jax.api import OmniRetriever

    return OmniRetriever.from_pretrained(args.model, dtype=args.dtype, preset=chosen)


def embed(args: argparse.Namespace, model: OmniRetriever, manifest: Manifest, tables: tuple[str, ...], what: str) -> Outcome:
    """Embeds a manifest's records under a progress bar."""
    from omni_jax.cli.progress import Progress

    with Progress(len(manifest.records), what) as progress:
        return model.embed(
            manifest.records,
            tables,
            batch_size=args.batch_size,
            normalize=not getattr(args, "no_normalize", False),
            workers=args.workers,
            timeout=args.timeout,
            progress=progress.update,
        )


def report(out: epath.Path | None, manifest: Manifest, outcome: Outcome) -> int:
    """Says what was set aside or mended and returns the number of records set aside.

    With `out` the lists go to OUT.errors.jsonl and OUT.warnings.jsonl, and those of an earlier run are removed.
    """
    from omni_jax.data.manifest import Problem, write_jsonl_atomic

    failed = [Problem(p.record.id, p.record.line, str(p.record.video or p.record.audio or ""), p.reason) for p in outcome.problems]
    errors = [p.row() for p in sorted([*manifest.problems, *failed], key=lambda p: p.line)]
    warnings = [{"id": name, "reason": line} for name, line in outcome.warnings]
    for kind, rows, what in (("errors", errors, "records set aside"), ("warnings", warnings, "records mended")):
        listed = ""
        if out is not None:
            path = _beside(out, kind)
            path.unlink(missing_ok=True)
            listed = f", listed in {path}"
            if rows:
                write_jsonl_atomic(path, rows)
        if rows:
            print(f"{what}: {len(rows)}{listed}; the first: {rows[0]['reason']}", file=sys.stderr)
    if outcome.truncated:
        print(f"captions cut to max_text_tokens: {outcome.truncated}", file=sys.stderr)
    return len(errors)


def _beside(out: epath.Path, kind: str) -> epath.Path:
    return out.with_name(f"{out.stem}.{kind}.jsonl")


def parse_tables(text: str | None) -> tuple[str, ...] | None:
    """Returns table names in the order of TABLES; None for None. Raises ConfigError for an unknown one."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in TABLES]
    if unknown or not names:
        raise ConfigError(f"--tables {text}: unknown table {unknown[0] if unknown else '(none)'}; choose among {', '.join(TABLES)}")
    return tuple(name for name in TABLES if name in names)


def tables_of(records: Iterable[Record]) -> tuple[str, ...]:
    """Returns every table that the fields of some record allow."""
    found = {r.modalities for r in records}
    return tuple(name for name in TABLES if any(TABLE_MODALITIES[name] <= modalities for modalities in found))


def _positive(kind: type) -> type:
    def read(text: str) -> float:
        value = kind(text)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(text)
        return value

    read.__name__ = f"positive {kind.__name__}"  # argparse shows it
    return read
