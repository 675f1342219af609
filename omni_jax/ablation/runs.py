"""The runs of an ablation, one by one, by the public training API; those that an earlier call finished are not made again.

DIR/clips/               synthetic clips, where the config asks for them
DIR/costs.json           CPU seconds of a step of each arm
DIR/warm/LOSSES/seed0/   the run that arms of a warm start begin with; its model is base/
DIR/runs/START/ARM/STEPS-seed0/   a workdir; score.json when it is done; its messages are in the file beside it that ends in .log
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax

from omni_jax.ablation.arms import losses_of
from omni_jax.ablation.intervals import LEAST
from omni_jax.api.retriever import OmniRetriever
from omni_jax.api.shared import Shared
from omni_jax.api.training import TrainCallbacks, run_training
from omni_jax.data.synthetic_parts import PartsConfig, write_parts
from omni_jax.io import atomic_write_text
from omni_jax.retrieval.directions import AVERAGES, DIRECTIONS
from omni_jax.train import RunConfig
from omni_jax.train.run_config import EvaluationSection
from omni_jax.types import InputError

SYNTHETIC = "synthetic"
"""Value of `data.train` that stands for clips made on the spot."""

STARTS = ("random", "base", "warm")
EQUAL = ("steps", "cpu_time")
SCORE = "score.json"
FIRST, TIMED = 15, 30  # steps before the clock of a cost begins, which compile, and steps that are timed: whole periods of the schedule
WARM = {"t": "av", "a": "tv", "v": "at"}  # a modality -> the two whose joint embedding must find it better than each of them does


class Stopped(Exception):
    """A signal came; what is finished is kept."""


@dataclasses.dataclass(frozen=True)
class AblationCallbacks:
    """What an ablation reports to its caller, and asks of it.

    Attributes:
      begin: called with (what begins, its steps, steps of it that are made already).
      advance: called with the number of steps made.
      finished: called after each of `Ablation.runs`.
      stopping: whether to save and leave.
    """

    begin: Callable[[str, int, int], None]
    advance: Callable[[int], None]
    finished: Callable[[], None]
    stopping: Callable[[], bool]


@dataclasses.dataclass(frozen=True)
class Ablation:
    """What is compared.

    Attributes:
      out: folder of everything.
      arms: name -> config of its runs; the first is what the others are compared with.
      seeds: how many: 0, 1, ...; a seed decides a run's first weights, its order of clips, augmentations and hard negatives, not its clips.
      start: "random": the weights that each run draws. "base": those of `model.base`. "warm": those that `warm_losses` reach from either.
      equal: "steps": every arm makes its config's steps. "cpu_time": every arm makes so many as take the CPU time of the first arm's.
      parts: the synthetic clips.
      warm_steps, warm_every: most steps of a warm start, and steps between two looks whether it is reached.
      warm_losses: sum of losses of a warm start.
      warm_margin: points of R@1 by which it is reached, see `warm_start`.
    """

    out: Path
    arms: Mapping[str, RunConfig]
    seeds: int
    start: str = "random"
    equal: str = "steps"
    parts: PartsConfig = dataclasses.field(default_factory=PartsConfig)
    warm_steps: int = 1200
    warm_every: int = 100
    warm_losses: str = "L_A"
    warm_margin: float = 5.0

    def __post_init__(self) -> None:
        losses_of(self.warm_losses, f"--warm-losses {self.warm_losses}")
        if self.seeds < LEAST:
            raise InputError(f"--seeds {self.seeds}: an interval over seeds needs at least {LEAST}")
        for name, run in self.arms.items():
            has_base = bool(run.model.base)
            if (self.start == "base" and not has_base) or (self.start == "random" and has_base):
                raise InputError(
                    f"--start {self.start}: model.base of arm {name!r} is {run.model.base or 'empty'!r}; "
                    f"use --start {'random' if self.start == 'base' else 'base'} or warm"
                )
            if run.data.train != SYNTHETIC and not run.evaluation.manifest:
                raise InputError(f"arm {name!r} has no held-out clips; name them with --config.evaluation.manifest=")
            if run.epochs:
                raise InputError(f"arm {name!r}: an ablation counts steps; set --config.steps= and --config.epochs=0")
            if self.equal == "cpu_time" and (jax.default_backend() != "cpu" or run.data.workers):
                raise InputError(
                    "--equal cpu_time counts the CPU time of this process alone: run on a CPU and set --config.data.workers=0, "
                    "or use --equal steps"
                )

    @property
    def runs(self) -> int:
        """How many runs there are: one of each arm for its cost, the warm starts, and one of each arm and seed."""
        return len(self.arms) * (1 + self.seeds) + self.seeds * (self.start == "warm")

    @property
    def synthetic(self) -> bool:
        """Whether clips are made on the spot."""
        return any(run.data.train == SYNTHETIC for run in self.arms.values())


Scores = dict[str, float]
"""R@1 in percent of the 12 directions, the averages, and AVG-all of each of `evaluation.truncate_dims`."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the runs of an ablation gave.

    Attributes:
      steps: arm -> steps of each of its runs.
      seconds_per_step: arm -> CPU seconds.
      scores: arm -> the scores of each seed.
      warm: of each seed the steps of its warm start and what it then reached on other clips than those that are scored; empty without.
    """

    steps: Mapping[str, int]
    seconds_per_step: Mapping[str, float]
    scores: Mapping[str, Sequence[Scores]]
    warm: Sequence[Mapping[str, float]]


def carry_out(ablation: Ablation, callbacks: AblationCallbacks) -> Outcome:
    """Makes the runs that are not finished and returns what all of them gave.

    Seeds are the outer loop, so that an ablation that was stopped can be read for fewer seeds.

    Raises:
      Stopped: when `callbacks.stopping()` says so.
      InputError, ConfigError: for a config, clips or a folder that cannot be used, or a warm start that is not reached.
    """
    # All arms find the features of synthetic clips: none pays for them in its cost.
    shared = Shared(keep_features=ablation.synthetic)
    costs = measure_costs(ablation, callbacks, shared)
    first = next(iter(ablation.arms))
    budget = ablation.arms[first].steps * costs[first]
    steps = {name: run.steps if ablation.equal == "steps" else max(1, round(budget / costs[name])) for name, run in ablation.arms.items()}
    scores: dict[str, list[Scores]] = {name: [] for name in ablation.arms}
    warm = []
    for seed in range(ablation.seeds):
        base = ""
        if ablation.start == "warm":
            folder, reached = warm_start(ablation, seed, callbacks, shared)
            base = str(folder)
            warm.append(reached)
            callbacks.finished()
        for name, run in ablation.arms.items():
            made = dataclasses.replace(on_clips(ablation, run), seed=seed, steps=steps[name])
            if base:
                made = from_base(made, base)
            workdir = ablation.out / "runs" / ablation.start / slug(name) / f"{steps[name]}-seed{seed}"
            scores[name].append(score_of(made, workdir, f"{name}, {ablation.start} start, seed {seed}", callbacks, shared))
            callbacks.finished()
    return Outcome(steps, costs, scores, warm)


def measure_costs(ablation: Ablation, callbacks: AblationCallbacks, shared: Shared) -> dict[str, float]:
    """Returns CPU seconds of a step by arm. They are measured once for a folder and kept there, so that the runs that follow from them,
    and the table, are the same however often they are interrupted."""
    file = ablation.out / "costs.json"
    kept: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    found = {}
    for name, run in ablation.arms.items():
        known = run.to_json()
        if kept.get(name, {}).get("config") != known:
            # The program of the arm's own runs; the clock stops the run.
            timed = dataclasses.replace(on_clips(ablation, run), steps=max(run.steps, FIRST + TIMED), evaluation=EvaluationSection())
            workdir = ablation.out / "costs"
            shutil.rmtree(workdir, ignore_errors=True)  # a time that was interrupted is not known
            clock = _Clock()
            _trained(timed, workdir, f"cost of {name}", callbacks, shared, seen=clock, enough=lambda clock=clock: clock.done)
            shutil.rmtree(workdir)
            kept[name] = {"seconds_per_step": (clock.marks[FIRST + TIMED - 1] - clock.marks[FIRST - 1]) / TIMED, "config": known}
            atomic_write_text(file, json.dumps(kept, indent=1) + "\n")
        callbacks.finished()
        found[name] = float(kept[name]["seconds_per_step"])
    return found


def warm_start(ablation: Ablation, seed: int, callbacks: AblationCallbacks, shared: Shared) -> tuple[Path, dict[str, float]]:
    """Returns the folder of a model that `warm_losses` trained until some two modalities together find the third, and are found by it,
    better by `warm_margin` points than the better of the two alone; and what it reached. Looked for every `warm_every` steps, on the
    validation clips.

    Raises:
      InputError: when that is not reached within `warm_steps`.
      Stopped: when the callbacks say so.
    """
    folder = ablation.out / "warm" / slug(ablation.warm_losses) / f"seed{seed}"
    run = next(iter(ablation.arms.values()))
    run = on_clips(ablation, run, gallery="validation")
    run = dataclasses.replace(
        run,
        seed=seed,
        steps=ablation.warm_steps,
        losses=dataclasses.replace(run.losses, weights=dict.fromkeys(losses_of(ablation.warm_losses, "--warm-losses"), 1.0), scalars={}),
        evaluation=dataclasses.replace(run.evaluation, every=ablation.warm_every),
    )
    reached, base = folder / "reached.json", folder / "base"
    looked = functools.partial(_looked, folder / "run", ablation.warm_margin)
    if not base.is_dir():
        _trained(run, folder / "run", f"warm start, seed {seed}", callbacks, shared, enough=lambda: looked()[1] is not None)
        last, found = looked()
        if found is None:
            raise InputError(
                f"warm start of seed {seed}: after {ablation.warm_steps} steps of {ablation.warm_losses} no two modalities together "
                f"beat the better of the two by {ablation.warm_margin:g} points of R@1 ({_said(last)}); raise --warm-steps, or use other "
                "--warm-losses"
            )
        atomic_write_text(reached, json.dumps(found) + "\n")
        OmniRetriever.from_pretrained(folder / "run", step=int(found["steps"])).save(base)
    return base.absolute(), json.loads(reached.read_text())


def _looked(workdir: Path, margin: float) -> tuple[dict[str, float], dict[str, float] | None]:
    """Returns what the newest evaluation shows, and the first one that shows a warm start; None where none does."""
    last: dict[str, float] = {}
    for file in sorted((workdir / "evaluations").glob("*.json"), key=lambda path: int(path.stem)):
        rates = {name: row["R@1"] for name, row in json.loads(file.read_text())["directions"].items()}
        last = {"steps": int(file.stem), **rates}
        if any(min(_gain(rates, f"{x}2{{}}", joint), _gain(rates, f"{{}}2{x}", joint)) >= margin for x, joint in WARM.items()):
            return last, last
    return last, None


def _gain(rates: Mapping[str, float], direction: str, joint: str) -> float:
    """Returns by how much a joint embedding beats the better one of its two modalities in a direction."""
    return rates[direction.format(joint)] - max(rates[direction.format(one)] for one in joint)


def _said(found: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in found.items() if name != "steps")


def score_of(run: RunConfig, workdir: Path, what: str, callbacks: AblationCallbacks, shared: Shared) -> Scores:
    """Trains, or resumes, and returns the scores after the last step; those of an earlier call where it finished.

    Raises:
      InputError: where the workdir holds a run of another config.
    """
    file, said = workdir / SCORE, json.loads(json.dumps(run.to_json()))
    if file.exists():
        kept = json.loads(file.read_text())
        if kept["config"] != said:
            raise InputError(f"{workdir}: holds a run of another config; choose another --out, or another name for the arm")
        callbacks.begin(what, run.steps, run.steps)
        return kept["scores"]
    _trained(run, workdir, what, callbacks, shared)
    result = json.loads((workdir / "evaluations" / f"{run.steps}.json").read_text())
    scores = {name: result["directions"][name]["R@1"] for name in DIRECTIONS} | {name: result[name] for name in AVERAGES}
    scores |= {f"AVG-all@{dim}": found["AVG-all"] for dim, found in result.get("truncated", {}).items()}
    atomic_write_text(file, json.dumps({"scores": scores, "config": said}) + "\n")
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    shutil.rmtree(workdir / "base", ignore_errors=True)
    return scores


def on_clips(ablation: Ablation, run: RunConfig, gallery: str = "test") -> RunConfig:
    """Returns a run on the synthetic clips, scored on one of their galleries; a run on clips of its own stays as it is."""
    if run.data.train != SYNTHETIC:
        return run
    folders = write_parts(ablation.out / "clips", ablation.parts, run.data.resolved_preset())
    return dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, train=str(folders["train"].absolute())),
        evaluation=dataclasses.replace(run.evaluation, manifest=str(folders[gallery].absolute())),
    )


def from_base(run: RunConfig, base: str) -> RunConfig:
    """Returns a run that starts from a converted folder in place of weights of its own."""
    return dataclasses.replace(run, model=dataclasses.replace(run.model, base=base, architecture=None))


def slug(name: str) -> str:
    """Returns an arm's name as the name of a folder, another one for another name."""
    return quote(name, safe="+ ,=")


