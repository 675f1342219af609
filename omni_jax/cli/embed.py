"""`omni-jax embed`: a manifest of clips to one file of embeddings."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from omni_jax.cli.argtypes import TIMEOUT_S, add_decoding_arguments, add_truncate_dim, positive, whole
from omni_jax.cli.model_arguments import (
    add_model_arguments,
    add_preset_arguments,
    add_weights_arguments,
    check_preset,
    choose_preset,
    load_model,
    named_model,
)
from omni_jax.cli.on_ray import add_actor_arguments, add_ray_argument, check_ray, embedding_on_ray
from omni_jax.cli.printing import one_line
from omni_jax.cli.source import add_source_arguments, read_source
from omni_jax.cli.status import DONE, DONE_WITH_SKIPPED, INTERRUPTED, STOPPED_AND_SAVED
from omni_jax.config import TABLE_MODALITIES, TABLES, ConfigError
from omni_jax.types import InputError, Record

if TYPE_CHECKING:
    from omni_jax.api import OmniRetriever
    from omni_jax.data.manifest import Manifest
    from omni_jax.engines.ray_embed import RayEmbedding
    from omni_jax.retrieval.embedding_pass import Outcome, Part

FILE_GIB = 2.0  # of vectors in one file
SAMPLE = 256

EXAMPLE = "omni-jax embed --model omni7b --manifest clips.jsonl --out clips.npz --tables text,video,audio,av,tv,at"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_input_arguments(parser)
    parser.add_argument("--out", type=epath.Path, required=True, metavar="FILE.npz", help="embedding file to write")
    add_preset_arguments(parser)
    add_ray_argument(parser)
    add_actor_arguments(parser)
    parser.add_argument(
        "--part",
        type=_part,
        metavar="I/N",
        help="embed the I-th of N slices (from 0), written as FILE-I-of-N.npz; eval reads all",
    )
    parser.add_argument(
        "--file-size",
        type=positive(float),
        default=FILE_GIB,
        metavar="GIB",
        help="split larger tables into FILE-I-of-N.npz; FILE.npz then lists these files (default: %(default)g)",
    )
    add_truncate_dim(parser)
    parser.add_argument("--no-normalize", action="store_true", help="do not scale vectors to length 1")
    parser.add_argument(
        "--sample",
        type=whole,
        default=SAMPLE,
        metavar="N",
        help="with --weights int8-dynamic: records also embedded with int8, to measure the loss (default: %(default)s, 0: none)",
    )
    parser.add_argument("--official-keys", action="store_true", help="write '{id}__table' arrays, as the published extractor does")


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what every command that embeds a manifest takes."""
    add_model_arguments(parser)
    add_source_arguments(parser)
    parser.add_argument("--tables", metavar="LIST", help=f"comma-separated, among {','.join(TABLES)} (default: all that the fields allow)")
    parser.add_argument("--batch-size", type=positive(int), default=16, metavar="N", help="clips encoded together (default: %(default)s)")
    add_weights_arguments(parser)
    parser.add_argument(
        "--media-root",
        metavar="DIR",
        help="folder that media paths start from and must stay in (default: the manifest's, unconfined)",
    )
    add_decoding_arguments(parser, None)


def check_timeout(args: argparse.Namespace) -> None:
    """Raises InputError for a time limit where no other process decodes, which alone can be stopped; sets it where none was given."""
    if args.timeout is not None and args.workers == 0:
        raise InputError(f"--timeout {args.timeout:g}: --workers 0 decodes in this process, which no limit stops; leave one of them out")
    args.timeout = args.timeout or TIMEOUT_S


