"""A training run wired together: weights, data, step, checkpoints, evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from clu.parameter_overview import get_parameter_overview
from etils import epath
from jax.sharding import Mesh

from omni_jax import conversion
from omni_jax.api.evaluation import Evaluator
from omni_jax.api.made_with import media_digest
from omni_jax.api.processes import check_equal, check_shared, on_all_processes, on_process_0
from omni_jax.api.shared import Shared
from omni_jax.api.start_report import data_notes, trained_too
from omni_jax.api.weights import base_digests
from omni_jax.config import ModelConfig, Preset
from omni_jax.config.compile_cache import cache_root, use_compile_cache
from omni_jax.conversion.folder import Manifest, read_manifest
from omni_jax.data.clips import ClipSource, digest_line
from omni_jax.data.manifest import Problem
from omni_jax.data.negatives import MinedNegatives, read_negatives
from omni_jax.data.pipeline import TrainPipeline
from omni_jax.data.plan import BatchConfig
from omni_jax.data.record_cache import RecordCache
from omni_jax.data.sources import MediaSource, open_source
from omni_jax.io.remote import absolute, check_holds_weights, is_remote
from omni_jax.model import param_shardings
from omni_jax.parallel import batch_axes, batch_shards, make_mesh
from omni_jax.tokens.tokenizer import Tokenizer
from omni_jax.train import RunConfig, TrainState, kinds_of_update, pack_update, report
from omni_jax.train.checkpoint import Checkpoints, one_line
from omni_jax.train.loop import LoopCallbacks, Row, train
from omni_jax.train.metrics import MetricsWriter, collapsed_in_row, evaluated
from omni_jax.train.skipped_records import SkippedRecords
from omni_jax.train.trainable import fresh_lora, over_int8
from omni_jax.train.workdir import (
    BASE,
    CHECKPOINTS,
    MEDIA_FILES,
    MINED,
    PRESET_FIELDS,
    TOKENIZER_FILES,
    WorkdirConfig,
    check_workdir_free,
    claim_workdir,
    read_config,
    run_lock,
)
from omni_jax.types import Clip, Features, InputError


@dataclasses.dataclass(frozen=True)
class TrainCallbacks:
    """What a run reports to its caller, and asks of it.

    Attributes:
      log: called with each message for the user, one line.
      begin: called with (first step, total steps, clips per step) when the loop begins.
      update: called with (step, metrics) after every step.
      stopping: whether to save a checkpoint and return.
    """

    log: Callable[[str], None]
    begin: Callable[[int, int, int], None]
    update: Callable[[int, Row], None]
    stopping: Callable[[], bool]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Where a run stands when it is left.

    Attributes:
      step, total: steps made, and steps in all.
      finished: whether all are made, and the evaluation after the last one.
    """

    step: int
    total: int
    finished: bool


