"""What the commands that embed a manifest share: their arguments, the tables, the pass under a progress bar, and its report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from omni_jax.cli.argtypes import add_decoding_arguments, positive
from omni_jax.cli.model_arguments import add_model_arguments, add_weights_arguments
from omni_jax.cli.printing import one_line
from omni_jax.cli.source import add_source_arguments
from omni_jax.config import TABLE_MODALITIES, TABLES, ConfigError
from omni_jax.types import EmbeddingTable, InputError, Record

if TYPE_CHECKING:
    from omni_jax.api import OmniRetriever
    from omni_jax.data.manifest import Manifest
    from omni_jax.engines.ray_embed import RayEmbedding
    from omni_jax.retrieval.embedding_pass import Part


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_source_arguments(parser)
    parser.add_argument("--tables", metavar="LIST", help=f"comma-separated, among {','.join(TABLES)} (default: all that the fields allow)")
    parser.add_argument("--batch-size", type=positive(int), default=16, metavar="N", help="clips encoded together (default: %(default)s)")
    add_weights_arguments(parser)
    parser.add_argument(
        "--media-root", metavar="DIR", help="folder that media paths start from and must stay in (default: the manifest's, unconfined)"
    )
    add_decoding_arguments(parser)


def parse_tables(text: str | None) -> tuple[str, ...] | None:
    """Returns table names in the order of TABLES; None for None. Raises ConfigError for an unknown one."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in TABLES]
    if unknown or not names:
        raise ConfigError(f"--tables {text}: unknown table {unknown[0] if unknown else '(none)'}; choose among {', '.join(TABLES)}")
    return tuple(name for name in TABLES if name in names)


def usable_tables(args: argparse.Namespace, manifest: Manifest, tables: tuple[str, ...] | None, out: epath.Path | None) -> tuple[str, ...]:
    """Returns the tables to fill, all that the fields allow where none were asked for; says what of the manifest is not used.

    Raises:
      InputError: when no record can fill any of them; the list of errors is then written.
    """
    for note in manifest.notes:
        print(f"{args.manifest}: {note}", file=sys.stderr)
    filled = {name: sum(TABLE_MODALITIES[name] <= r.modalities for r in manifest.records) for name in tables or TABLES}
    chosen = tables or tuple(name for name, count in filled.items() if count)
    if not any(filled.values()):
        from omni_jax.retrieval.embedding_pass import Part, assemble

        why = f"has nothing of what the tables {', '.join(chosen)} need; add the fields or choose other --tables"
        unfit = Part(problems=tuple((r.id, f"record {r.id!r}: {why}") for r in manifest.records))
        report(out, manifest, assemble(manifest.records, [unfit]))
        first = manifest.problems[0].reason if manifest.problems else unfit.problems[0][1]
        listed = f"; {beside(out, 'errors')} lists all" if out is not None else ""
        raise InputError(f"{args.manifest}: no record can be embedded; the first: {first}{listed}")
    fewer = [f"{name} {filled[name]}" for name in chosen if filled[name] < len(manifest.records)]
    if fewer:
        print(f"{args.manifest}: some of the {len(manifest.records)} records lack a modality: {', '.join(fewer)} records", file=sys.stderr)
    return chosen


def embed(
    args: argparse.Namespace,
    model: OmniRetriever | RayEmbedding,
    records: Sequence[Record],
    tables: tuple[str, ...],
    what: str,
    done: int = 0,
    shapes: Mapping[str, Iterable[tuple[int, ...]]] | None = None,
) -> Iterator[Part]:
    """Yields the parts of an embedding pass under a progress bar. `shapes`: of the last part of an earlier run that is resumed."""
    from omni_jax.cli.progress import Progress

    options: dict[str, Any] = {
        "batch_size": args.batch_size,
        "normalize": not getattr(args, "no_normalize", False),
        "timeout": args.timeout,
        "shapes": shapes,
    }
    with Progress(done + len(records), what, done=done) as progress:
        options |= {"workers": args.workers} if getattr(args, "ray", None) is None else {"report": progress}
        for part in model.embed(records, tables, **options):
            progress.update(part.records)
            yield part


def report(out: epath.Path | None, manifest: Manifest, outcome: Part) -> int:
    """Prints the skipped and the repaired records and returns the number of skipped ones.

    With `out` the lists go to OUT.errors.jsonl and OUT.warnings.jsonl, and those of an earlier run are removed.
    """
    from omni_jax.data.manifest import Problem, write_jsonl_atomic

    known = {record.id: record for record in manifest.records}
    failed = [Problem(name, known[name].line, _at_fault(known[name], reason), reason) for name, reason in outcome.problems]
    errors = [p.row() for p in sorted([*manifest.problems, *failed], key=lambda p: p.line)]
    warnings = [{"id": name, "reason": line} for name, line in outcome.warnings]
    for kind, rows, what in (("errors", errors, "skipped records"), ("warnings", warnings, "repaired records")):
        listed = ""
        if out is not None:
            path = beside(out, kind)
            path.unlink(missing_ok=True)
            listed = f", listed in {path}"
            if rows:
                write_jsonl_atomic(path, rows)
        if rows:
            print(f"{what}: {len(rows)}{listed}; the first: {one_line(rows[0]['reason'])}", file=sys.stderr)
    if outcome.truncated:
        print(f"captions cut to max_text_tokens: {outcome.truncated}", file=sys.stderr)
    return len(errors)


def sample_line(args: argparse.Namespace, model: OmniRetriever, records: Sequence[Record], found: EmbeddingTable) -> str:
    """Returns what rounding on the fly loses: some of the records that were embedded are embedded once more without it."""
    from omni_jax.retrieval.embedding_pass import assemble
    from omni_jax.retrieval.rounding_loss import rounding_loss, sample

    chosen = {*sample(found.ids, args.sample)}
    again = [record for record in records if record.id in chosen]
    exact = assemble(again, list(embed(args, model.as_int8(), again, tuple(found.tables), what="int8 sample"))).table
    if not exact.ids:
        return "int8-dynamic was not compared with int8: no record of the sample could be embedded again"
    return rounding_loss(found, exact).said("int8-dynamic", "int8")


def beside(out: epath.Path, kind: str) -> epath.Path:
    """Returns where the list of a kind goes that belongs to an output."""
    return out.with_name(f"{out.stem}.{kind}.jsonl")


def _at_fault(record: Record, reason: str) -> str:
    """Returns the media file that a reason begins with, "" where it is about the record itself."""
    return next((str(path) for path in (record.video, record.audio) if path and reason.startswith(f"{path}:")), "")
