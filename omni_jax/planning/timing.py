"""The time of a program, from what the TPU compiler writes into its optimised HLO: the cycles that it schedules each instruction by.

Cycles are summed over loops, branches and called computations, and divided by the chip's clock. What has no estimate is added apart and
by name: attention kernels from their operations, transfers that no work hides from bytes and bandwidth, and whatever else is left from the
bytes of its result. All of it is predicted; nothing is executed.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Callable

import numpy as np

from omni_jax.model.attention import splash_mask
from omni_jax.planning import products
from omni_jax.planning.chips import Chip
from omni_jax.planning.hlo import Collective, Computation, Instruction, all_called, as_collective, called, parse, shape_bytes, trips
from omni_jax.planning.sources import Sources

KERNEL_SHARE = 0.5
"""Share of the peak that attention kernels are taken to reach, of which the compiler says nothing. An assumption."""

KERNELS, WAITS, REST = "attention kernels", "transfers that nothing hides", "operations without an estimate"
SMALL = 2**16  # bytes: what is smaller and has no estimate takes no time worth counting

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_FREE = ("get-tuple-element", "constant", "parameter", "bitcast", "tuple", "after-all", "partition-id", "replica-id", "opt-barrier")
_START, _DONE = 'custom_call_target="AsyncCollectiveStart"', 'custom_call_target="AsyncCollectiveDone"'
# Products that a splash kernel makes of each block of pairs: 2 forward, 3 for the gradient of q, 4 for those of k and v.
_KERNEL_PRODUCTS = (("_dkv", 4), ("_dq", 3), ("_fwd", 2))


@dataclasses.dataclass(frozen=True)
class Operation:
    """Equal instructions of a program.

    Attributes:
      source: line of the model, and the operation.
      seconds: in one run of the program on one device.
      share: of the whole program's.
      bound: "MXU" or "HBM", whichever is nearer to its limit; "interconnect" of a transfer between chips.
      reached: share of that limit: seconds that it alone would take, to `seconds`.
      estimated: whether the compiler gives the seconds.
    """

    source: str
    seconds: float
    share: float
    bound: str
    reached: float
    estimated: bool


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one run of a program on one device, predicted by the compiler.

    Attributes:
      predicted: all of it.
      estimated: of instructions that carry the compiler's estimate.
      added: name -> seconds of what carries none.
      multiplied: operations of its products.
      operations: by source, the most seconds first.
    """

    predicted: float
    estimated: float
    added: dict[str, float]
    multiplied: float
    operations: tuple[Operation, ...]


@dataclasses.dataclass
class _Part:
    """Seconds of what comes from one place, and those that its products and its bytes would take at the chip's peak."""

    seconds: float = 0.0
    products: float = 0.0
    memory: float = 0.0
    operations: float = 0.0

    def add(self, other: _Part, times: float = 1.0) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + times * getattr(other, field.name))


_Key = tuple[str, str]  # "" or the name of what has no estimate; the source
_Parts = dict[_Key, _Part]


def read_timing(text: str, chip: Chip, devices_per_slice: int = 0, causal: bool = True, reach: int = 0) -> Timing | None:
    """Returns the time of an optimised HLO module, None where it carries no estimates.

    Args:
      devices_per_slice: decides which collectives cross slices; 0 where there is one.
      causal, reach: of attention kernels, as in `model.attention.splash_mask`: blocks in which no query sees a key are not multiplied.

    Raises:
      ConfigError: for a chip whose clock is not known.
    """
    if not _CYCLES.search(text):
        return None
    reader = _Reader(text, chip, devices_per_slice, functools.partial(splash_mask, causal=causal, reach=reach))
    parts = reader.cost(reader.entry)
    total = sum(part.seconds for part in parts.values())
    added: dict[str, float] = collections.defaultdict(float)
    for (name, _), part in parts.items():
        if name:
            added[name] += part.seconds
    operations = [_operation(name, source, part, total) for (name, source), part in parts.items() if part.seconds > 0]
    return Timing(
        predicted=total,
        estimated=total - sum(added.values()),
        added=dict(added),
        multiplied=sum(part.operations for part in parts.values()),
        operations=tuple(sorted(operations, key=lambda one: -one.seconds)),
    )