def run_training(run: RunConfig, workdir: epath.PathLike, callbacks: TrainCallbacks, shared: Shared | None = None) -> Outcome:
    """Trains to the last step, or until `callbacks.stopping()`, saves a checkpoint and returns where the run stands.

    A run that was stopped in this workdir continues. Every process of a run calls it with the same arguments.

    Args:
      shared: what runs of this process share. None: nothing.

    Raises:
      InputError, ConfigError: for anything in the config, the data or the workdir that cannot be used.
    """
    check_holds_weights(workdir)
    folder = absolute(workdir)
    use_compile_cache()
    check_equal("the config", run.to_json())
    mesh = on_all_processes(lambda: _mesh(run))
    preset = run.data.resolved_preset()
    source = on_all_processes(lambda: _source(run, preset))
    problems: Sequence[Problem] = getattr(source, "problems", ())
    with contextlib.ExitStack() as held:
        on_process_0(lambda: check_workdir_free(folder))
        on_process_0(lambda: held.enter_context(run_lock(folder)))
        check_shared(folder)
        skipped = on_all_processes(lambda: SkippedRecords(folder, jax.process_index()))
        held.callback(skipped.close)
        listed = f"listed in {skipped.path}; the first"

        def keep(problems: Sequence[Problem]) -> None:
            on_process_0(lambda: [*(skipped.add(problem.row()) for problem in problems), skipped.sync()])

        if problems:
            callbacks.log(f"{run.data.train}: {len(problems)} records cannot be trained on, {listed}: {problems[0].reason}")
        # At once, for a start that fails; in the workdir of a run not before it is known to be this one.
        keep(problems if read_config(folder) is None else ())
        base = _base(run, folder, source.captions)
        manifest, model, tokenizer = on_all_processes(lambda: _model(base, run, preset))
        negatives = on_all_processes(lambda: mined_negatives(run, source))
        clips = clips_digest(source)
        programs = shared or Shared()
        kept = programs.features(f"{run.data.train} {clips}", preset)
        data = on_all_processes(lambda: _pipeline(run, source, tokenizer, model, kept, negatives))
        total = run.total_steps(data.planner.updates_per_epoch)
        step = programs.step(model, run.step_config(total), run.model.dtype, mesh)
        callbacks.log(report(step.groups))
        for note in data_notes(run, source, data.planner, total):
            callbacks.log(note)
        if manifest.model.weights != "float":
            callbacks.log(f"{base}: holds int8 matrices; those that train start from the restored values")
        if manifest.fresh:
            callbacks.log(f"freshly initialised in {base}: {', '.join(manifest.fresh)}")
        digests = {
            **base_digests(manifest),
            "clips": clips,
            **on_all_processes(lambda: _later_digests(tokenizer, preset, source)),
            **({MINED: negatives.digest} if negatives is not None else {}),
        }
        stored = BASE if not run.model.base else str(base)
        config = WorkdirConfig(run.to_json(), model, stored, digests, total)
        check_equal("what they train", {**digests, "updates": total})
        on_process_0(lambda: claim_workdir(folder, config))
        keep(problems)
        checkpoints = on_all_processes(lambda: Checkpoints(folder / CHECKPOINTS, run.checkpoint.keep))
        held.callback(checkpoints.close)
        check_equal("where the run stands", {"the newest checkpoint": checkpoints.newest()})
        state, frozen = step.init(_params(base, manifest, model, run, mesh, callbacks.log))
        state = _resumed(checkpoints, state, callbacks)
        start = int(state.step)
        writer = None
        if jax.process_index() == 0:
            trainable: dict[str, Any] = dict(state.trainable)
            writer = MetricsWriter(folder, start, run.to_json(), get_parameter_overview(trainable, include_stats=False))
            held.callback(writer.close)

        def row(number: int, values: Row) -> None:
            if writer is not None:
                writer.write(number, values)

        evaluator = None
        if run.evaluation.manifest:
            watched = (callbacks.log, callbacks.stopping, programs)
            evaluator = on_all_processes(lambda: Evaluator(run, folder, tokenizer, model, frozen, mesh, *watched))
            found = evaluator.problems
            keep(found)
            if found:
                callbacks.log(f"{run.evaluation.manifest}: {len(found)} records cannot be evaluated, {listed}: {found[0].reason}")
            if both := trained_too(source, evaluator.records):
                note = f"{len(both)} of {len(evaluator.records)} held-out clips are trained on as well, the first: {both[0]!r}"
                callbacks.log(f"{run.evaluation.manifest}: {note}; its figures do not measure generalisation")

        def replaced(number: int, name: str, reason: str) -> None:
            if skipped.add({"id": name, "update": number, "reason": reason}):
                callbacks.log(f"step {number}: record {name!r} was replaced by another: {reason} (listed in {skipped.path.name})")

        def written() -> None:
            skipped.sync()
            if writer is not None:
                writer.sync()

        callbacks.begin(start, total, run.batch.clips)
        loop_callbacks = LoopCallbacks(
            row=row,
            log=callbacks.log,
            update=callbacks.update,
            replaced=replaced,
            stopping=callbacks.stopping,
            saving=written,
            evaluate=evaluator,
            evaluated=lambda number: writer is not None and evaluated(folder, number),  # process 0 says it for all
            collapsed=lambda number: collapsed_in_row(folder, number),
        )
        try:
            state, done = train(
                step, state, frozen, mesh=mesh, run=run, total=total, data=data.batches, checkpoints=checkpoints, callbacks=loop_callbacks
            )
        except jax.errors.JaxRuntimeError as e:
            if jax.process_count() == 1:
                raise
            raise InputError(f"another process was lost ({one_line(e)}); {checkpoints.kept()}; start all processes again to resume") from e
        written()  # the figures of the last evaluation follow the last checkpoint, and closing complains of nothing
        return Outcome(int(state.step), total, done)


