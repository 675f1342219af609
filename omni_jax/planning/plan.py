"""A run's config to its plan on a topology."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh

from omni_jax.config import ConfigError, ModelConfig
from omni_jax.planning import fitting, report, sweep
from omni_jax.planning.abstract import FRAMES_PER_SECOND
from omni_jax.planning.chips import read_topology
from omni_jax.planning.devices import MISSING, QUICK, has_compiler, planning_mesh, read_mesh
from omni_jax.planning.estimate import UTILISATION, cost
from omni_jax.planning.host_bytes import host_bytes
from omni_jax.planning.programs import Setting, Watch, embed_programs, evaluate_programs, train_program, unwatched
from omni_jax.planning.table import FULL_EFFORT
from omni_jax.train import RunConfig, step_kind
from omni_jax.train.remat import AUTO

BASIS = (
    "memory, collectives and predicted times: compiler estimates (libtpu, nothing was executed); "
    "operations, bounds and transfers: analytic, at published figures of the chips"
)
UNTIMED = "compiled quickly, which gives memory and collectives and no time; --full-effort predicts time and cost (minutes a program)"

LEFT_OUT = "the evaluator's programs are left out too: they are made for devices, which the compiler alone has"


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked: the run, its model, and the topology and mesh as text.

    Attributes:
      utilisation: share of peak arithmetic that expected figures assume.
      price: of a chip-hour, for the cost.
      full_effort: compiles as a run would, which predicts time.
      weights: how matrices are held, as in `ModelConfig`; None: as the run's config and its base say.
      watch: runs each compilation, as `programs.Setting` says.
    """

    run: RunConfig
    model: ModelConfig
    topology: str
    slices: int = 1
    mesh: str | None = None
    caption_tokens: int = 128
    utilisation: float = UTILISATION
    price: float | None = None
    full_effort: bool = False
    weights: str | None = None
    watch: Watch = unwatched

    def setting(self) -> Setting:
        """Returns the checked setting.

        Raises:
          ConfigError: topology unknown, a mesh that does not multiply, a tensor axis that does not divide the heads, sound without length.
        """
        run, decoder = self.run, self.model.decoder
        topology = read_topology(self.topology, self.slices)
        if self.full_effort:
            _ = topology.chip.clock  # refused before minutes are spent
        heads = decoder.num_heads, decoder.num_kv_heads
        own = ",".join(f"{name}={size}" for name, size in dataclasses.asdict(run.mesh).items() if size and name != "slices")
        sizes = read_mesh(self.mesh or own, topology, heads)
        preset = run.data.resolved_preset()
        if not round(preset.audio_seconds * FRAMES_PER_SECOND):
            about = f"config field data.preset={run.data.preset!r}: audio_seconds={preset.audio_seconds:g} has no one shape to plan for"
            raise ConfigError(f"{about}; give a length, as in --config.data.preset_fields.audio_seconds=8")
        held = "int8" if "int8" in (run.model.weights, self.model.weights) else "float"
        return Setting(
            config=self.model.with_weights("float"),
            weights=self.weights or held,
            recipe=run.step_config(1000),
            preset=preset,
            topology=topology,
            mesh=sizes,
            clips=run.batch.micro_batch,
            micro_batches=run.batch.micro_batches,
            blocks=run.batch.blocks,
            row_multiple=run.batch.row_multiple,
            caption_tokens=self.caption_tokens,
            dtype=run.model.dtype,
            embed_clips=run.evaluation.batch_size,
            options={} if self.full_effort else QUICK,
            watch=self.watch,
        )

    @property
    def assumed(self) -> float | None:
        """Share of the peak that expected figures assume; None where the compiler is here to say better."""
        return None if has_compiler() else self.utilisation


