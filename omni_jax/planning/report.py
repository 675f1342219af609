"""A plan as JSON and as text. Every figure says where it comes from: the compiler, or arithmetic; nothing here was executed on a TPU."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from omni_jax.config import ModelConfig
from omni_jax.model import abstract_params
from omni_jax.parallel import batch_shards
from omni_jax.planning.advice import OutOfMemory, change_for
from omni_jax.planning.estimate import UTILISATION, Times, cost, memory_bytes, times
from omni_jax.planning.hlo import Collective
from omni_jax.planning.programs import Program, Setting
from omni_jax.train import ledger
from omni_jax.train.streams import TOWERS
from omni_jax.train.trainable import count_groups, select

SHOWN = 12  # collectives listed, those that move the most
LARGE = 150e6  # bytes


def train_record(setting: Setting, program: Program, mesh: Any, utilisation: float = UTILISATION) -> dict[str, Any]:
    """Returns the JSON record of a training step."""
    assert program.kind is not None and program.shapes is not None
    kind, recipe, n = program.kind, setting.recipe, setting.micro_batches
    cached = recipe.losses.negatives == "global" and n > 1
    trains = select(setting.config, recipe.trainable)
    load = ledger.padded_load(setting.config, kind, program.shapes)
    parts = ledger.scale(ledger.clip_ledger(setting.config, load, trains, remat=recipe.remat, cached=cached), setting.clips * n)
    trained = sum(count.trainable for count in count_groups(setting.config, trains))
    passes = part_passes(setting, cached, bool(kind.hard) and not kind.branches(setting.config.shares_prefix), trains)
    totals = {part: one.total for part, one in parts.items()}
    moved = memory_bytes(setting.config, totals, passes, setting.topology, setting.mesh["tensor"], trained)
    found = [dataclasses.replace(c, runs=c.runs * setting.looped) for c in program.found or ()]
    spent = times(sum(totals.values()), moved, found, setting.topology)
    memory, refusal = program.memory, program.refusal
    if refusal is None and memory is not None and not memory.fits:  # compiled, and over the limit all the same
        change = change_for([], setting.clips / batch_shards(mesh), n, recipe.losses.negatives, recipe.remat)
        refusal = OutOfMemory(memory.peak, memory.limit, (), change)
    return {
        **_head(dataclasses.replace(program, refusal=refusal)),
        "kind": {"hard": kind.hard, "singles": list(kind.singles), "rows": [list(names) for names in kind.rows]},
        "shapes": dataclasses.asdict(program.shapes),
        "clips_per_device": setting.clips / batch_shards(mesh),
        "operations": {part: dataclasses.asdict(one) | {"total": one.total} for part, one in parts.items()},
        "memory_bytes_per_device": moved,
        **_collectives(found if program.found is not None else None, setting.config),
        "seconds": dataclasses.asdict(spent) | {"bound": spent.bound, "least": spent.least, "expected": spent.expected(utilisation)},
        **_cost(setting, spent, utilisation),
    }


def plain_record(setting: Setting, program: Program) -> dict[str, Any]:
    """Returns the JSON record of a program that is not a training step."""
    if program.refusal is not None and program.name.startswith("embed"):  # `read_refusal` speaks of training
        change = f"{setting.embed_clips} clips are encoded together: take fewer (evaluation.batch_size; embed --batch-size), or more chips"
        program = dataclasses.replace(program, refusal=dataclasses.replace(program.refusal, change=change))
    return {**_head(program), **_collectives(program.found, setting.config)}


def part_passes(setting: Setting, cached: bool, own_row: bool, trains: frozenset[str]) -> dict[str, int]:
    """Returns part -> how often its matrices are read in an update."""
    again, recomputed = int(cached), int(setting.recipe.remat in ("layer", "offload", "attention"))
    graded = 2 + again  # forward, backward
    made = {tower: graded if any(name.startswith(f"{tower}/") for name in trains) else 1 for tower in TOWERS}
    made |= {"bridge": graded + own_row, "head": graded + own_row, "decoder": graded + recomputed + own_row}
    return {part: count * setting.micro_batches for part, count in made.items()}


def _head(program: Program) -> dict[str, Any]:
    memory, refusal = program.memory, program.refusal
    return {
        "program": program.name,
        "status": program.status,
        "compile_seconds": round(program.seconds, 1),
        "memory_gib": dataclasses.asdict(memory) if memory else None,
        "out_of_memory": dataclasses.asdict(refusal) if refusal else None,
    }


def _collectives(found: Sequence[Collective] | None, config: ModelConfig) -> dict[str, Any]:
    if found is None:
        return {"collectives": None}
    by_kind: dict[str, dict[str, float]] = {}
    for c in found:
        entry = by_kind.setdefault(c.kind, {"runs": 0, "bytes_moved": 0.0})
        entry["runs"] += c.runs
        entry["bytes_moved"] += c.moved
    largest = max(found, key=lambda c: c.bytes, default=None)
    return {
        "collectives": [dataclasses.asdict(c) | {"moved": c.moved} for c in found],
        "collectives_by_kind": by_kind,
        "largest_collective_bytes": largest.bytes if largest else 0,
        "large_outside_layers": [dataclasses.asdict(c) for c in found if c.bytes > LARGE and c.bytes not in _layer_bytes(config)],
    }


def _layer_bytes(config: ModelConfig) -> set[int]:
    """Bytes of each matrix of one layer, in bfloat16 and in float32: what a gather of it brings."""
    stacked = {math.prod(x.shape[1:]) for path, x in abstract_params(config).items() if "layers" in path and path[-1] == "kernel"}
    return {size * width for size in stacked for width in (2, 4)}


def _cost(setting: Setting, spent: Times, utilisation: float) -> dict[str, Any]:
    clips, chips = setting.clips * setting.micro_batches, setting.topology.chips
    return {
        "at_peak": cost(clips, spent.least, chips),
        "expected": cost(clips, spent.expected(utilisation), chips) | {"utilisation": utilisation},
    }


# ----------------------------------------------------------------------------------------------------------------------- as text


def text(plan: dict[str, Any]) -> str:
    """Returns a plan for people."""
    lines = [
        f"{plan['model']} on {plan['topology']} ({plan['chips']} chips), mesh {_pairs(plan['mesh'])}, "
        f"{plan['micro_batches']} x {plan['micro_batch']} clips an update, negatives={plan['negatives']}, remat={plan['remat']}",
        *plan["notes"],
    ]
    for program in plan["programs"]:
        lines += ["", *_program_lines(program)]
    if whole := plan.get("period"):
        lines += [
            "",
            f"all kinds in turn  {whole['clips_per_second']:.1f} clips/s and {whole['chip_hours_per_million_triples']:,.0f} chip-hours per "
            f"million triples expected (analytic, {whole['utilisation']:.0%} of peak arithmetic assumed)"
            + (f"; {whole['cost']:,.0f} at {whole['price']:g} a chip-hour" if whole.get("price") else ""),
        ]
    if load := plan.get("weights"):
        lines += ["", load["text"]]
    return "\n".join(lines)


def _program_lines(program: dict[str, Any]) -> list[str]:
    name = program["program"]
    if kind := program.get("kind"):
        name = f"train, hard negative {kind['hard']}, alone {'+'.join(kind['singles'])}"
    lines = [f"{name}: {program['status']}"]
    if memory := program["memory_gib"]:
        host = f", host {memory['host']:.2f}" if memory["host"] else ""
        lines.append(
            f"  memory        {memory['peak']:.2f} of {memory['limit']:.2f} GiB a device at the peak (compiler estimate); arguments "
            f"{memory['arguments']:.2f}, temporaries {memory['temporaries']:.2f}{host}"
        )
    if refusal := program["out_of_memory"]:
        lines.append(f"  needs         {refusal['used_gib']:.2f} GiB where {refusal['limit_gib']:.2f} are (compiler estimate)")
        lines += [f"                {size:.2f} GiB {shape} {place}" for size, shape, place in refusal["largest"]]
        lines.append(f"  change        {refusal['change']}")
    if operations := program.get("operations"):
        parts = ", ".join(f"{part} {one['total'] / 1e12:,.0f}" for part, one in operations.items())
        again = sum(one["recomputed"] + one["again"] for one in operations.values()) / 1e12
        whole = sum(one["total"] for one in operations.values()) / 1e12
        lines.append(f"  operations    {whole:,.0f} Tflop an update (analytic): {parts}; of these {again:,.0f} computed again")
    if found := program.get("collectives_by_kind"):
        kinds = ", ".join(f"{kind} x {entry['runs']:,.0f} = {entry['bytes_moved'] / 1e9:.2f} GB" for kind, entry in found.items())
        lines.append(
            f"  collectives   received by a device (compiler): {kinds}; largest {program['largest_collective_bytes'] / 1e6:.0f} MB"
        )
        for c in program["collectives"][:SHOWN]:
            where = " across slices" if c["across"] else ""
            lines.append(f"                {c['kind']} {c['shape'][:60]} x {c['runs']} of {c['group']}{where}  {c['source']}")
    if seconds := program.get("seconds"):
        spent = ", ".join(f"{name} {seconds[name]:.2f} s" for name in ("arithmetic", "memory", "interconnect", "network") if seconds[name])
        lines.append(f"  time          at published rates (analytic): {spent}; bound by {seconds['bound']}")
        best, likely = program["at_peak"], program["expected"]
        lines.append(
            f"  expected      {likely['clips_per_second']:.1f} clips/s, {likely['chip_hours_per_million_triples']:,.0f} chip-hours per "
            f"million triples at {likely['utilisation']:.0%} of peak (assumed); no better than {best['clips_per_second']:.1f} clips/s"
        )
    return lines


def _pairs(values: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in values.items())