def run(args: argparse.Namespace) -> int:
    """Embeds and returns the exit status: 0, 1 when records were skipped, 75 when SIGTERM and 130 when Ctrl-C stopped it; what was
    finished is kept then.
    """
    check_timeout(args)
    check_ray(args)
    check_preset(args)
    source = named_model(args)
    chosen = choose_preset(args, source)
    tables = parse_tables(args.tables)
    if args.out.suffix != ".npz":
        raise InputError(f"--out {args.out}: the name of an embedding file ends in .npz")

    from omni_jax.retrieval.embedding_file import check_place, part_path
    from omni_jax.retrieval.embedding_pass import first_of_prompts

    index, count = args.part or (0, 1)
    check_place(part_path(args.out, index, count))
    whole = read_source(args)
    tables = usable_tables(args, whole, tables, part_path(args.out, index, count))
    with contextlib.ExitStack() as held:
        model = load_model(args, source, chosen) if args.ray is None else held.enter_context(embedding_on_ray(args, source, chosen))
        if args.truncate_dim is not None and args.truncate_dim > model.dim:
            raise InputError(f"--truncate-dim {args.truncate_dim}: the model's vectors have {model.dim} dimensions; keep so many at most")
        made_with = model.made_with(normalize=not args.no_normalize)
        files = _files(args, whole, tables, args.truncate_dim or model.dim)
        same = first_of_prompts(whole.records, tables) if files[0].of > 1 else {}
        bad = done = 0
        for file in files:
            stopped, embedded, skipped = _embed_file(args, model, file, tables, made_with, same)
            if stopped is not None:
                return stopped
            bad, done = bad + skipped, done + embedded
    if not done:
        raise InputError(f"{args.manifest}: no record could be embedded; {_beside(files[0].out, 'errors')} says why")
    if len(files) > 1:
        print(f"{args.out}: {done} records in {len(files)} files, which this name lists")
    return DONE_WITH_SKIPPED if bad else DONE


@dataclasses.dataclass(frozen=True)
class _File:
    """One file of embeddings to write: its records, and which file it is of how many."""

    out: epath.Path
    manifest: Manifest
    index: int
    of: int