def _source(run: RunConfig, preset: Preset) -> ClipSource:
    """Returns the training clips; those in an object store are read through a cache on the local disk."""
    data, cache = run.data, None
    if is_remote(data.train):
        root = cache_root()
        if not data.cache and root is None:
            raise InputError(f"{data.train}: is read through a cache, and OMNI_JAX_CACHE switches that off; name a folder as data.cache")
        cache = RecordCache(Path(data.cache or f"{root}/clips").absolute(), int(data.cache_gb * 1e9), data.workers)
    return open_source(data.train, preset, data.media_root or None, timeout_s=data.timeout, cache=cache)


def _model(base: epath.Path, run: RunConfig, preset: Preset) -> tuple[Manifest, ModelConfig, Tokenizer]:
    """Returns what a base folder says, the architecture to train, and the tokenizer, all checked against each other."""
    manifest = read_manifest(base)
    model = _with_lora(manifest.model, run)
    if "int8" in (run.model.weights, model.weights):
        model = over_int8(model, run.trainable)
    preset.check(model.prompt)
    tokenizer = Tokenizer.from_pretrained(base)
    tokenizer.check(model.tokens)
    return manifest, model, tokenizer


def _mesh(run: RunConfig) -> Mesh | None:
    """Returns the mesh of all devices, None for one device. Raises InputError when they do not fit the config."""
    sizes = run.mesh
    if len(jax.devices()) == 1 and max(sizes.data, sizes.fsdp, sizes.tensor, sizes.slices) <= 1:
        return None
    try:
        mesh = make_mesh(sizes.data, sizes.fsdp or None, sizes.tensor, slices=sizes.slices)
    except ValueError as e:
        wanted = sizes.slices * sizes.data * (sizes.fsdp or 1) * sizes.tensor
        cpu = f"; on a CPU, JAX_NUM_CPU_DEVICES={wanted} in the environment shows as many" if jax.default_backend() == "cpu" else ""
        raise InputError(f"{e}; change --config.mesh.data, fsdp, tensor or slices{cpu}") from None
    ways = batch_shards(mesh)
    if run.batch.micro_batch % ways:
        raise InputError(
            f"a micro-batch of {run.batch.micro_batch} clips does not divide over {ways} batch shards ({' x '.join(batch_axes(mesh))}); "
            f"change batch.micro_batch or the mesh"
        )
    return mesh


def _base(run: RunConfig, workdir: epath.Path, captions: Sequence[str]) -> epath.Path:
    """Returns the folder of the base weights, drawn into the workdir where the config names none."""
    if run.model.base:
        return absolute(run.model.base)
    base = workdir / BASE

    def draw() -> None:
        from omni_jax.conversion.fresh import write_fresh

        started = read_config(workdir)
        if started is not None and started.base != BASE:
            raise InputError(f"{workdir}: holds another run, whose base is {started.base}; choose another --workdir")
        if started is None and base.exists():
            base.rmtree()  # of a start that failed before it was a run, perhaps with other settings
        if not base.exists():
            write_fresh(base, run.model.architecture or {}, seed=run.seed, captions=captions, lora=run.model.lora)

    on_process_0(draw)
    return base


def _with_lora(model: ModelConfig, run: RunConfig) -> ModelConfig:
    """Returns the architecture to train. Raises InputError where base and config ask for different adapters."""
    wanted = run.model.lora
    if wanted is None or model.lora == wanted:
        return model
    if model.lora is not None:
        raise InputError(
            f"{run.model.base or 'the base of this workdir'}: has an adapter of rank {model.lora.rank} already, and model.lora asks for "
            f"another; set model.lora to None to continue training it, or "
            + ("convert the base with --merge-adapter" if run.model.base else "choose another --workdir")
        )
    return dataclasses.replace(model, lora=wanted)


