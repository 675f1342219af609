"""Numbers as arguments: what argparse reads them with."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterable
from typing import Any

from omni_jax.types import InputError

TIMEOUT_S = 120.0


def whole(text: str) -> int:
    """Returns a whole number, 0 or more."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def part(text: str) -> tuple[int, int]:
    """Returns which slice of how many."""
    index, separator, count = text.partition("/")
    if not (separator and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N-1")
    return int(index), int(count)


def finite(text: str) -> float:
    """Returns a number that is neither infinite nor NaN."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def check_apart(flag: str, out: os.PathLike[str] | str, inputs: Iterable[os.PathLike[str] | str]) -> None:
    """Raises InputError where an output is one of the inputs, which would be lost. An input may be TABLE=FILE."""
    names = [os.fspath(one) for one in inputs]
    paths = [path for name in names for path in (name, name.partition("=")[2]) if path]
    if os.path.realpath(out) in [os.path.realpath(path) for path in paths]:
        raise InputError(f"{flag} {out}: is read by this command, too, and would be lost; choose another name")


def add_truncate_dim(parser: argparse.ArgumentParser, what: str = "vectors") -> None:
    """Adds the dimensions that vectors are cut to, as `retrieval.rows.truncated` takes them."""
    parser.add_argument(
        "--truncate-dim",
        type=positive(int),
        metavar="N",
        help=f"keep the first N dimensions, scaled to length 1 again, of {what} (for models trained with losses.matryoshka_dims)",
    )


def add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds how a manifest's media are decoded, for `check_timeout`."""
    parser.add_argument("--workers", type=whole, metavar="N", help="decoding processes (default: one less than the cores)")
    parser.add_argument(
        "--timeout",
        type=positive(float),
        metavar="SECONDS",
        help=f"skip a clip whose decoding makes no progress for so long, or takes ten times as long (default: {TIMEOUT_S:g})",
    )


def check_timeout(args: argparse.Namespace) -> None:
    """Raises InputError for a time limit where no other process decodes, which alone can be stopped; sets it where none was given."""
    if args.timeout is not None and args.workers == 0:
        raise InputError(f"--timeout {args.timeout:g}: --workers 0 decodes in this process, which no limit stops; leave one of them out")
    args.timeout = args.timeout or TIMEOUT_S


def positive(kind: type) -> Callable[[str], Any]:
    """Returns a reader of numbers of a type that are above 0 and finite."""

    def read(text: str) -> float:
        value = kind(text)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(text)
        return value

    read.__name__ = f"positive {kind.__name__}"  # argparse shows it
    return read
