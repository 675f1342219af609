"""The fastest remat that fits: as much kept for the backward pass as a device's memory takes, found by compiling quickly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from omni_jax.planning.abstract import planned_batch
from omni_jax.planning.devices import QUICK, planning_mesh
from omni_jax.planning.programs import Setting, train_program
from omni_jax.train.plan import step_kind

SPARE = 0.1
"""Share of a device's memory that is left free."""

LADDER = (("attention", "dots"), ("layer", "attention"))
"""What all layers keep, and what as many of the last ones as fit keep instead: theirs is what the backward pass frees first."""


def fit(setting: Setting, counts: Sequence[int], say: Callable[[str], None]) -> Setting:
    """Returns the setting with the remat that computes the least again of those that fit; "layer", which keeps the least, where none does.

    Args:
      counts: places in the period-3 cycle; the kind with the most tokens has to fit.
      say: takes a line on each remat that was compiled.
    """
    layers, limit = setting.config.decoder.num_layers, (1 - SPARE) * setting.topology.chip.limit_gib
    mesh = planning_mesh(setting.topology, dict(setting.mesh), compiled=True)
    count = max(counts, key=lambda count: _tokens(setting, count))

    def keeping(remat: str) -> Setting:
        return dataclasses.replace(setting, recipe=dataclasses.replace(setting.recipe, remat=remat))

    def peak(remat: str) -> float:
        program = train_program(dataclasses.replace(keeping(remat), options=QUICK), mesh, count)
        needed = program.refusal.used_gib if program.refusal else program.memory.peak if program.memory else 0.0
        say(f"remat={remat:<20} {needed:7.2f} GiB {'fits' if needed <= limit else f'of {limit:.2f} that leave {SPARE:.0%} to spare'}")
        return needed

    for least, most in LADDER:
        low = peak(least)
        if low > limit:
            continue
        high = peak(most)
        if high <= limit:
            return keeping(most)
        kept = int(layers * (limit - low) / (high - low))
        while kept > 0:
            mixed = f"{least}:{layers - kept},{most}"
            needed = peak(mixed)
            if needed <= limit:
                return keeping(mixed)
            kept = min(kept - 1, int(kept * (limit - low) / (needed - low)))
        return keeping(least)
    return keeping("layer")


def _tokens(setting: Setting, count: int) -> int:
    kind = step_kind(count, setting.recipe.losses, setting.recipe.mined)
    sizes = {"caption_tokens": setting.caption_tokens, "row_multiple": setting.row_multiple}
    kind, shapes = planned_batch(setting.config, setting.preset, kind, **sizes)
    return len(kind.rows) * shapes.row_tokens
