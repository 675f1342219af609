"""Entry point of `omni-jax`: finds the command's module, runs it, turns errors into one line and an exit status.

A command is a line of COMMANDS and a module of this folder with EXAMPLE (shown at the end of its --help), `add_arguments(parser)` and
`run(args) -> int`. The module is imported only when it is the one asked for.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import select
import signal
import sys
import textwrap
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from omni_jax import __version__
from omni_jax.cli.printing import log_on_stderr, one_line
from omni_jax.cli.status import BAD_INPUT, DONE, INTERRUPTED, STOPPED_AND_SAVED
from omni_jax.cli.stopping import second_ctrl_c_leaves
from omni_jax.config import ConfigError
from omni_jax.config.compile_cache import use_compile_cache
from omni_jax.config.extras import advice
from omni_jax.config.hub_name import is_hub_name
from omni_jax.config.libtpu import silence_libtpu
from omni_jax.config.simulated import let_devices_wait
from omni_jax.types import InputError

COMMANDS = {
    "demo": "compare a tiny checkpoint with PyTorch, then train a small model on synthetic clips and score clips it never saw",
    "convert": "convert PyTorch weights to JAX and back",
    "embed": "embed a manifest of clips and captions",
    "eval": "score an embedding file in the 12 directions between text, video, audio and their pairs",
    "presets": "embed and score the same clips under every preset, in one table",
    "search": "search an embedding file by text, audio, video or audio and video together",
    "serve": "search clips on a local page, and embed and search over HTTP",
    "export": "turn an embedding file into FAISS indexes, Parquet, .npy files or int8, with the recall that int8 costs",
    "mteb": "run tasks of mteb, whose data it downloads, and keep results that can be submitted",
    "manifest": "make a manifest from WebDataset tars, Parquet, tables or folders",
    "bench-data": "make a manifest from a public benchmark's annotations and the media you have",
    "mine": "find hard negatives for the records of a manifest",
    "prepare": "decode a manifest of clips into shards for training",
    "train": "train from a config, or resume a run",
    "ablate": "train with and without each loss, or any other field, over several seeds: one table with intervals",
    "push": "upload an adapter with a model card to the Hub, or write both to a folder",
    "smoke": "check devices, processes and storage with one step of a small model",
    "compile": "compile a run ahead of time for a TPU topology, without a TPU: memory, collectives, time, cost",
}
"""Command -> what it does, in one line, in the order of the help; the module of bench-data is bench_data.py."""

MODELS = ("--model", "--adapter")  # options whose values may be names on the Hub
ONLINE = ("mteb", "push")  # commands that use the network by what they are
UNCACHED = ("compile",)  # compiles for chips that are not there, to look at the programs


class _Parser(argparse.ArgumentParser):
    """A parser whose usage errors are one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def build_parser(name: str | None = None) -> argparse.ArgumentParser:
    """Returns the parser with the arguments of command `name`, or with none but the list of commands."""
    lines = "\n".join(f"  {command:<12}{about}" for command, about in COMMANDS.items())
    parser = _Parser(
        prog="omni-jax",
        usage="omni-jax [-h] [--version] [--debug] COMMAND ...",
        description="Embed, convert, train and evaluate text, video and audio with OmniRetriever-7B in JAX.",
        epilog=f"commands:\n{lines}\n\nexample:\n  omni-jax demo\n  omni-jax embed --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"omni-jax {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", prog="omni-jax", metavar="COMMAND", help=argparse.SUPPRESS)
    for command, about in COMMANDS.items():
        module = _load(command) if command == name else None
        sub = subparsers.add_parser(
            command,
            description=about,
            epilog=f"example:\n{textwrap.indent(getattr(module, 'EXAMPLE', ''), '  ')}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if module is not None:
            module.add_arguments(sub)
        # SUPPRESS keeps `omni-jax --debug embed` from being reset by the subparser's own default.
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1, 2, 75 or 130 as in status.py."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = next((a for a in arguments if not a.startswith("-")), None)
    _stay_offline(arguments, name)
    silence_libtpu()
    let_devices_wait()
    _clean_up_quietly()
    debug = "--debug" in arguments
    try:
        parser = build_parser(name)
        args = parser.parse_args(arguments)
        if args.command is None:
            parser.print_help(sys.stderr)
            return BAD_INPUT
        if args.command not in UNCACHED:
            use_compile_cache()
        with log_on_stderr(), second_ctrl_c_leaves():
            status = _load(args.command).run(args)
        sys.stdout.flush()
        return int(status or DONE)
    except SystemExit as e:  # argparse: 0 after --help
        return e.code if isinstance(e.code, int) else _report(str(e.code or "stopped"), debug)
    except KeyboardInterrupt:
        print("\nomni-jax: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (InputError, ConfigError, OSError) as e:
        if isinstance(e, BrokenPipeError) and _reader_left():
            # `omni-jax ... | head`: quiet, as other tools are. Python would complain once more when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        return _report(message(e), debug)
    except ModuleNotFoundError as e:
        return _report(advice(e.name) or _unexpected(e), debug)
    except Exception as e:
        return _report(_unexpected(e), debug)


def _unexpected(error: Exception) -> str:
    return f"unexpected {type(error).__name__}: {message(error)} (run again with --debug for the traceback)"


def entry() -> NoReturn:
    """Ends this process with the status of the command that its arguments ask for."""
    status = main()
    if status in (INTERRUPTED, STOPPED_AND_SAVED):
        # In the midst of compiling or computing, threads of XLA are still at work, and the interpreter's end takes from them what they use:
        # of runs stopped at random moments one in some tens ended with SIGSEGV. Everything is saved and said by now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def message(error: BaseException) -> str:
    """Returns the error as one line; an OSError as its reason and the file it is about."""
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename and error.strerror else str(error)
    return one_line(text) or type(error).__name__


def _report(line: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"omni-jax: {line}", file=sys.stderr)
    return BAD_INPUT


def _stay_offline(arguments: Sequence[str], command: str | None) -> None:
    """Keeps the libraries below from asking a hub for files that nobody named, and from printing advice about packages this project does
    without."""
    for name in ("HF_HUB_DISABLE_TELEMETRY", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        os.environ.setdefault(name, "1")
    named = (value for option, value in itertools.pairwise(arguments) if option in MODELS)
    glued = (value for option, _, value in (argument.partition("=") for argument in arguments) if option in MODELS)
    if command not in ONLINE and not any(is_hub_name(value) for value in (*named, *glued)):
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            os.environ.setdefault(name, "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _clean_up_quietly() -> None:
    """Keeps Python's tracker of shared memory from saying how much it removed after a run that was stopped: to remove it is its work."""
    rule = "ignore:resource_tracker:UserWarning"
    rules = [known for known in os.environ.get("PYTHONWARNINGS", "").split(",") if known]
    if rule not in rules:
        os.environ["PYTHONWARNINGS"] = ",".join([*rules, rule])


def _reader_left() -> bool:
    """Whether the reader of stdout has closed it; a broken pipe to a worker process is another matter and is reported."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):
        return False


def _load(command: str) -> ModuleType:
    return importlib.import_module(f"omni_jax.cli.{command.replace('-', '_')}")


if __name__ == "__main__":
    entry()
