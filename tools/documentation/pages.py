"""Pages of the documentation that are made from the code: commands, config fields, presets and the metrics of a run."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from omni_jax.cli import main as cli
from omni_jax.config import LoraConfig, Preset
from omni_jax.config.batches import AugmentConfig
from omni_jax.config.presets import PRESETS
from omni_jax.train.board import CURVES
from omni_jax.train.run_config import RunConfig

KINDS = {int: "whole number", float: "number", str: "text", bool: "true or false", types.NoneType: "None", Any: "any value"}


def made() -> dict[str, str]:
    """Returns path below docs/ -> text of every page made here."""
    return {
        "reference/commands.md": commands_page(),
        "reference/config.md": config_page(),
        "reference/presets.md": presets_page(),
        "reference/run_metrics.md": run_metrics_page(),
    }


def commands_page() -> str:
    """Returns the page of all commands, from their argument parsers."""
    lines = [
        "# Commands",
        "Made from the argument parsers. `omni-jax COMMAND --help` prints the same. See also the [exit codes](exit_codes.md).",
        "Every command takes `--debug`, which adds the traceback to an error.",
    ]
    for name in cli.COMMANDS:
        parser = subparsers(cli.build_parser(name))[name]
        lines += _command(f"omni-jax {name}", parser, 2)
        for inner, below in subparsers(parser).items():
            lines += _command(f"omni-jax {name} {inner}", below, 3)
    return "\n\n".join(lines) + "\n"


def config_page() -> str:
    """Returns the page of every field of a run's config: name, type, default and meaning."""
    lines = [
        "# Configuration of a run",
        "Made from the dataclasses that read a config. `--config.SECTION.FIELD=VALUE` on the command line changes one field of a config "
        "file. An unknown field, or a value of the wrong type, is an error that names the field.",
        "A field without a default must be given. [Training](../guides/training.md) explains how the sections work together.",
    ]
    lines += ["## Fields of the run", _table(_fields(RunConfig, skip_records=True))]
    for field in dataclasses.fields(RunConfig):
        kind = typing.get_type_hints(RunConfig)[field.name]
        if dataclasses.is_dataclass(kind):
            hidden = {"total_steps"} if field.name == "optimizer" else set()  # it comes from `steps` or `epochs`
            lines += [f"## {field.name}", _intro(kind), _table(_fields(kind, field.name, hidden))]
    lines += ["## model.lora", _intro(LoraConfig), _table(_fields(LoraConfig, "model.lora"))]
    lines += ["## data.augment", _intro(AugmentConfig), _table(_fields(AugmentConfig, "data.augment"))]
    return "\n\n".join(lines) + "\n"


def presets_page() -> str:
    """Returns the page of the preset fields and of the value that each preset gives them."""
    names = list(PRESETS)
    fields = [field.name for field in dataclasses.fields(Preset)]
    rows = [[f"`{name}`", *(_value(getattr(PRESETS[preset], name)) for preset in names)] for name in fields]
    lines = [
        "# Presets, field by field",
        "Made from the code. `--set FIELD=VALUE` changes one field of a preset. [Presets](../guides/presets.md) says which one to choose.",
        "## Fields",
        _table(_fields(Preset)),
        "## Values of each preset",
        _markdown(["field", *(f"`{name}`" for name in names)], rows),
    ]
    return "\n\n".join(lines) + "\n"


def run_metrics_page() -> str:
    """Returns the page of what a run writes into metrics.jsonl and TensorBoard."""
    rows = [[f"`{name}`", f"`{tag}`", text] for name, (tag, text) in CURVES.items()]
    lines = [
        "# Metrics of a run",
        "Made from the code. Each line of `metrics.jsonl` has `step` and the metrics of that step. TensorBoard shows the same under the "
        "tags below. `grad_norm/GROUP` is the norm of one parameter group, `eval/...` are the figures of an evaluation. "
        "[Metrics](metrics.md) explains the figures of an evaluation.",
        _markdown(["metric", "TensorBoard", "meaning"], rows),
    ]
    return "\n\n".join(lines) + "\n"


def meanings(kind: type) -> dict[str, str]:
    """Returns field -> its meaning, as the `Attributes:` of a dataclass's docstring say it; an entry may name several fields."""
    found: dict[str, str] = {}
    _, _, section = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
    for entry in re.split(r"\n  (?=\w)", f"\n{section}")[1:]:
        names, _, text = entry.partition(":")
        found |= dict.fromkeys((name.strip() for name in names.split(",")), " ".join(text.split()))
    return found


def _fields(kind: type, where: str = "", hidden: set[str] = frozenset(), skip_records: bool = False) -> Iterator[list[str]]:
    """Yields name, type, default and meaning of the fields of a dataclass."""
    hints, said = typing.get_type_hints(kind), meanings(kind)
    for field in dataclasses.fields(kind):
        if field.name in hidden or (skip_records and dataclasses.is_dataclass(hints[field.name])):
            continue
        name = f"{where}.{field.name}" if where else field.name
        if field.default is not dataclasses.MISSING:
            default = _value(field.default)
        else:
            default = "required" if field.default_factory is dataclasses.MISSING else _value(field.default_factory())
        yield [f"`{name}`", _kind(hints[field.name]), default, said[field.name]]


def _table(rows: Iterator[list[str]]) -> str:
    return _markdown(["field", "type", "default", "meaning"], list(rows))


def _kind(kind: Any) -> str:
    """The type of a field in words."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_kind, options))
    if origin is tuple:
        return "list"
    if dataclasses.is_dataclass(kind) or (origin is not None and issubclass(origin, Mapping)):
        return "fields"
    return KINDS[kind]


def _value(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        return "see below"
    return f"`{value!r}`"


def _intro(kind: type) -> str:
    return " ".join(inspect.cleandoc(kind.__doc__ or "").partition("Attributes:")[0].split())


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next((dict(a.choices) for a in parser._actions if isinstance(a, argparse._SubParsersAction)), {})


def _command(name: str, parser: argparse.ArgumentParser, level: int) -> list[str]:
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction) or "--debug" in action.option_strings:
            continue
        shown = ", ".join(action.option_strings) or _metavar(action)
        value = _metavar(action) if action.option_strings and action.nargs != 0 else ""
        rows.append([f"`{f'{shown} {value}'.strip()}`", "yes" if action.required else "", _plain(action.help)])
    lines = [f"{'#' * level} {name}", _plain(parser.description)]
    if rows:
        usage = parser.format_usage().removeprefix("usage: ").strip()
        lines += [f"```text\n{usage}\n```", _markdown(["argument", "required", "meaning"], rows)]
    example = (parser.epilog or "").partition("example:\n")[2].strip()
    return [*lines, *([f"Example:\n\n```sh\n{inspect.cleandoc(example)}\n```"] if example else [])]


def _metavar(action: argparse.Action) -> str:
    if action.metavar:
        return action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar)
    return "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()


def _plain(text: str | None) -> str:
    """Help as a sentence of a page."""
    text = (text or "").replace("%%", "%")
    return f"{text[:1].upper()}{text[1:]}." if text and not text.endswith(".") else text


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *escaped))
