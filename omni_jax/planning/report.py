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
from omni_jax.planning.programs import EVALUATED, Program, Setting
from omni_jax.planning.step_flops import clip_flops, padded_counts, scale
from omni_jax.planning.timing import KERNEL_SHARE
from omni_jax.retrieval.ranks import tile_side
from omni_jax.towers import NAMES
from omni_jax.train import remat
from omni_jax.train.trainable import count_groups, select

SHOWN = 12  # collectives listed, those that move the most
DIRECTIONS = 12  # that the evaluator ranks
SOURCES = 20  # operations listed by source, the most expensive
LARGE = 150e6  # bytes


def train_record(setting: Setting, program: Program, mesh: Any, utilisation: float | None = UTILISATION) -> dict[str, Any]:
    """Returns the JSON record of a training step.

    Args:
      utilisation: share of the peak that "expected" assumes; None leaves expected figures out.
    """
    assert program.kind is not None and program.shapes is not None
    kind, recipe, n = program.kind, setting.recipe, setting.micro_batches
    cached = recipe.losses.negatives == "global" and n > 1
    trains = select(setting.config, recipe.trainable)
    counts = padded_counts(setting.config, kind, program.shapes)
    parts = scale(clip_flops(setting.config, counts, trains, remat=recipe.remat, cached=cached), setting.clips * n)
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
        "kind": {"hard": kind.hard, "singles": [*kind.singles, *kind.duals], "rows": [list(names) for names in kind.rows]},
        "shapes": dataclasses.asdict(program.shapes),
        "clips_per_device": setting.clips / batch_shards(mesh),
        "operations": {part: dataclasses.asdict(one) | {"total": one.total} for part, one in parts.items()},
        "memory_bytes_per_device": moved,
        **_collectives(found if program.found is not None else None, setting.config),
        "seconds": dataclasses.asdict(spent)
        | {"bound": spent.bound, "least": spent.least}
        | ({} if utilisation is None else {"expected": spent.expected(utilisation)}),
        **_timing(setting, program, spent.arithmetic, setting.looped),
        **_cost(setting, program, spent, utilisation),
    }


def plain_record(setting: Setting, program: Program) -> dict[str, Any]:
    """Returns the JSON record of a program that is not a training step."""
    if program.refusal is not None and program.name.startswith("embed"):  # `read_refusal` speaks of training
        change = f"{setting.embed_clips} clips are encoded together: take fewer (evaluation.batch_size; embed --batch-size), or more chips"
        program = dataclasses.replace(program, refusal=dataclasses.replace(program.refusal, change=change))
    chip = setting.topology.chip
    least = program.timing.multiplied / (chip.teraflops * 1e12 / chip.devices) if program.timing else 0.0
    return {**_head(program), **_collectives(program.found, setting.config), **_timing(setting, program, least)}