def _trained(
    run: RunConfig,
    workdir: Path,
    what: str,
    callbacks: AblationCallbacks,
    shared: Shared,
    seen: Callable[[int], None] = lambda step: None,
    enough: Callable[[], bool] = lambda: False,
) -> None:
    """Trains to the last step, or until it is enough. Raises Stopped when the callbacks say so."""
    at = 0

    def begin(done: int, total: int, clips: int) -> None:
        nonlocal at
        at = done
        callbacks.begin(what, total, done)

    def update(step: int, row: Mapping[str, float]) -> None:
        nonlocal at
        seen(step)
        callbacks.advance(step - at)
        at = step

    workdir.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{workdir}.log").open("a", encoding="utf-8") as log:
        training = TrainCallbacks(
            log=lambda line: log.writelines((line, "\n")), begin=begin, update=update, stopping=lambda: callbacks.stopping() or enough()
        )
        outcome = run_training(run, workdir, training, shared)
    if not outcome.finished and not enough():
        raise Stopped(what)


class _Clock:
    """Notes the CPU seconds of this process after each step."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    @property
    def done(self) -> bool:
        """Whether all steps are made that are timed."""
        return len(self.marks) >= FIRST + TIMED

    def __call__(self, step: int) -> None:
        spent = os.times()
        self.marks.append(spent.user + spent.system)
