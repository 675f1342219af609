"""The collectives of a compiled program, read from its text: what, how many bytes, how often, between how many devices.

Loops are counted: a collective in a loop's body runs as often as the loop does. The TPU compiler turns many gathers of a weight into rings
of permutes beside the product that reads it; they are counted as what they are. Between slices it leaves the transfer to the hosts: a
`send` and a `recv` that name the collective they stand for.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast", "ragged-all-to-all")
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(
    r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|[\w\[\],]+(?:\{[^}]*\})?) (?P<op>[\w-]+)\((?P<rest>.*)$"
)
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CARRIED = re.compile(r'"async_collective_fusion_config":\{"flag_start":"\d')
_MESH = re.compile(r"replica_groups=mesh\[(?P<axes>[^\]]*)\](?:, device_ids=\((?P<ids>[^)]*\)?)\))? \{(?P<used>[^}]*)\}")
_BETWEEN = re.compile(r'_xla_megascale_target="\{([\d,:]*)\}.*?_xla_megascale_transfer_type="(\w+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """Equal collectives of a program.

    Attributes:
      kind: one of KINDS.
      shape: of what arrives on one device, as HLO writes it.
      bytes: of what arrives on one device, one run.
      group: devices that take part together.
      runs: in one run of the program, loops counted.
      in_loop: whether a loop of the program holds it (a layer scan, a loop over micro-batches, a ring).
      across: whether groups reach over slices.
      source: the operation of the model it belongs to, the last parts of its path.
    """

    kind: str
    shape: str
    bytes: int
    group: int
    runs: int
    in_loop: bool = False
    across: bool = False
    source: str = ""

    @property
    def moved(self) -> float:
        """Bytes that one device receives in one run of the program, along a ring: (g - 1) / g of a gather, twice that of a sum."""
        if self.kind == "collective-permute":
            return float(self.bytes * self.runs)
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "reduce-scatter": self.group - 1}.get(self.kind, share)
        return factor * self.bytes * self.runs


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `op`, and in `rest` its operands and attributes as HLO writes them."""

    name: str
    shape: str
    op: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.rest.split("), ", 1)[0])


Computation = dict[str, Instruction]


def collectives(text: str, devices_per_slice: int = 0) -> list[Collective]:
    """Returns the collectives of an optimised HLO module with those alike added up, the most bytes first; of groups of one device none.

    Args:
      devices_per_slice: decides which cross slices; 0 where there is one.
    """
    computations, entry = parse(text)
    found: dict[tuple, list[Collective]] = {}
    for item in _walk(computations, entry, 1, False, devices_per_slice):
        found.setdefault(tuple(dataclasses.replace(item, runs=0).__dict__.values()), []).append(item)
    added = [dataclasses.replace(same[0], runs=sum(c.runs for c in same)) for same in found.values()]
    return sorted(added, key=lambda c: (-c.moved, c.kind, c.shape))


def shape_bytes(shape: str) -> int:
    """Returns the bytes of an HLO shape, of all parts of a tuple together."""
    return sum(_one(kind, sizes) for kind, sizes in _SHAPE.findall(shape))


def _one(kind: str, sizes: str) -> int:
    return math.ceil(BYTES.get(kind, 0) * math.prod(int(n) for n in sizes.split(",") if n))


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns the computations of a module by name, and the name of the one that it enters."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if head := _COMPUTATION.match(line):
                current = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif line.rstrip() == "}":  # alone: a kernel's own settings go over several lines
            current = None
        elif found := _INSTRUCTION.match(line):
            current[found["name"]] = Instruction(found["name"], found["shape"], found["op"], found["rest"], bool(found["root"]))
    return computations, entry


def _walk(computations: dict[str, Computation], name: str, runs: int, in_loop: bool, per_slice: int) -> Iterator[Collective]:
    computation = computations.get(name, {})
    for item in computation.values():
        if (one := as_collective(item, per_slice, in_loop)) is not None:
            yield dataclasses.replace(one, runs=runs)
        if item.op == "while":
            yield from _walk(computations, called(item, "body"), runs * trips(computations, computation, item), True, per_slice)
        elif item.op not in ("all-reduce", "reduce-scatter", "reduce", "scatter", "sort", "all-reduce-start"):
            for inner in all_called(item):
                yield from _walk(computations, inner, runs, in_loop, per_slice)


def as_collective(item: Instruction, per_slice: int = 0, in_loop: bool = False) -> Collective | None:
    """Returns the collective that an instruction is or starts, run once; None for others and for groups of one device.

    One that is fused into a chain of products appears in each of them: it counts where it starts.
    """
    if _CARRIED.search(item.rest):
        return None
    if item.op == "recv" and (between := _BETWEEN.search(item.rest)):
        kind = {"ONE_TO_ONE": "collective-permute"}.get(between[2], between[2].lower().replace("_", "-"))
        shape = "{}[{}]".format(*_SHAPE.findall(item.shape)[0])
        return Collective(kind, shape, shape_bytes(shape), _members(between[1]), 1, in_loop, True, _source(item.rest))
    kind = item.op.removesuffix("-start")
    if kind not in KINDS:
        return None
    group, across = _group(item.rest, per_slice)
    if group <= 1 and kind != "collective-permute":
        return None
    shape = _arrives(item)
    return Collective(kind, shape, shape_bytes(shape), group, 1, in_loop, across, _source(item.rest))


def all_called(item: Instruction) -> list[str]:
    """Returns the computations that an instruction calls, branches among them."""
    branches = re.findall(r"%?([\w.-]+)", " ".join(_BRANCHES.findall(item.rest)))
    return list(dict.fromkeys([*_CALLED.findall(item.rest), *branches]))


