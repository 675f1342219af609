"""The learning part of `omni-jax demo`: clips, shards, training, the 12 directions of held-out clips, curves and PyTorch folders.

Each stage keeps what an earlier run of it finished, so that the demo can be stopped and started again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni_jax.cli.config_file import read_config
from omni_jax.cli.progress import Whole, duration
from omni_jax.cli.status import INTERRUPTED, STOPPED_AND_SAVED
from omni_jax.cli.stopping import Signals
from omni_jax.data.synthetic import SyntheticConfig, plan_clips, write_set
from omni_jax.types import InputError

if TYPE_CHECKING:
    from omni_jax.train import RunConfig

CONFIG = "tiny"
AVG_ALL, DIRECTION = 60.0, 25.0  # R@1 in percent that `make demo` must reach on 64 held-out clips, where chance is 1.6

NEXT = """Your own clips: a line {"id": "a", "text": "A dog barks.", "video": "a.mp4", "audio": "a.mp4"} of clips.jsonl for each, and
  omni-jax convert to-jax --base WAVE-7B --adapter OmniRetriever-7B --out omni7b   # the released weights, which you download
  omni-jax embed --model omni7b --manifest clips.jsonl --out clips.npz && omni-jax eval clips.npz   # README: search, train, export"""

CLIPS, SHARDS, TRAIN, SCORE, EXPORT = "make clips", "prepare shards", "train", "score the held-out clips", "write PyTorch folders"
SECONDS = {CLIPS: 12.0, SHARDS: 9.0, TRAIN: 271.0, SCORE: 5.0, EXPORT: 1.0}
"""Stage -> about what it takes on two cores of 2023 that do nothing else; a machine half as fast takes twice as long."""

SETTINGS = ".learning.json"
MARKS = ("config.json", "adapter_config.json", "synthetic.json", "preparation.json", "run.lock")
"""Files by which a folder is known as one that a demo wrote."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large the demo is: the clips, the config, and config fields that differ from it ("steps", 15)."""

    clips: SyntheticConfig = dataclasses.field(default_factory=SyntheticConfig)
    config: str = CONFIG
    changes: tuple[tuple[str, Any], ...] = ()


DEMO = Scale(config=f"{CONFIG}:quick")