def make(
    request: Request,
    programs: Sequence[str] = ("train",),
    counts: Sequence[int] = (0, 1, 2),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Returns the plan: every program's memory, collectives, operations, time; the weights each host reads; notes on what is missing.

    Args:
      programs: among "train", "embed", "evaluate".
      counts: places in the period-3 cycle of training steps.
      say: takes a line on each remat that was compiled, where the run's is "auto".

    Raises:
      ConfigError: as `Request.setting`; a batch that does not divide; remat "auto" without libtpu.
    """
    setting = request.setting()
    if "train" in programs and setting.weights == "int8-dynamic":
        raise ConfigError(
            "--weights int8-dynamic: no gradient passes what is rounded on the fly; choose --weights int8, or --programs embed"
        )
    compiled = has_compiler()
    found = []
    if setting.recipe.remat == AUTO and "train" in programs:
        if not compiled:
            raise ConfigError("remat 'auto': libtpu is not installed, which is needed to find what fits (pip install 'omni-jax[tpu]')")
        setting = fitting.fit(setting, _different(setting, counts), say)
        found = [f"remat auto found  --config.remat={setting.recipe.remat}"]
    mesh = planning_mesh(setting.topology, dict(setting.mesh), compiled)
    if "train" in programs and setting.blocks % setting.topology.hosts:
        hosts = f"the {setting.topology.hosts} hosts of {setting.topology}"
        raise ConfigError(f"config field batch.blocks={setting.blocks}: {hosts} need whole blocks each; make it a multiple of them")
    records: list[dict[str, Any]] = []
    if "train" in programs:
        steps = [train_program(setting, mesh, count) for count in _different(setting, counts)]
        # An analytic figure is better than none where the compiler says nothing of time.
        silent = setting.timed and any(step.memory and step.timing is None for step in steps)
        records += [report.train_record(setting, step, mesh, request.utilisation if silent else request.assumed) for step in steps]
    if "embed" in programs:
        records += [report.plain_record(setting, program) for program in embed_programs(setting, mesh)]
    if "evaluate" in programs and isinstance(mesh, Mesh):
        records += [report.plain_record(setting, program) for program in evaluate_programs(setting, mesh)]
    evaluator = report.evaluator(setting, records)
    return {
        "model": "7B" if setting.config.decoder.num_layers == 28 else f"{setting.config.decoder.num_layers} layers",
        "topology": str(setting.topology),
        "chips": setting.topology.chips,
        "hosts": setting.topology.hosts,
        "slices": setting.topology.slices,
        "mesh": dict(setting.mesh),
        "micro_batch": setting.clips,
        "micro_batches": setting.micro_batches,
        "negatives": setting.recipe.losses.negatives,
        "remat": setting.recipe.remat,
        "caption_tokens": setting.caption_tokens,
        "attention": setting.kernel,
        "held": setting.weights,
        "basis": BASIS,
        "notes": [*found, *_compiler_note(setting), *([] if setting.timed else [UNTIMED])]
        if compiled
        else [MISSING, *([LEFT_OUT] if "evaluate" in programs else [])],
        "programs": records,
        "period": _period(setting, records, request),
        **({"evaluator": evaluator} if evaluator else {}),
        "weights": host_bytes(setting.trained if "train" in programs else setting.embedded, mesh, setting.topology),
    }


def swept(request: Request, count: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Returns what a sweep tried, the recommended choice first. Raises ConfigError as `Request.setting`; where libtpu is missing."""
    setting = request.setting()
    if not has_compiler():
        raise ConfigError(
            "--sweep: libtpu is not installed, which is needed to find what fits (pip install 'omni-jax[tpu]'; no TPU is needed)"
        )
    _ = setting.topology.chip.clock
    return sweep.sweep(setting, count, say, request.utilisation, [dict(setting.mesh)] if request.mesh else None)


def flags(choice: dict[str, Any]) -> str:
    """Returns a choice of the sweep as arguments of `omni-jax train` and `omni-jax compile`."""
    values = {f"mesh.{name}": size for name, size in choice["mesh"].items()} | {"remat": choice["remat"]}
    values |= {f"batch.{name}": choice[name] for name in ("micro_batch", "micro_batches", "blocks")}
    return " ".join(f"--config.{name}={value}" for name, value in values.items())


def command(request: Request, programs: Sequence[str], counts: Sequence[int]) -> str:
    """Returns the arguments of `omni-jax compile` that make this plan again, the config's own fields apart."""
    run = request.run
    parts = [f"--topology {request.topology}", *([f"--slices {request.slices}"] if request.slices > 1 else [])]
    parts += [f"--mesh {request.mesh}"] if request.mesh else []
    parts += [f"--weights {request.weights}"] if request.weights else []
    parts += [f"--programs {','.join(programs)}", f"--kinds {','.join(map(str, counts))}", f"--caption-tokens {request.caption_tokens}"]
    fields = {"losses.negatives": run.losses.negatives, "remat": run.remat, "batch.blocks": run.batch.blocks}
    fields |= {"batch.micro_batch": run.batch.micro_batch, "batch.micro_batches": run.batch.micro_batches}
    if not request.mesh:
        plain = dataclasses.asdict(type(run.mesh)())
        fields |= {f"mesh.{name}": size for name, size in dataclasses.asdict(run.mesh).items() if size != plain[name] and name != "slices"}
    line = " ".join([*parts, *(f"--config.{name}={value}" for name, value in fields.items())])
    return line + FULL_EFFORT if request.full_effort else line


def _compiler_note(setting: Setting) -> list[str]:
    """The compiler options that a run on this chip needs, as they were set here."""
    if not (options := setting.topology.chip.compiler):
        return []
    text = " ".join(f"--{name}={str(value).lower()}" for name, value in options)
    return [f"compiled with options without which libtpu 0.0.42 aborts on {setting.topology.chip.name}; run with LIBTPU_INIT_ARGS='{text}'"]


def _different(setting: Setting, counts: Sequence[int]) -> list[int]:
    """Counts whose step kinds differ."""
    kinds = {step_kind(count, setting.recipe.losses, setting.recipe.mined): count for count in reversed(counts)}
    return sorted(kinds.values())


def _period(setting: Setting, records: Sequence[dict[str, Any]], request: Request) -> dict[str, Any] | None:
    """All kinds in turn: the mean time of a step, predicted where every kind's is, or else as assumed."""
    steps = [record for record in records if "seconds" in record]
    predicted = all("predicted" in step for step in steps)
    seconds = [step["predicted_seconds"] if predicted else step["seconds"].get("expected") for step in steps]
    if not seconds or None in seconds:
        return None
    clips = setting.clips * setting.micro_batches
    mean = cost(clips, sum(seconds) / len(seconds), setting.topology.chips)
    price = {"price": request.price, "cost": request.price * mean["chip_hours_per_million_triples"]} if request.price else {}
    return {**mean, "utilisation": None if predicted else request.utilisation, **price}
