"""Golden data as one object: what the PyTorch reference computed, and every parameter it was computed with."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax import config, types

HERE = Path(__file__).parent / "golden"


@dataclasses.dataclass(frozen=True)
class GoldenSet:
    """One golden folder. Arrays are read when first asked for.

    Attributes:
      dir: the folder, absolute.
    """

    dir: Path

    @functools.cached_property
    def spec(self) -> dict[str, Any]:
        """The parameters of the reference run."""
        return _json(self.dir / "spec.json")

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """`config.json` of the checkpoint."""
        return _json(self.checkpoint / "config.json")

    @functools.cached_property
    def adapter_config(self) -> dict[str, Any]:
        """`adapter_config.json` as PEFT wrote it."""
        return _json(self.adapter_dir / "adapter_config.json")

    @property
    def checkpoint(self) -> Path:
        return self.dir / "checkpoint"

    @property
    def adapter_dir(self) -> Path:
        return self.dir / "adapter"

    @property
    def manifest(self) -> Path:
        return self.dir / "manifest.jsonl"

    @functools.cached_property
    def inputs(self) -> Mapping[str, np.ndarray]:
        """`i/frames`, `i/ids/tva` ...: what enters the model."""
        return _npz(self.dir / "inputs.npz")

    @functools.cached_property
    def base(self) -> Mapping[str, np.ndarray]:
        """Outputs without the adapter (the only outputs of a set that has none)."""
        alone = self.dir / "outputs.npz"
        return _npz(alone if alone.exists() else self.dir / "outputs_base.npz")

    @functools.cached_property
    def adapter(self) -> Mapping[str, np.ndarray]:
        """Outputs with the adapter."""
        return _npz(self.dir / "outputs_adapter.npz")

    @functools.cached_property
    def losses(self) -> Mapping[str, np.ndarray]:
        """Losses, gradients and parameters of the reference's training steps."""
        return _npz(self.dir / "losses.npz")

    @functools.cached_property
    def clips(self) -> int:
        """Number of clips, counted from the array names."""
        return len({name.split("/")[0] for name in self.inputs if name.split("/")[0].isdigit()})

    @functools.cached_property
    def records(self) -> tuple[types.Record, ...]:
        """The manifest, with absolute paths."""
        lines = [line for line in self.manifest.read_text(encoding="utf-8").splitlines() if line.strip()]
        return tuple(self._record(json.loads(line), number) for number, line in enumerate(lines, 1))

    @functools.cached_property
    def preset(self) -> config.Preset:
        """The preset that the backbone was trained with, with the frame count, frame size and audio length of this set."""
        names = [f.name for f in dataclasses.fields(config.Preset) if f.name in self.spec]
        training = config.default_preset("chat" if self.config["model_type"] == "nvomniembed" else "plain")
        return dataclasses.replace(training, **{name: type(getattr(training, name))(self.spec[name]) for name in names})

    def _record(self, row: dict[str, Any], line: int) -> types.Record:
        paths = {name: (self.dir / row[name]).resolve() if row.get(name) else None for name in ("video", "audio")}
        span = row.get("timestamps")
        return types.Record(id=row["id"], text=row.get("text"), timestamps=tuple(span) if span else None, line=line, **paths)


def find(variable: str, default: str) -> GoldenSet:
    """Returns the set named by an environment variable, or tests/golden/`default`; fails, never skips, where it is missing."""
    folder = Path(os.environ.get(variable) or HERE / default).resolve()
    if not (folder / "spec.json").is_file():
        raise AssertionError(f"{variable}: no golden set at {folder} (spec.json is missing); golden tests are never skipped")
    return GoldenSet(folder)


def manifest_7b(name: str) -> dict[str, Any]:
    """Reads tests/golden/`name`_manifest.json: the tensors of a published checkpoint with their shapes."""
    return _json(HERE / f"{name}_manifest.json")


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _npz(path: Path) -> Mapping[str, np.ndarray]:
    return _Cached(np.load(path))


class _Cached(Mapping[str, np.ndarray]):
    """An npz file that reads each array once, when first asked for. Arrays are read-only: tests share them."""

    def __init__(self, archive: Any) -> None:
        self._archive = archive
        self._read: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._read:
            value = self._archive[name]
            value.setflags(write=False)
            self._read[name] = value
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._archive.files)

    def __len__(self) -> int:
        return len(self._archive.files)
