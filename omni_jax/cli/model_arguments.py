"""The model that a command asks for: its arguments, its preset, and whether it is the one that made an index."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from omni_jax.config import PREFIXES, PRESETS, Preset, preset
from omni_jax.config.made_with import held_otherwise, listed, made_otherwise, recorded_preset
from omni_jax.types import InputError

if TYPE_CHECKING:
    from omni_jax.api import OmniRetriever
    from omni_jax.api.weights import ModelSource


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of a model, as `named_model` takes it."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="converted folder, workdir of 'omni-jax train', folder of a PyTorch checkpoint, or its name on the Hub (owner/name)",
    )
    parser.add_argument("--adapter", metavar="MODEL", help="PEFT adapter of a PyTorch checkpoint: its folder or its name on the Hub")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of --model on the Hub (default: main)")
    parser.add_argument("--adapter-revision", metavar="REV", help="the same for --adapter")


def named_model(args: argparse.Namespace) -> ModelSource:
    """Opens the model that was asked for, fetched and converted where it is only published.

    Raises:
      InputError: when there is no such model.
    """
    from omni_jax.api.weights import find_model, open_model

    folder = find_model(args.model, args.adapter, revision=args.revision, adapter_revision=args.adapter_revision)
    return open_model(folder, weights=args.weights)


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds how the weights are held and computed with."""
    parser.add_argument("--dtype", choices=("keep", "bfloat16", "float32"), default="keep", help="weights and computation (default: keep)")
    parser.add_argument(
        "--weights",
        choices=("keep", "int8", "int8-dynamic"),
        default="keep",
        help="large matrices rounded to int8, half the memory of bfloat16; int8-dynamic rounds what they multiply too (default: keep)",
    )


def load_model(args: argparse.Namespace, source: ModelSource, chosen: Preset) -> OmniRetriever:
    from omni_jax.api import OmniRetriever

    return OmniRetriever.from_source(source, dtype=args.dtype, preset=chosen)


def add_preset_arguments(parser: argparse.ArgumentParser, usual: str = "the one that the model was trained with") -> None:
    """Adds the choice of a preset, for one model; `usual` says what is taken without it."""
    parser.add_argument("--preset", help=f"one of {', '.join(PRESETS)} (default: {usual})")
    add_override_argument(parser)
    parser.add_argument(
        "--prefix",
        choices=PREFIXES,
        help="prompt prefix of captions, for models trained with one (a record's `prefix` field takes precedence)",
    )


def add_override_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="overrides", help="override a preset field")


def check_preset(args: argparse.Namespace) -> None:
    """Raises ConfigError for a preset that is unknown, or a field that is: before anything is looked for."""
    (preset(args.preset) if args.preset else Preset()).override(args.overrides)


def choose_preset(args: argparse.Namespace, source: ModelSource, made_with: Mapping[str, Any] | None = None) -> Preset:
    """Returns the preset that the arguments of `add_preset_arguments` ask for.

    Args:
      source: the model.
      made_with: of an index that is searched: its preset is taken where the arguments name none.

    Raises:
      ConfigError: for one that is unknown, a field that is, or a preset made for another kind of backbone.
    """
    if args.preset:
        chosen = preset(args.preset)
    else:
        chosen = recorded_preset(made_with) if made_with is not None else source.preset
    chosen = chosen.override(args.overrides)
    chosen = dataclasses.replace(chosen, prefix=args.prefix or chosen.prefix)
    chosen.check(source.config.prompt)
    return chosen


def add_index_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds an index, and the model that searches it."""
    add_model_arguments(parser)
    parser.add_argument(
        "--index", action="append", required=True, metavar="FILE.npz", help="embedding file; repeat it for parts of one set"
    )
    add_preset_arguments(parser, "the one that the index was made with, or else the model's")
    parser.add_argument("--unchecked", action="store_true", help="search an index even if another model or preset made it")
    add_weights_arguments(parser)


def model_for_index(args: argparse.Namespace, recorded: Mapping[str, Any] | None) -> tuple[ModelSource, Preset, OmniRetriever]:
    """Returns the model that searches an index: where it is, its preset, and loaded. `recorded`: what the index was made with.

    Raises:
      InputError, ConfigError: where there is no such model or preset, or they did not make the index and the arguments do not allow that.
    """
    source = named_model(args)
    chosen = choose_preset(args, source, recorded)
    _check_origin(args, recorded, source, chosen)
    return source, chosen, load_model(args, source, chosen)


def _check_origin(args: argparse.Namespace, recorded: Mapping[str, Any] | None, source: ModelSource, chosen: Preset) -> None:
    """Compares what an index was made with (None: unknown) and what searches it, before weights are read.

    Raises:
      InputError: where the model or the preset is another, unless the arguments say that it may be.
    """
    if recorded is None:
        print(f"{args.index[0]}: what it was made with is not recorded; search it with the model and preset that made it", file=sys.stderr)
        return
    from omni_jax.api.made_with import made_with
    from omni_jax.retrieval.search import FREE

    here = made_with(source, chosen, dtype=args.dtype, recorded=recorded)
    found = made_otherwise(recorded, here, FREE)
    if held := held_otherwise(recorded, here):
        print(f"{args.index[0]}: was made with weights of another precision: {listed(held)}; cosines differ a little", file=sys.stderr)
    if found and not args.unchecked:
        raise InputError(
            f"{args.index[0]}: was made otherwise than --model {args.model} embeds: {listed(found)}; search with the model and preset that "
            f"made it, embed it again, or pass --unchecked to search anyway"
        )
    if found:
        print(f"{args.index[0]}: was made otherwise: {listed(found)}", file=sys.stderr)