def _arrives(item: Instruction) -> str:
    """The shape that arrives: of a start, which lists what goes in and what comes out, the second half."""
    shape = re.sub(r"\{[^}]*\}", "", item.shape)
    shape = re.sub(r"/\*.*?\*/", "", shape)
    if item.op.endswith("-start") and shape.startswith("(") and item.op != "all-reduce-start":
        parts = [f"{kind}[{sizes}]" for kind, sizes in _SHAPE.findall(shape) if sizes]
        return max(parts, key=shape_bytes) if parts else shape
    return shape


def _group(rest: str, per_slice: int) -> tuple[int, bool]:
    """Devices of a group, and whether one reaches over slices."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        moves = [tuple(map(int, p.split(","))) for p in re.findall(r"\{?(\d+,\d+)\}?", pairs[1])]
        return len(moves), any(per_slice and a // per_slice != b // per_slice for a, b in moves)
    if mesh := _MESH.search(rest):
        parts = _mesh_groups(mesh["axes"], mesh["ids"], mesh["used"])
    elif iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        parts = _iota(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2]))
    elif listed := re.search(r"replica_groups=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}", rest):
        parts = [np.array([int(n) for n in part.split(",")]) for part in re.findall(r"\{([\d,]+)\}", listed[1])]
    else:
        return 1, False
    return len(parts[0]), bool(per_slice) and any(len(set(part // per_slice)) > 1 for part in parts)


def _members(text: str) -> int:
    """How many slices "1,2" or "1:4" names."""
    ends = [[int(n) for n in part.split(":")] for part in text.split(",") if part]
    return sum(end[-1] - end[0] + 1 for end in ends)


def _iota(sizes: str, permutation: str | None) -> np.ndarray:
    """Numbers from 0 in an array of these sizes, with its axes exchanged."""
    lengths = [int(n) for n in sizes.split(",")]
    order = np.arange(math.prod(lengths)).reshape(lengths)
    return order.transpose([int(n) for n in permutation.split(",")]) if permutation else order


def _mesh_groups(axes: str, ids: str | None, used: str) -> np.ndarray:
    """Groups (groups, devices) along axes of a mesh.

    Written as sizes "'a'=2,'b'=4", the devices where they are not in order "[2,4]T(1,0)", and axes "'b'" or parts of them "'b':(1)2".
    """
    names, lengths = zip(*((name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)), strict=True)
    iota = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", ids or "")
    devices = _iota(iota[1], iota[2]) if iota else np.arange(math.prod(lengths))
    whole = dict(zip(names, lengths, strict=True))
    named = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", used)
    chosen = {name: (int(before or 1), int(size or whole[name])) for name, before, size in named}
    shape: list[int] = []
    along: list[int] = []
    for name, length in zip(names, lengths, strict=True):
        before, size = chosen.get(name, (1, 1))
        along += [len(shape) + 1] if name in chosen else []
        shape += [before, size, length // (before * size)]
    rest = [i for i in range(len(shape)) if i not in along]
    group = math.prod(shape[i] for i in along)
    return devices.reshape(shape).transpose([*rest, *along]).reshape(-1, group)


def _source(rest: str) -> str:
    name = re.search(r'op_name="([^"]*)"', rest)
    parts = [p for p in (name[1].split("/") if name else []) if p not in ("while", "body", "closed_call")]
    return "/".join(parts[-2:])


def called(item: Instruction, what: str) -> str:
    """Returns the computation that an instruction names as its `what`; "" where it names none."""
    found = re.search(rf"{what}=%?([\w.-]+)", item.rest)
    return found[1] if found else ""


def trips(computations: dict[str, Computation], caller: Computation, loop: Instruction) -> int:
    """Returns how often a loop's body runs: what the compiler wrote, or from its condition `counter < bound`, the start and the step."""
    if known := re.search(r'known_trip_count[^}]*?"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = computations.get(called(loop, "condition"), {})
    body = computations.get(called(loop, "body"), {})
    root = next((i for i in condition.values() if i.root), None)
    if root is None or root.op != "compare" or "direction=LT" not in root.rest:
        return 1
    counter, bound = root.operands[:2]
    index = re.search(r"index=(\d+)", condition[counter].rest) if counter in condition else None
    stop = _scalar(condition, bound)
    if index is None or stop is None:
        return 1
    place = int(index[1])
    start, step = 0, 1
    given = caller.get(loop.operands[0]) if loop.operands else None
    if given is not None and given.op == "tuple" and place < len(given.operands):
        start = _scalar(caller, given.operands[place]) or 0
    result = next((i for i in body.values() if i.root), None)
    if result is not None and result.op == "tuple" and place < len(result.operands):
        step = _step(body, result.operands[place])
    return max(1, -(-(stop - start) // max(1, step)))


def _step(body: Computation, name: str) -> int:
    """What is added to the counter in one round, over a chain of additions."""
    total, item = 0, body.get(name)
    while item is not None and item.op in ("add", "copy"):
        nexts = item.operands
        if item.op == "add":
            constant = next((value for n in nexts if (value := _scalar(body, n)) is not None), None)
            if constant is None:
                return 1
            total += constant
            nexts = [n for n in nexts if _scalar(body, n) is None]
        item = body.get(nexts[0]) if nexts else None
    return total or 1


def _scalar(computation: Computation, name: str) -> int | None:
    item = computation.get(name)
    while item is not None and item.op in ("copy", "bitcast", "convert"):
        item = computation.get(item.operands[0])
    if item is None or item.op != "constant":
        return None
    value = re.match(r"(-?\d+)\)", item.rest)
    return int(value[1]) if value else None