def evaluator(setting: Setting, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the predicted time of ranking DIRECTIONS of tables of EVALUATED rows each; [] where no tile was timed.

    Two directions come from one pass over the tiles. The host's share, reading rows and adding counts up, is not in it.
    """
    by_name = {record["program"]: record.get("predicted_seconds") for record in records}
    devices, width = setting.topology.devices, setting.config.decoder.hidden_size
    found = []
    for rows in EVALUATED:
        seconds = [by_name.get(f"evaluate/{name} {rows:,} rows") for name in ("product", "count")]
        if None in seconds:
            continue
        side = tile_side(rows)
        tiles = math.ceil(rows / (side * devices)) * math.ceil(rows / side)
        predicted = DIRECTIONS / 2 * tiles * sum(filter(None, seconds))
        ideal = DIRECTIONS / 2 * 2.0 * rows**2 * width / (setting.topology.chips * setting.topology.chip.teraflops * 1e12)
        found.append({"rows": rows, "predicted_seconds": predicted, "ideal_seconds": ideal, "share_of_peak": ideal / predicted})
    return found


def part_passes(setting: Setting, cached: bool, own_row: bool, trains: frozenset[str]) -> dict[str, float]:
    """Returns part -> how often its matrices are read in a step."""
    layers = remat.names(setting.recipe.remat, setting.config.decoder.num_layers)
    again, recomputed = int(cached), sum(name in ("layer", "offload", "attention") for name in layers) / len(layers)
    reads = 2 + again  # forward, backward
    made: dict[str, float] = {tower: reads if any(name.startswith(f"{tower}/") for name in trains) else 1 for tower in NAMES}
    made |= {"bridge": reads + own_row, "head": reads + own_row, "decoder": reads + recomputed + own_row}
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
    """Bytes of each matrix of one layer, in int8, bfloat16 and float32: what a gather of it brings."""
    stacked = {math.prod(x.shape[1:]) for path, x in abstract_params(config).items() if "layers" in path and path[-1] == "kernel"}
    return {size * width for size in stacked for width in (1, 2, 4)}


def _timing(setting: Setting, program: Program, ideal: float, times: int = 1) -> dict[str, Any]:
    """What the compiler's own estimates come to; nothing where they were not asked for.

    Args:
      ideal: seconds of the multiplications at the chips' peak.
      times: runs of the program that make a step.
    """
    if not setting.timed or program.memory is None:
        return {}
    if program.timing is None:
        return {"predicted_seconds": None}
    timing = program.timing
    seconds = timing.predicted * times
    return {
        "predicted_seconds": seconds,
        "ideal_seconds": ideal,
        "share_of_peak": ideal / seconds if seconds else 0.0,
        "without_estimate": {name: value * times for name, value in timing.added.items()},
        "by_source": [dataclasses.asdict(one) | {"seconds": one.seconds * times} for one in timing.operations[:SOURCES]],
    }


def _cost(setting: Setting, program: Program, spent: Times, utilisation: float | None) -> dict[str, Any]:
    clips, chips = setting.clips * setting.micro_batches, setting.topology.chips
    found: dict[str, Any] = {"at_peak": cost(clips, spent.least, chips)}
    if program.timing is not None:
        found["predicted"] = cost(clips, program.timing.predicted * setting.looped, chips)
    if utilisation is not None:
        found["expected"] = cost(clips, spent.expected(utilisation), chips) | {"utilisation": utilisation}
    return found


# ----------------------------------------------------------------------------------------------------------------------- as text


def text(plan: dict[str, Any]) -> str:
    """Returns a plan for people."""
    lines = [
        f"{plan['model']} on {plan['topology']} ({plan['chips']} chips), mesh {_pairs(plan['mesh'])}, "
        f"{plan['micro_batches']} x {plan['micro_batch']} clips a step, negatives={plan['negatives']}, remat={plan['remat']}"
        + ("" if plan["held"] == "float" else f", weights {plan['held']}"),
        *plan["notes"],
    ]
    for program in plan["programs"]:
        lines += ["", *_program_lines(program)]
    if whole := plan.get("period"):
        how = "predicted by the compiler" if whole["utilisation"] is None else _assumed(whole["utilisation"])
        lines += [
            "",
            f"all kinds in turn  {_rates(whole)}, {how}"
            + (f"; {whole['cost']:,.0f} at {whole['price']:g} a chip-hour" if whole.get("price") else ""),
        ]
    for one in plan.get("evaluator", ()):
        lines += [
            "",
            f"ranking {one['rows']:,} rows  {_seconds(one['predicted_seconds'])} predicted for {DIRECTIONS} directions on the devices, "
            f"{one['share_of_peak']:.1%} of the bfloat16 peak (each float32 product takes six of bfloat16, and counting comes on top)",
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
        lines.append(f"  operations    {whole:,.0f} Tflop a step (analytic): {parts}; of these {again:,.0f} computed again")
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
        best = program["at_peak"]
        lines.append(f"  time          at published rates (analytic): {spent}; bound by {seconds['bound']}")
        lines.append(f"  no better     than {best['clips_per_second']:.1f} clips/s")
    lines += _predicted(program)
    if likely := program.get("expected"):
        lines.append(f"  expected      {_rates(likely)}, {_assumed(likely['utilisation'])}")
    return lines


def _predicted(program: dict[str, Any]) -> list[str]:
    if "predicted_seconds" not in program:
        return []
    if program["predicted_seconds"] is None:
        return ["  predicted     nothing: this libtpu writes no estimated_cycles; what is expected below is analytic"]
    rates = f"; {_rates(program['predicted'])}" if "predicted" in program else ""
    lines = [
        f"  predicted     {_seconds(program['predicted_seconds'])}, {program['share_of_peak']:.0%} of peak "
        f"({_seconds(program['ideal_seconds'])} of multiplications){rates}, by the compiler's estimates"
    ]
    if added := {name: value for name, value in program["without_estimate"].items() if value > 0}:
        parts = ", ".join(f"{name} {_seconds(value)}" for name, value in added.items())
        lines.append(
            f"                of these without its estimate: {parts}; kernels at {KERNEL_SHARE:.0%} of peak, transfers at published rates"
        )
    lines.append("  most of it    seconds, share, bound and how near to it (* not the compiler's estimate)")
    for one in program["by_source"]:
        mark = " " if one["estimated"] else "*"
        near = f"{one['bound']} {one['reached']:.0%}"
        lines.append(f"                {_seconds(one['seconds']):>10}{mark} {one['share']:>6.1%}  {near:<12} {one['source']}")
    return lines


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} us"


def _rates(found: dict[str, float]) -> str:
    return f"{found['clips_per_second']:.1f} clips/s, {found['chip_hours_per_million_triples']:,.0f} chip-hours per million triples"


def _assumed(utilisation: float) -> str:
    return f"{utilisation:.0%} of peak arithmetic assumed"


def _pairs(values: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in values.items())
