"""`omni-jax mteb`: a model's scores on tasks of mteb, by mteb's own evaluator."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

from omni_jax.cli.argtypes import positive, whole
from omni_jax.cli.model_arguments import (
    add_model_arguments,
    add_preset_arguments,
    add_weights_arguments,
    check_preset,
    choose_preset,
    named_model,
)
from omni_jax.cli.printing import one_line
from omni_jax.cli.status import DONE, DONE_WITH_SKIPPED
from omni_jax.config import mteb_preset
from omni_jax.types import InputError

EXAMPLE = "omni-jax mteb --model omni7b --tasks ClothoT2ARetrieval --out mteb_results"

SHOWN = {"hit_rate_at_1": "R@1", "hit_rate_at_5": "R@5", "hit_rate_at_10": "R@10", "ndcg_at_10": "NDCG@10", "mrr_at_10": "MRR@10"}
"""Score of mteb -> what `omni-jax eval` calls it; with one right answer a query, recall_at_k is the same as hit_rate_at_k."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--tasks", nargs="+", required=True, metavar="NAME", help="tasks by mteb's names")
    parser.add_argument("--out", default="mteb_results", metavar="DIR", help="folder of results; tasks that have results there are skipped")
    add_preset_arguments(parser, "mteb, or nemotron_mteb: what mteb's own wrapper does")
    parser.add_argument("--name", metavar="ORGANIZATION/MODEL", help="name in the results (default: omni_jax/FOLDER)")
    parser.add_argument("--batch-size", type=positive(int), default=16, metavar="N", help="items encoded together (default: %(default)s)")
    parser.add_argument("--workers", type=whole, metavar="N", help="decoding processes (default: one less than the cores)")
    add_weights_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the tasks and prints their scores in percent; returns the exit status: 1 when a task failed or items could not be embedded."""
    check_preset(args)
    if args.name is not None and args.name.count("/") != 1:
        raise InputError(f"--name {args.name}: write ORGANIZATION/MODEL")
    if importlib.util.find_spec("mteb") is None or importlib.util.find_spec("torch") is None:
        raise InputError("mteb is not installed, or without torch; run pip install 'omni-jax[mteb]'")

    from omni_jax.api.mteb_encoder import OmniRetrieverEncoder
    from omni_jax.retrieval.table import aligned

    mteb: Any = importlib.import_module("mteb")
    try:
        tasks = mteb.get_tasks(tasks=args.tasks)
    except KeyError as e:
        raise InputError(f"--tasks: {one_line(str(e.args[0]).removeprefix('KeyError: '))}") from None
    source = named_model(args)
    args.preset = args.preset or mteb_preset(source.config.prompt)
    fields = {"name": args.name} if args.name else {}
    encoder = OmniRetrieverEncoder(str(source.home), preset=choose_preset(args, source), dtype=args.dtype, weights=args.weights, **fields)
    options: Any = {"batch_size": args.batch_size} | ({"workers": args.workers} if args.workers is not None else {})
    cache = mteb.ResultCache(args.out)
    results = mteb.evaluate(encoder, tasks, encode_kwargs=options, cache=cache, co2_tracker=False, raise_error=False)
    lines = [line for result in results.task_results for line in _lines(result)]
    print("\n".join(aligned([["task", "split", "subset", *SHOWN.values(), "main score"], *lines], rule_before=(1,))))
    print(f"\n{args.out}: results of {encoder.mteb_model_meta.name}, in percent; ties as mteb counts them")
    for failed in results.exceptions or ():
        print(f"omni-jax: {failed.task_name}: {one_line(failed.exception)}", file=sys.stderr)
    if encoder.failed:
        print(f"omni-jax: {encoder.failed} items could not be embedded; they count as zeros, which nothing is similar to", file=sys.stderr)
    return DONE_WITH_SKIPPED if results.exceptions or encoder.failed else DONE


def _lines(result: Any) -> Iterator[list[str]]:
    for split, subsets in result.scores.items():
        for scores in subsets:
            cells = [f"{100 * scores[key]:.2f}" if key in scores else "-" for key in (*SHOWN, "main_score")]
            yield [result.task_name, split, scores["hf_subset"], *cells]