def _params(
    base: epath.Path, manifest: Manifest, model: ModelConfig, run: RunConfig, mesh: Mesh | None, log: Callable[[str], None]
) -> dict[tuple[str, ...], jax.Array]:
    """Returns every parameter on the devices; LoRA matrices that the base does not have are drawn."""
    shardings: Mapping[Any, Any] = param_shardings(model, mesh) if mesh is not None else {}

    def report_bytes(read: int, whole: int) -> None:
        if jax.process_count() > 1:
            log(f"weights: this process reads {read / 2**20:.2f} of {whole / 2**20:.2f} MiB")

    options = {"weights": model.weights, "kept": model.kept, "shardings": shardings, "report_bytes": report_bytes}
    found, params = conversion.load(base, manifest=manifest, **options)
    if model.lora is not None and found.lora is None:
        params |= fresh_lora(model, run.seed, shardings)
    return params


def mined_negatives(run: RunConfig, source: ClipSource) -> MinedNegatives | None:
    """Returns the mined hard negatives of a run's clips, None where it takes none. Raises InputError where they cannot be used."""
    if run.data.negatives == "shuffle":
        return None
    if not run.data.mined and not isinstance(source, MediaSource):
        raise InputError(
            f"data.negatives={run.data.negatives}: {run.data.train} is a prepared folder, which holds no mined negatives; give the "
            f"manifest that 'omni-jax mine' wrote of its clips (--config.data.mined=mined.jsonl)"
        )
    return read_negatives(run.data.mined or run.data.train, source, run.data.negatives)


def _pipeline(
    run: RunConfig,
    source: ClipSource,
    tokenizer: Tokenizer,
    model: ModelConfig,
    kept: dict[int, tuple[Clip, Features]] | None,
    negatives: MinedNegatives | None,
) -> TrainPipeline:
    sizes = run.batch
    return TrainPipeline(
        source,
        tokenizer=tokenizer,
        config=model,
        preset=run.data.resolved_preset(),
        batch=BatchConfig(**dataclasses.asdict(sizes), distinct=run.data.distinct, seed=run.seed),
        kinds=functools.partial(kinds_of_update, micro_batches=sizes.micro_batches, losses=run.losses, mined=negatives is not None),
        pack=functools.partial(pack_update, config=model),
        workers=run.data.workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        augment=run.data.augment,
        kept=kept,
        negatives=negatives,
    )


def _resumed(checkpoints: Checkpoints, state: TrainState, callbacks: TrainCallbacks) -> TrainState:
    restored = checkpoints.restore(state)
    for note in checkpoints.notes:
        callbacks.log(note)
    if restored is None:
        return state
    callbacks.log(f"resuming from step {int(restored.step)}")
    # What a checkpoint gives and what a step gives have the same layout: nothing is compiled twice.
    return jax.tree.map(lambda new, old: jax.device_put(jnp.asarray(new), old.sharding), restored, state)


def _later_digests(tokenizer: Tokenizer, preset: Preset, source: ClipSource) -> dict[str, str]:
    """Digests of what a run depends on besides weights and clips."""
    # Without what is as usual: a field that a later version adds changes nothing by its default.
    fields = {
        field.name: getattr(preset, field.name) for field in dataclasses.fields(preset) if getattr(preset, field.name) != field.default
    }
    digest = hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=16).hexdigest()
    found = {TOKENIZER_FILES: tokenizer.digest, PRESET_FIELDS: digest}
    # Sizes alone: copies of the files on several hosts were written at different times.
    return found | ({MEDIA_FILES: media_digest(source.records, times=False)} if isinstance(source, MediaSource) else {})


def clips_digest(source: ClipSource) -> str:
    """Returns a digest of all that is known of the clips before one is read: the same in every process and at every start."""
    if (known := getattr(source, "digest", None)) is not None:
        return known
    digest = hashlib.blake2b(digest_size=16)
    for number in range(len(source)):
        digest.update(digest_line(source.record(number)))
    return digest.hexdigest()
