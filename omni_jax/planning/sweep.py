"""The choices of batch, remat and mesh that fit, compared by the time that the compiler predicts for the best few."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from omni_jax.config import ConfigError
from omni_jax.planning.devices import planning_mesh
from omni_jax.planning.estimate import UTILISATION
from omni_jax.planning.programs import Setting, train_program
from omni_jax.planning.report import train_record

REMATS = ("layer", "attention", "dots")
LARGEST = 16  # clips a device at once
FEW = 3  # choices compiled at full effort


def meshes(setting: Setting) -> list[dict[str, int]]:
    """Returns the meshes to try: all of fsdp, then half of it given to tensor or to data where that is possible."""
    each = setting.topology.devices // setting.topology.slices
    heads = setting.config.decoder
    found = [{"data": 1, "fsdp": each, "tensor": 1}]
    if each % 2 == 0 and heads.num_heads % 2 == 0 and heads.num_kv_heads % 2 == 0:
        found.append({"data": 1, "fsdp": each // 2, "tensor": 2})
    if each % 2 == 0 and each > 2:
        found.append({"data": 2, "fsdp": each // 2, "tensor": 1})
    return found


def batches(setting: Setting, shards: int) -> Iterator[tuple[int, int]]:
    """Yields (clips of a micro-batch, micro-batches) that make the step's clips, the largest micro-batch first.

    Micro-batches that are pools of their own are part of the recipe: they stay as they are.
    """
    total = setting.clips * setting.micro_batches
    if setting.recipe.losses.negatives == "micro":
        if setting.clips % shards == 0:
            yield setting.clips, setting.micro_batches
        return
    for per_device in range(LARGEST, 0, -1):
        clips = per_device * shards
        if total % clips == 0 and clips > 1:  # a clip alone has none to exchange features with
            yield clips, total // clips


def whole_blocks(setting: Setting, clips: int) -> int:
    """Returns the blocks of a micro-batch of so many clips: as large as the setting's, or as the clips of a host allow."""
    of_host = clips // setting.topology.hosts
    size = math.gcd(of_host, setting.clips // setting.blocks)
    return clips // (size if size > 1 else max(of_host, 1))


def sweep(
    setting: Setting,
    count: int,
    say: Callable[[str], None],
    utilisation: float = UTILISATION,
    sizes_tried: list[dict[str, int]] | None = None,
) -> list[dict[str, Any]]:
    """Returns the records of what was tried, each with its choice: the best few by predicted time, others that fit, then the rest by need.

    For every mesh (of `sizes_tried`, or else of `meshes`) and remat policy, the largest micro-batch that fits, compiled quickly. The few
    that should be fastest at a share `utilisation` of the peak are compiled again as a run would be.

    Raises:
      ConfigError: where the clips divide over no mesh.
    """
    tried: list[dict[str, Any]] = []
    settings: list[Setting] = []
    for sizes in sizes_tried or meshes(setting):
        mesh = planning_mesh(setting.topology, sizes, compiled=True)
        shards = setting.topology.slices * sizes["data"] * sizes["fsdp"]
        for remat in REMATS:
            for clips, micro_batches in batches(setting, shards):
                recipe = dataclasses.replace(setting.recipe, remat=remat)
                blocks = whole_blocks(setting, clips)
                one = dataclasses.replace(setting, mesh=sizes, clips=clips, micro_batches=micro_batches, blocks=blocks, recipe=recipe)
                program = train_program(one, mesh, count)
                record = train_record(one, program, mesh, utilisation)
                choice = {"mesh": sizes, "remat": remat, "micro_batch": clips, "micro_batches": micro_batches, "blocks": blocks}
                settings.append(one)
                tried.append({"choice": choice, **record})
                say(choice_line(tried[-1]))
                if program.status == "fits":
                    break
    if not tried:
        total = f"{setting.micro_batches} x {setting.clips} clips a step (negatives={setting.recipe.losses.negatives})"
        raise ConfigError(f"--sweep: {total} divide over no mesh of {setting.topology}; make them a multiple of its devices")
    best = sorted((i for i, record in enumerate(tried) if record["status"] == "fits"), key=lambda i: _place(tried[i]))[:FEW]
    for i in best:
        one = dataclasses.replace(settings[i], options={})
        mesh = planning_mesh(one.topology, dict(one.mesh), compiled=True)
        tried[i] |= train_record(one, train_program(one, mesh, count), mesh, utilisation)
        say(choice_line(tried[i]))
    return sorted(tried, key=_place)


def _place(record: dict[str, Any]) -> tuple[float, ...]:
    refusal, seconds = record["out_of_memory"], record["seconds"]
    return (
        refusal["used_gib"] if refusal else 0.0,
        record.get("predicted_seconds") or math.inf,
        seconds["expected"],
        seconds["interconnect"],
    )


def choice_line(record: dict[str, Any]) -> str:
    """Returns one line on a choice."""
    choice, memory, refusal = record["choice"], record["memory_gib"], record["out_of_memory"]
    mesh = ",".join(f"{name}={size}" for name, size in choice["mesh"].items())
    need = f"needs {refusal['used_gib']:.2f} GiB" if refusal else f"{memory['peak']:.2f} GiB"
    batch = f"{choice['micro_batches']:>3} x {choice['micro_batch']:<5}"
    likely, share = record.get("predicted"), record.get("share_of_peak")
    how = "not timed" if likely is None else f"{likely['clips_per_second']:.1f} clips/s predicted, {share:.0%} of peak"
    return f"{mesh:<28} remat={choice['remat']:<10} {batch} {record['status']:<14} {need:<18} {how}"
