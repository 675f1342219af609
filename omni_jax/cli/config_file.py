"""A run's config file with changes from the command line, and the model it is about."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etils import epath

from omni_jax.cli.printing import one_line
from omni_jax.config import BACKBONES, ConfigError
from omni_jax.config.backbones import WAVE_7B
from omni_jax.types import InputError

if TYPE_CHECKING:
    from omni_jax.config import ModelConfig
    from omni_jax.train import RunConfig
    from omni_jax.train.run_config import ModelSection

PREFIX = "--config."


def add_config_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Adds --config, required without a default, and --list-configs, and takes --config.a.b=value as changes (in `args.overrides`)."""
    about = "the run's config: a Python file, or the name of one that comes with the package; --config.a.b=value changes a field"
    parser.add_argument("--config", required=default is None, default=default, metavar="CONFIG", help=about)
    parser.add_argument("--list-configs", action=_ListConfigs, nargs=0, help="list the configs that come with the package, and exit")
    parse = parser.parse_known_args

    def known(args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        given = list(args or ())
        found, rest = parse([a for a in given if not a.startswith(PREFIX)], namespace)
        found.overrides = [a.removeprefix(PREFIX) for a in given if a.startswith(PREFIX)]
        return found, rest

    parser.parse_known_args = known  # type: ignore[method-assign]  # argparse knows no options whose names are open


class _ListConfigs(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        for name, file in packaged_configs().items():
            about = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            print(f"{name:<26}{about.partition(chr(10))[0]}")
        parser.exit()


def packaged_configs() -> dict[str, Path]:
    """Returns the configs that come with the package: name -> file."""
    from omni_jax import configs

    return {file.stem: file for file in sorted(Path(configs.__path__[0]).glob("*.py")) if file.stem != "__init__"}


def read_config(file: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Returns the run that a config describes, with "a.b=value" changes; FILE.py:TEXT and NAME:TEXT give TEXT to its get_config.

    Args:
      file: a Python file, or the name of a packaged config.

    Raises:
      InputError: for a file that is none.
      ConfigError: naming a field that cannot be used.
    """
    import ml_collections

    from omni_jax.train import RunConfig
    from omni_jax.train.plan import RENAMED, renamed

    name, colon, argument = file.partition(".py:")
    path = Path(f"{name}.py" if colon else file)
    if path.suffix != ".py":
        name, colon, argument = file.partition(":")
        path = packaged_configs().get(name, path)
    spec = importlib.util.spec_from_file_location("omni_jax_run_config", path) if path.suffix == ".py" else None
    if spec is None or spec.loader is None or not path.is_file():
        raise InputError(f"--config {file}: no such config; name a Python file, or one of {', '.join(packaged_configs())}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise InputError(f"--config {file}: defines no get_config()")
        made = module.get_config(*([argument] if colon else []))
    except (InputError, ConfigError):
        raise
    except Exception as e:  # whatever a person's own file does
        raise InputError(f"--config {file}: {type(e).__name__}: {one_line(str(e))}") from e
    if not isinstance(made, (dict, ml_collections.ConfigDict)):
        raise InputError(f"--config {file}: get_config() gave {type(made).__name__}; it must give a ConfigDict")
    values = made if isinstance(made, dict) else made.to_dict()
    if isinstance(losses := values.get("losses"), dict):
        _say_renamed([name for name in losses if name in RENAMED])
        values["losses"] = renamed(losses)
    for change in overrides:
        name, sign, text = change.partition("=")
        if (old := name.removeprefix("losses.")) in RENAMED:
            _say_renamed([old])
            name = f"losses.{RENAMED[old]}"
        *sections, field = name.split(".")
        if not sign or not field or not all(sections):
            raise ConfigError(f"{PREFIX}{change}: write {PREFIX}section.field=value")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{PREFIX}{change}: {section} has no fields")
        place[field] = _value(text, place.get(field))
    return RunConfig.from_config(values)


def _say_renamed(names: Sequence[str]) -> None:
    from omni_jax.train.plan import RENAMED

    for name in names:
        print(f"config field losses.{name} is now losses.{RENAMED[name]}; the old name is read by this version alone", file=sys.stderr)


def planned_model(section: ModelSection) -> tuple[ModelConfig, str | None]:
    """Returns the architecture of a run without reading weights, and a note where it had to be assumed."""
    if section.architecture:
        from omni_jax.config.components import CONTROL_TOKENS
        from omni_jax.conversion.fresh import model_config

        names = dict(zip(CONTROL_TOKENS.values(), range(len(CONTROL_TOKENS)), strict=True))
        return model_config(section.architecture, names, 1024, section.lora), None
    if (epath.Path(section.base) / "omni_jax.json").exists():
        from omni_jax.conversion.folder import read_manifest

        model = read_manifest(epath.Path(section.base)).model
        return _with_lora(model, section), None
    name = epath.Path(section.base).name
    if name in BACKBONES:
        return _with_lora(BACKBONES[name], section), f"base {section.base} is not here: planned for the published {name}"
    return _with_lora(WAVE_7B, section), f"base {section.base} is not here: planned for the published WAVE-7B"


def _with_lora(model: ModelConfig, section: ModelSection) -> ModelConfig:
    return model if section.lora is None else dataclasses.replace(model, lora=section.lora)


def _value(text: str, before: Any) -> Any:
    """Returns the value that a text means; where the field was a text before, the text itself."""
    if isinstance(before, str):
        return text
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
