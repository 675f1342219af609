"""`omni-jax presets`: the same clips under every preset that the backbone has, side by side."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from etils import epath

from omni_jax.cli import embedding
from omni_jax.cli.argtypes import check_timeout
from omni_jax.cli.model_arguments import add_override_argument, load_model, named_model
from omni_jax.cli.source import read_source
from omni_jax.config import ConfigError, Preset, presets_for
from omni_jax.types import InputError

EXAMPLE = "omni-jax presets --model omni7b --manifest clips.jsonl --out presets"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    embedding.add_input_arguments(parser)
    add_override_argument(parser)
    parser.add_argument(
        "--presets", metavar="LIST", help="comma-separated, which ones (default: all of the backbone; wave takes up to 128 frames)"
    )
    parser.add_argument("--out", type=epath.Path, metavar="DIR", help="keep each preset's embedding file and error list in this folder")
    parser.add_argument(
        "--ties", choices=("optimistic", "average", "worst"), default="optimistic", help="as in eval (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Prints R@1 of the 12 directions, one column a preset, and returns the exit status."""
    check_timeout(args)
    Preset().override(args.overrides)  # a wrong one is answered before the model is looked for

    source = named_model(args)
    known = presets_for(source.config.prompt)
    names = [name.strip() for name in args.presets.split(",")] if args.presets else list(known)
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"--presets {args.presets}: {unknown[0]!r} is not a preset of this backbone; choose among {', '.join(known)}")
    chosen: dict[str, Preset] = {}
    refused: dict[str, ConfigError] = {}
    for name in names:
        try:
            chosen[name] = known[name].override(args.overrides)
        except ConfigError as e:
            refused[name] = e
    for name, e in refused.items():
        if args.presets or not chosen:
            raise ConfigError(f"preset {name}: {e}; leave it out of --presets, or the field out of --set")
        print(f"preset {name} is left out: {e}", file=sys.stderr)
    tables = embedding.parse_tables(args.tables)

    from omni_jax.retrieval import evaluate, format_comparison, write_embeddings
    from omni_jax.retrieval.embedding_pass import assemble

    manifest = read_source(args)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    tables = embedding.usable_tables(args, manifest, tables, args.out / "manifest.npz" if args.out else None)
    model = load_model(args, source, next(iter(chosen.values())))
    results, bad = {}, 0
    for name, preset in chosen.items():
        model.preset = preset
        parts = list(embedding.embed(args, model, manifest.records, tables, name))
        outcome = assemble(manifest.records, parts)
        if not outcome.table.ids:
            reason = outcome.problems[0][1] if outcome.problems else manifest.problems[0].reason
            raise InputError(f"{args.manifest}: no record could be embedded under preset {name}; the first: {reason}")
        out = args.out / f"{name}.npz" if args.out else None
        bad = max(bad, embedding.report(out, manifest, outcome))
        if out:
            write_embeddings(out, dataclasses.replace(outcome.table, made_with=model.made_with()))
        results[name] = evaluate(outcome.table, ties=args.ties)
    print(format_comparison(results))
    return 1 if bad else 0
