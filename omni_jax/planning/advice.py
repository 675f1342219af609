"""What to change where a program does not fit: read from the compiler's own refusal."""

from __future__ import annotations

import dataclasses
import re

_USED = (
    re.compile(r"Used ([\d.]+)([GMK]?) of ([\d.]+)([GMK]?) hbm"),
    re.compile(r"\(([\d.]+)([GMK]?)\) exceeds available HBM \(([\d.]+)([GMK]?)\)"),
)
_ALLOCATION = re.compile(r"^ *\d+\. Size: ([\d.]+)([GMK]?)B?\n(.*?)^ *=====", re.DOTALL | re.MULTILINE)
_SHAPE, _OPERATION, _LABEL = re.compile(r"Shape: ([^{\s]+)"), re.compile(r'op_name="([^"]*)"'), re.compile(r"XLA label: (\S+)")
_UNITS = {"": 2**-30, "K": 2**-20, "M": 2**-10, "G": 1.0}


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """The compiler's refusal.

    Attributes:
      used_gib, limit_gib: what the program would need, and what there is; of one device.
      largest: the largest allocations: (GiB, shape, the operation it comes from).
      change: what to change.
    """

    used_gib: float
    limit_gib: float
    largest: tuple[tuple[float, str, str], ...]
    change: str


def read_refusal(message: str, *, clips_per_device: float, micro_batches: int, negatives: str, remat: str) -> OutOfMemory | None:
    """Returns what a compiler's error says about memory, or None where it is about something else."""
    found = next((match for pattern in _USED if (match := pattern.search(message))), None)
    if found is None:
        return None
    used, limit = float(found[1]) * _UNITS[found[2]], float(found[3]) * _UNITS[found[4]]
    largest = []
    for size, unit, about in _ALLOCATION.findall(message)[:8]:
        shape, place = _SHAPE.search(about), _OPERATION.search(about) or _LABEL.search(about)
        largest.append((float(size) * _UNITS[unit], shape[1] if shape else "", _place(place[1]) if place else ""))
    return OutOfMemory(used, limit, tuple(largest), change_for(largest, clips_per_device, micro_batches, negatives, remat))


def change_for(largest: list, clips_per_device: float, micro_batches: int, negatives: str, remat: str) -> str:
    """Returns the first change to make, in words."""
    where = " ".join(place for _, _, place in largest[:4])
    if any(name in remat for name in ("none", "dots", "attention")):
        return f"remat '{remat}' keeps residuals of every decoder layer: set remat='layer'"
    if clips_per_device > 1:
        more = "" if negatives == "global" else " (with negatives='global' the pool of negatives stays the same)"
        parts = next((n for n in range(2, int(clips_per_device) + 1) if clips_per_device % n == 0), 2)
        fewer = max(1, int(clips_per_device // parts))
        return f"{clips_per_device:g} clips a device at once: take {fewer} in {parts * micro_batches} micro-batches{more}"
    if "argument" in where or "param" in where:
        return "weights and optimizer fill the memory: more devices on fsdp, or a chip with more memory"
    return "one clip a device is the least: remat='offload', more tensor parallelism, shorter rows, or a chip with more memory"


def _place(operation: str) -> str:
    parts = [p for p in operation.strip().split("/") if p not in ("while", "body", "closed_call", "jit(traced)")]
    return "/".join(parts[-3:])