def _operation(name: str, source: str, part: _Part, total: float) -> Operation:
    bound, least = max((("MXU", part.products), ("HBM", part.memory)), key=lambda pair: pair[1])
    if name == WAITS and not source.startswith("copy"):
        bound, least = "interconnect", part.seconds
    return Operation(source, part.seconds, part.seconds / total, bound, min(1.0, least / part.seconds), not name)


class _Reader:
    """Reads one module. Costs of computations are kept, since many are called from several places."""

    def __init__(self, text: str, chip: Chip, devices_per_slice: int, mask: Callable[[int, int], np.ndarray]):
        self.computations, self.entry = parse(text)
        self.sources = Sources(text)
        self.chip, self.per_slice, self.mask = chip, devices_per_slice, mask
        self.clock, self.peak = chip.clock, chip.teraflops * 1e12 / chip.devices
        self.hbm, self.ici, self.dcn = (x * 1e9 / chip.devices for x in (chip.hbm_gbs, chip.ici_gbs, chip.dcn_gbs))
        self.cost = functools.cache(self._cost)

    def _cost(self, name: str) -> _Parts:
        """Seconds of one run of a computation, by place."""
        computation = self.computations.get(name, {})
        parts: _Parts = collections.defaultdict(_Part)
        spent = 0.0
        pending: dict[str, tuple[float, float, str]] = {}  # name of a start -> when it was, seconds that its transfer takes, source

        def add(key: _Key, part: _Part) -> None:
            nonlocal spent
            parts[key].add(part)
            spent += part.seconds

        for item in computation.values():
            if item.op in _FREE:
                continue
            if inner := self._inner(computation, item):
                times, costs = inner
                for key, part in costs.items():
                    parts[key].add(part, times)
                    spent += times * part.seconds
                continue
            if done := self._start_of(computation, item, pending):
                began, seconds, source = pending.pop(done)
                add((WAITS, source), _Part(seconds=max(0.0, seconds - (spent - began)), memory=seconds if source[:4] == "copy" else 0.0))
            if (transfer := self._transfer(item)) is not None:
                seconds, source, waits = transfer
                if waits:
                    add((WAITS, source), _Part(seconds=seconds))
                    continue
                pending[item.name] = (spent, seconds, source)
            add(*self._own(computation, item))
        return parts

    def _inner(self, computation: Computation, item: Instruction) -> tuple[int, _Parts] | None:
        """How often an instruction runs a computation, and what one run costs; of branches the one that costs the most."""
        if item.op == "while":
            return trips(self.computations, computation, item), self.cost(called(item, "body"))
        if item.op in ("call", "conditional", "async-start"):
            return 1, max((self.cost(name) for name in all_called(item)), key=_seconds, default={})
        return None

    def _transfer(self, item: Instruction) -> tuple[float, str, bool] | None:
        """Seconds, source, and whether all else waits, of an instruction that moves data or starts to."""
        if item.op in ("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start"):
            return max(map(shape_bytes, _arrays(item.shape))) / self.hbm, f"copy {self.sources.of(item)}", False
        if item.op == "fusion":
            fused = self.computations.get(called(item, "calls"), {}).values()
            if any(_START in one.rest for one in fused):
                moved = [(one, found) for one in fused if (found := as_collective(one, self.per_slice))]
                return sum(self._seconds(found) for _, found in moved), self.sources.of(moved[0][0]) if moved else "collective", False
            return None
        if (found := as_collective(item, self.per_slice)) is None:
            return None
        return self._seconds(found), f"{found.kind} {self.sources.of(item)}", not item.op.endswith("-start") and item.op != "recv"

    def _seconds(self, found: Collective) -> float:
        """Seconds of a collective alone: a permute goes over one of a chip's links, all else over all of them."""
        rate = self.dcn if found.across else self.ici / (2 * self.chip.dimensions) if found.kind == "collective-permute" else self.ici
        return found.moved / rate

    def _start_of(self, computation: Computation, item: Instruction, pending: dict[str, tuple[float, float, str]]) -> str:
        """The start that an instruction is the end of; "" where it is none."""
        ends = item.op.endswith("-done")
        if item.op == "fusion":
            ends = any(_DONE in one.rest for one in self.computations.get(called(item, "calls"), {}).values())
        names, seen = item.operands if ends else [], set()
        while names:  # a chain of fused products hands the transfer on
            name = names.pop()
            if name in pending:
                return name
            before = computation.get(name)
            if before is not None and name not in seen and before.op in ("get-tuple-element", "fusion", "tuple", "bitcast"):
                seen.add(name)
                names += before.operands
        return ""

    def _own(self, computation: Computation, item: Instruction) -> tuple[_Key, _Part]:
        """What an instruction itself costs."""
        source = self.sources.of(item)
        if item.op == "custom-call" and "tpu_custom_call" in item.rest:
            count, source = self._kernel(computation, item), re.sub(r"\.\d+$", "", item.name)
            return (KERNELS, source), _Part(count / self.peak / KERNEL_SHARE, count / self.peak, operations=count)
        moved = self._moved(computation, item)
        if cycles := _CYCLES.search(item.rest):
            count, passes = products.of(self.computations, computation, item)
            return ("", source), _Part(int(cycles[1]) / self.clock, passes / self.peak, moved / self.hbm, count)
        free = item.op == "custom-call" or item.op.endswith(("-start", "-done")) or item.op in ("recv", "send") or moved < SMALL
        if free or (item.op == "fusion" and self._hands_on(item)):
            return (REST, source), _Part()
        return (REST, source), _Part(moved / self.hbm, memory=moved / self.hbm)

    def _moved(self, computation: Computation, item: Instruction) -> int:
        """Bytes that an instruction reads from HBM and writes to it; of an array that it only cuts, or writes into, the part."""
        given = [_in_hbm(computation[name].shape) if name in computation else 0 for name in item.operands]
        made = _in_hbm(item.shape)
        inner = self.computations.get(called(item, "calls"), {}) if item.op == "fusion" else {}
        for one in inner.values():
            number = re.match(r"(\d+)\)", one.rest) if one.op == "parameter" else None
            if number is None or int(number[1]) >= len(given):
                continue
            users = [user for user in inner.values() if one.name in user.operands]
            if users and all(user.op in ("dynamic-slice", "slice", "gather") for user in users):
                given[int(number[1])] = min(given[int(number[1])], sum(shape_bytes(user.shape) for user in users))
            elif users and all(user.op == "dynamic-update-slice" and user.operands[0] == one.name for user in users):
                part = sum(shape_bytes(inner[user.operands[1]].shape) for user in users if user.operands[1] in inner)
                made, given[int(number[1])] = min(made, part), 0
        return made + sum(given)

    def _hands_on(self, item: Instruction) -> bool:
        """Whether a fusion only starts or ends a transfer."""
        return any(_START in one.rest or _DONE in one.rest for one in self.computations.get(called(item, "calls"), {}).values())

    def _kernel(self, computation: Computation, item: Instruction) -> float:
        """Operations of a splash kernel, from the shapes of its queries (.., G, S, h) and keys (.., T, h); of another kernel none."""
        count = next((n for name, n in _KERNEL_PRODUCTS if name in item.name), 0)
        arrays = [products.dimensions(computation[name].shape) for name in item.operands if name in computation]
        wide = [sizes for sizes in arrays if len(sizes) >= 4]
        if not count or len(wide) < 2:
            return 0.0
        (*heads, queries, width), keys = wide[0], wide[1][-2]
        block = re.search(r'block_q\\": (\d+)', item.rest)
        side = int(block[1]) if block else 1
        blocks = self.mask(queries, keys).reshape(queries // side, side, keys // side, side).any(axis=(1, 3))
        return 2.0 * count * width * blocks.sum() * side**2 * functools.reduce(int.__mul__, heads, 1)


def _seconds(parts: _Parts) -> float:
    return sum(part.seconds for part in parts.values())


def _arrays(shape: str) -> list[str]:
    return re.findall(r"\b[a-z]+\d*\[[\d,]*\]", shape)


def _in_hbm(shape: str) -> int:
    """Bytes of the arrays of a shape that lie in HBM, and not in the memory beside the cores."""
    return sum(shape_bytes(one[0]) for one in re.finditer(r"\b[a-z]+\d*\[[\d,]*\](?:\{[^}]*\})?", shape) if "S(" not in one[0])