def _files(args: argparse.Namespace, whole: Manifest, tables: tuple[str, ...], width: int) -> list[_File]:
    """Returns the part that was asked for, or as many files as keep to --file-size, with the records in the order of the manifest."""
    from omni_jax.retrieval.embedding_file import part_path

    if args.part:
        index, of = args.part
        part = dataclasses.replace(whole, records=whole.records[index::of], problems=whole.problems[index::of])
        return [_File(part_path(args.out, index, of), part, index, of)]
    size = 4 * width * sum(TABLE_MODALITIES[name] <= record.modalities for record in whole.records for name in tables)
    of = 1 if args.official_keys else min(-(-size // max(1, int(args.file_size * 2**30))), len(whole.records))
    cuts = [len(whole.records) * number // of for number in range(of + 1)]
    return [
        _File(
            part_path(args.out, number, of),
            dataclasses.replace(whole, records=whole.records[start:stop], problems=() if number else whole.problems),
            number,
            of,
        )
        for number, (start, stop) in enumerate(itertools.pairwise(cuts))
    ]


def _embed_file(
    args: argparse.Namespace,
    model: OmniRetriever | RayEmbedding,
    file: _File,
    tables: tuple[str, ...],
    made_with: Mapping[str, Any] | None,
    same: Mapping[str, Mapping[str, str]],
) -> tuple[int | None, int, int]:
    """Writes one file. Returns the exit status where it was stopped, how many records it has, and how many were skipped.

    A file of several that an earlier run of the same settings finished stays as it is.
    """
    import numpy as np

    from omni_jax.api import OmniRetriever
    from omni_jax.cli.stopping import Terminated, sigterm_raises
    from omni_jax.retrieval.embedding_file import finished, write_embeddings
    from omni_jax.retrieval.embedding_pass import assemble, same_in_other_parts
    from omni_jax.retrieval.journal import Journal
    from omni_jax.retrieval.rows import TRUNCATE_DIM, truncated

    settings = _settings(made_with, tables, file.manifest) | ({TRUNCATE_DIM: args.truncate_dim} if args.truncate_dim else {})
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()
    several = file.of > 1 and not args.part
    if several and (there := finished(file.out, digest)) is not None:
        print(f"{file.out}: {there} records, finished before", file=sys.stderr)
        return None, there, len(file.manifest.records) - there + len(file.manifest.problems)
    journal = Journal(file.out.with_name(f".{file.out.stem}.unfinished"), settings)
    known = journal.finished()
    left = [record for record in file.manifest.records if record.id not in known]
    try:
        with sigterm_raises():
            what = f"embed {file.index + 1}/{file.of}" if several else "embed"
            for part in embed(args, model, left, tables, what, done=len(file.manifest.records) - len(left), shapes=journal.shapes):
                journal.add(part)
    except (Terminated, KeyboardInterrupt) as e:
        kept = f"{len(journal.finished())} of {len(file.manifest.records)} records" + (f" of {file.out.name}" if several else "")
        by, status = ("SIGTERM", STOPPED_AND_SAVED) if isinstance(e, Terminated) else ("Ctrl-C", INTERRUPTED)
        print(f"\nstopped by {by}; {kept} are kept: run it again to resume", file=sys.stderr)
        return status, 0, 0
    outcome = assemble(file.manifest.records, journal.parts)
    bad = report(file.out, file.manifest, outcome)
    table = outcome.table
    if table.ids or several:
        rows = table.tables or {name: np.zeros((0, model.dim), np.float32) for name in tables}  # a set has all its files
        elsewhere = same_in_other_parts(same, set(table.ids))
        table = dataclasses.replace(table, tables=rows, made_with=made_with, parts=(file.index,), of=file.of, same=elsewhere)
        write_embeddings(file.out, truncated(table, args.truncate_dim), args.official_keys, digest if several else "")
        names = ", ".join(rows)
        print(f"{file.out}: {len(table.ids)} records, tables {names}; {outcome.padded_share:.0%} of the tokens were padding")
    journal.remove()
    if isinstance(model, OmniRetriever) and model.config.weights == "int8-dynamic" and args.sample and table.ids and not file.index:
        from omni_jax.cli.rounding_sample import loss_line

        print(loss_line(model, file.manifest.records, table, args.sample, lambda *a: embed(args, *a, what="int8 sample")))
    return None, len(table.ids), bad


def usable_tables(args: argparse.Namespace, manifest: Manifest, tables: tuple[str, ...] | None, out: epath.Path | None) -> tuple[str, ...]:
    """Returns the tables to fill, all that the fields allow where none were asked for; says what of the manifest is not used.

    Raises:
      InputError: when no record can fill any of them; the list of errors is then written.
    """
    for note in manifest.notes:
        print(f"{args.manifest}: {note}", file=sys.stderr)
    chosen = tables or tables_of(manifest.records)
    filled = {name: sum(TABLE_MODALITIES[name] <= r.modalities for r in manifest.records) for name in chosen}
    if not any(filled.values()):
        from omni_jax.retrieval.embedding_pass import Part, assemble

        why = f"has nothing of what the tables {', '.join(chosen)} need; add the fields or choose other --tables"
        unfit = Part(problems=tuple((r.id, f"record {r.id!r}: {why}") for r in manifest.records))
        report(out, manifest, assemble(manifest.records, [unfit]))
        first = manifest.problems[0].reason if manifest.problems else unfit.problems[0][1]
        listed = f"; {_beside(out, 'errors')} lists all" if out is not None else ""
        raise InputError(f"{args.manifest}: no record can be embedded; the first: {first}{listed}")
    fewer = [f"{name} {count}" for name, count in filled.items() if count < len(manifest.records)]
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


def report(out: epath.Path | None, manifest: Manifest, outcome: Outcome) -> int:
    """Prints the skipped and the repaired records and returns the number of skipped ones.

    With `out` the lists go to OUT.errors.jsonl and OUT.warnings.jsonl, and those of an earlier run are removed.
    """
    from omni_jax.data.manifest import Problem, write_jsonl_atomic

    failed = [Problem(r.id, r.line, _at_fault(r, reason), reason) for r, reason in outcome.problems]
    errors = [p.row() for p in sorted([*manifest.problems, *failed], key=lambda p: p.line)]
    warnings = [{"id": name, "reason": line} for name, line in outcome.warnings]
    for kind, rows, what in (("errors", errors, "skipped records"), ("warnings", warnings, "repaired records")):
        listed = ""
        if out is not None:
            path = _beside(out, kind)
            path.unlink(missing_ok=True)
            listed = f", listed in {path}"
            if rows:
                write_jsonl_atomic(path, rows)
        if rows:
            print(f"{what}: {len(rows)}{listed}; the first: {one_line(rows[0]['reason'])}", file=sys.stderr)
    if outcome.truncated:
        print(f"captions cut to max_text_tokens: {outcome.truncated}", file=sys.stderr)
    return len(errors)


def _at_fault(record: Record, reason: str) -> str:
    """Returns the media file that a reason begins with, "" where it is about the record itself."""
    return next((str(path) for path in (record.video, record.audio) if path and reason.startswith(f"{path}:")), "")


def _settings(made_with: Mapping[str, Any] | None, tables: tuple[str, ...], manifest: Manifest) -> dict[str, Any]:
    """Returns all that the embeddings depend on: an unfinished run resumes only under the same."""
    from omni_jax.api.made_with import media_digest

    return {
        **(made_with or {}),
        "tables": tables,
        "records": hashlib.blake2b(repr(manifest.records).encode(), digest_size=16).hexdigest(),
        "media": media_digest(manifest.records),
    }


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


def _part(text: str) -> tuple[int, int]:
    index, separator, count = text.partition("/")
    if not (separator and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N-1")
    return int(index), int(count)