class Stopped(Exception):
    """A command of the demo was stopped by a signal and has said what it saved; carries its exit status."""

    def __init__(self, status: int):
        super().__init__(f"stopped with status {status}")
        self.status = status


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage took: seconds on the clock, seconds of CPU of this process and its children."""

    name: str
    wall: float
    cpu: float


class Stages:
    """Times stages and announces them, to a bar of the whole where there is one; after each it stops where Ctrl-C was noted."""

    def __init__(self, signals: Signals, whole: Whole | None = None) -> None:
        self.done: list[Stage] = []
        self._signals, self._whole = signals, whole

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        print(f"\n== {name}", flush=True)
        if self._whole is not None:
            self._whole.part(name)
        wall, cpu = time.monotonic(), _cpu_seconds()
        yield
        self.done.append(Stage(name, time.monotonic() - wall, _cpu_seconds() - cpu))
        if self._signals.seen:
            raise KeyboardInterrupt

    def report(self) -> str:
        """Returns a line for each stage and one for all."""
        rows = [*self.done, Stage("in all", sum(s.wall for s in self.done), sum(s.cpu for s in self.done))]
        return "\n".join([f"{'stage':<32}{'wall s':>9}{'CPU s':>9}", *(f"{s.name:<32}{s.wall:>9.1f}{s.cpu:>9.1f}" for s in rows)])


def learn(out: Path, scale: Scale, signals: Signals) -> int:
    """Says what it is going to do, trains the small model, scores the held-out clips, prints what came out, and returns the exit status.

    Writes into `out`: clips/, shards/, run/ (the workdir), held_out.npz, .json and .html (the 12 directions), curves.html,
    learning.json, and what training made as PyTorch folders: torch_base/ and torch_adapter/. Ctrl-C and SIGTERM leave what is finished.

    Raises:
      InputError: when a folder of `out` holds something else.
      Stopped: when a signal ended a command that saves first.
    """
    print(f"\n{_announced(out, scale)}", flush=True)
    _begin(out, scale)
    with Whole("demo", SECONDS) as whole:
        stages = Stages(signals, whole)
        result, padding = _learn(out, scale, stages)
    print(f"\n{stages.report()}")
    print(f"\n{_said(result, padding)}\nreport {out / 'held_out.html'}, curves {out / 'curves.html'}")
    if scale is DEMO and (result["AVG-all"] < AVG_ALL or min(result["directions"].values()) < DIRECTION):
        print(f"the model has not learned what it should have: AVG-all {AVG_ALL:.0f} %, every direction {DIRECTION:.0f} %", file=sys.stderr)
        return 1
    print(f"\n{NEXT}")
    return 0


def _learn(out: Path, scale: Scale, stages: Stages) -> tuple[dict[str, Any], float | None]:
    """Goes through the stages; returns the scores as `_result` gives them, and the share of padding."""
    run, held, name = out / "run", out / "clips" / "held_out.jsonl", str(out / "held_out")
    _make_data(out, scale, stages)
    with stages(TRAIN):
        _train(out, run, scale)
    with stages(SCORE):
        for file in (f"{name}.npz", f"{name}.json"):  # of an earlier model perhaps
            Path(file).unlink(missing_ok=True)
        given = ["--model", str(run), "--manifest", str(held), "--out", f"{name}.npz", "--batch-size", "32"]
        _command(["embed", *given, *_preset(scale)])
        shown = ["--html", f"{name}.html", "--manifest", str(held), "--media", str(held.parent)]
        _command(["eval", f"{name}.npz", "--json", f"{name}.json", *shown])
    with stages(EXPORT):
        folders = {"--base-out": out / "torch_base", "--adapter-out": out / "torch_adapter"}
        for folder in folders.values():
            _remove_earlier(folder)
        _command(["convert", "to-torch", "--model", str(run), *(str(part) for pair in folders.items() for part in pair)])
    from omni_jax.api.training_curves import curves_page, read_rows

    rows = read_rows(run / "metrics.jsonl")
    (out / "curves.html").write_text(curves_page(rows, "training of the demo model"), encoding="utf-8")
    result, padding = _result(Path(f"{name}.json")), _padding(rows)
    stages_said = [dataclasses.asdict(stage) for stage in stages.done]
    (out / "learning.json").write_text(json.dumps({**result, "padding": padding, "stages": stages_said}, indent=1) + "\n")
    return result, padding


def _announced(out: Path, scale: Scale) -> str:
    """Returns what the learning part does, and how long it takes."""
    clips, run, seconds = plan_clips(scale.clips), _settings(scale), sum(SECONDS.values())
    held = sum(clip.held_out for clip in clips)
    return (
        f"Next, a small model learns: {len(clips) - held} mp4 files are made and prepared, {run.steps} steps of {run.batch.clips} clips "
        f"train it with all three losses,\nthe 12 directions of {held} clips that it never saw are scored, and PyTorch files are written. "
        f"That takes about {duration(seconds)} on two free cores,\n{duration(SECONDS[TRAIN])} of it training; twice that on slower ones. "
        f"Ctrl-C leaves what is finished in {out}, and the same command resumes."
    )


# ----------------------------------------------------------------------------------------------------------------- stages


def _make_data(out: Path, scale: Scale, stages: Stages) -> None:
    from omni_jax.cli.progress import Progress

    with stages(CLIPS), Progress(None, "clips") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.done)

        made = write_set(out / "clips", scale.clips, workers=_cores(), progress=progress)
        print(f"{made.written} mp4 files written, the others were there")
    with stages(SHARDS):
        arguments = ["prepare", "--manifest", str(made.train), "--out", str(out / "shards"), "--workers", str(_cores())]
        _command([*arguments, *_preset(scale)])


def _train(out: Path, workdir: Path, scale: Scale) -> None:
    import jax

    settings = {**dict(scale.changes), "data.train": out / "shards", "mesh.data": len(jax.devices()), "mesh.fsdp": 1}
    assigned = [f"--config.{field}={value}" for field, value in settings.items()]
    _command(["train", "--config", scale.config, "--workdir", str(workdir), *assigned])


def _command(arguments: list[str]) -> None:
    """Runs one command as a user would.

    Raises:
      Stopped: when a signal ended it.
      InputError: when it fails.
    """
    from omni_jax.cli.main import main

    print(f"$ omni-jax {' '.join(arguments)}", flush=True)
    status = main(arguments)
    if status in (INTERRUPTED, STOPPED_AND_SAVED):
        raise Stopped(status)
    if status:
        raise InputError(f"the demo stopped: omni-jax {arguments[0]} ended with status {status}; run the demo again to resume")


# ----------------------------------------------------------------------------------------------------------------- settings and results


def _settings(scale: Scale) -> RunConfig:
    """Returns the config of a scale with its changes."""
    return read_config(scale.config, [f"{field}={value}" for field, value in scale.changes])


def _preset(scale: Scale) -> list[str]:
    """Returns the arguments that make a command read clips as training does."""
    data = _settings(scale).data
    fields = [part for name, value in data.preset_fields.items() for part in ("--set", f"{name}={value}")]
    return ["--preset", data.preset, *fields]


def _result(file: Path) -> dict[str, Any]:
    """Returns R@1 by direction, their average, the size of the gallery and what chance gives, in percent."""
    scored = json.loads(file.read_text())
    directions = {name: row["R@1"] for name, row in scored["directions"].items()}
    return {"directions": directions, "AVG-all": scored["AVG-all"], "n": scored["n"], "chance": 100 / scored["n"]}


def _said(result: dict[str, Any], padding: float | None) -> str:
    weakest = min(result["directions"], key=result["directions"].get)
    share = "" if padding is None else f"; {100 * padding:.1f} % of the training tokens were padding"
    return (
        f"held-out clips, gallery of {result['n']}: AVG-all {result['AVG-all']:.1f} % (chance {result['chance']:.1f} %), "
        f"weakest {weakest} {result['directions'][weakest]:.1f} %{share}"
    )


def _padding(rows: Sequence[dict[str, Any]]) -> float | None:
    """Returns the share of padding among the tokens of a run, from its metrics."""
    used, total = (sum(row.get(name, 0) for row in rows) for name in ("used_tokens", "total_tokens"))
    return 1 - used / total if total else None


def _begin(out: Path, scale: Scale) -> None:
    """Notes the settings; what was made under others, by an earlier version perhaps, is removed."""
    run = _settings(scale)
    place = {"out": str(out.resolve()), "clips": dataclasses.asdict(scale.clips), "run": run.to_json()}
    kept, said = out / SETTINGS, json.dumps(place, indent=1) + "\n"
    if not kept.is_file() or kept.read_text() != said:
        for name in ("run", "shards", "clips"):
            _remove_earlier(out / name)
        kept.write_text(said)


def _remove_earlier(folder: Path) -> None:
    """Removes a folder that an earlier demo wrote. Raises InputError when it is not one."""
    if folder.exists():
        if not any((folder / name).is_file() for name in MARKS):
            raise InputError(f"{folder}: is not a folder of an earlier demo; choose another --out")
        print(f"{folder}: of an earlier demo, made again")
        shutil.rmtree(folder)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _cpu_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system
