"""Static shapes: each new one costs a compilation, each one too large costs padding. The planner weighs the two.

Letters: N items of a batch, P patches, F filter-bank frames, R rows, S tokens, K prompts per row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from omni_jax.config import ModelConfig
from omni_jax.tokens.packing import first_fit_decreasing
from omni_jax.towers import NAMES, Tower
from omni_jax.towers.base import multiple_of

MANTISSA_BITS = 3
BATCH_TOKENS = 8192  # decoder tokens of one batch, which holds one row at least
LONGEST_ROW = 4096  # that prompts share; a longer group has rows of its own
NEW_SHAPE_SHARE, NEW_SHAPE_TOKENS = 0.02, 512  # padding, as a share of a call's tokens and in tokens, that a new shape must save
SLOT_TOKENS = 0.1  # the fusion head on one pooled prompt, about a twelfth of a token's way through the decoder
PROGRAMS_FREE, PROGRAMS_DOUBLING = 8, 3  # programs at the plain price, and how many more double it
DISPATCH_TOKENS = 32  # what starting one more program costs, in tokens


def round_up(value: int, unit: int = 1) -> int:
    """Returns the smallest size >= value that is `unit` times a number of three significant bits (1-8, 10, 12, 14, 16, 20, ...)."""
    count = max(1, -(-value // unit))
    shift = max(0, count.bit_length() - MANTISSA_BITS)
    return unit * ((count + (1 << shift) - 1) >> shift << shift)


def row_size(tokens: int) -> int:
    """Returns the row length for so many tokens: multiples of 16 up to 128, then multiples of 128 of three significant bits."""
    return multiple_of(16, max(tokens, 1)) if tokens <= 128 else round_up(tokens, 128)


@dataclasses.dataclass(frozen=True)
class Piece:
    """One batch of a plan: shape and the items it holds, at most `count`."""

    count: int
    size: int
    items: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """One batch of rows: shape (count, size, slots), and the groups in each row that is used."""

    count: int
    size: int
    slots: int
    rows: tuple[tuple[int, ...], ...]


def cover(
    needs: Sequence[int],
    *,
    known: Collection[tuple[int, int]],
    fit: Callable[[int], int],
    limit: Callable[[int], int],
    new_cost: float,
    tokens: Callable[[int], float] = float,
    multiple: int = 1,
) -> tuple[list[Piece], float]:
    """Returns batches that hold every item, and what they cost in tokens: padding, starts and new shapes.

    Items go in order of size, so that neighbours share a batch. Each batch is the cheapest, per token it holds, among the known shapes
    and a new one.

    Args:
      needs: size of each item.
      known: shapes (count, size) already compiled.
      fit: size of a new shape that an item of this size gets.
      limit: largest count for a size.
      new_cost: what a new shape costs, in tokens.
      tokens: tokens in an item of a size.
      multiple: every count is a multiple of it.
    """
    order = sorted(range(len(needs)), key=lambda i: (-needs[i], i))
    known = set(known)
    pieces: list[Piece] = []
    total, start = 0.0, 0
    while start < len(order):
        left = len(order) - start
        need = needs[order[start]]
        fresh = fit(need)
        alike = sum(fit(needs[i]) == fresh for i in order[start:])
        best: tuple[float, int, int, float] | None = None
        for count, size in sorted({*(k for k in known if k[1] >= need), *((n, fresh) for n in _counts(left, limit(fresh), multiple))}):
            held = sum(tokens(needs[i]) for i in order[start : start + count])
            cost = count * tokens(size) - held + DISPATCH_TOKENS
            if (count, size) not in known:
                # A shape that serves several batches of this plan is paid for once.
                cost += new_cost * count / max(count, alike)
            score = cost / max(held, 1.0)
            if best is None or score < best[0]:
                best = (score, count, size, cost)
        assert best is not None
        _, count, size, cost = best
        known.add((count, size))
        pieces.append(Piece(count, size, tuple(order[start : start + count])))
        total += cost
        start += count
    return pieces, total


def _counts(left: int, largest: int, multiple: int) -> set[int]:
    """The powers of two (times `multiple`) around `left`, at most `largest`."""
    units = max(1, min(-(-left // multiple), max(1, largest // multiple)))
    below = 1 << (units.bit_length() - 1)
    above = below if below == units else 2 * below
    return {below * multiple, *({above * multiple} if above * multiple <= max(largest, multiple) else ())}


def _slots(size: int) -> tuple[int, ...]:
    """Slots for pooled prompts that a row of this length may have."""
    return tuple(sorted({max(1, size // 64), max(1, size // 16), max(1, size // 4)}))


class Planner:
    """Chooses static shapes and remembers them, so that later batches reuse them where that pads little. Deterministic.

    Attributes:
      shapes: tower's name, or "rows" -> shapes used so far, each one a compiled program.
    """

    def __init__(self, known: Mapping[str, Iterable[tuple[int, ...]]] | None = None, *, row_multiple: int = 1):
        """Takes the shapes that another planner knew, so that this one chooses as it would.

        Args:
          row_multiple: rows of a batch are a multiple of it, so that they spread over so many devices.
        """
        self._multiple = row_multiple
        self.shapes: dict[str, set[tuple[int, ...]]] = {name: set((known or {}).get(name, ())) for name in (*NAMES, "rows")}

    def known(self) -> dict[str, list[tuple[int, ...]]]:
        """Returns the shapes in lists, to be kept or handed to another planner."""
        return {kind: sorted(shapes) for kind, shapes in self.shapes.items()}

    @property
    def programs(self) -> int:
        """Programs that the batches planned so far need."""
        return sum(map(len, self.shapes.values()))

    def new_cost(self, tokens: int) -> float:
        """Returns what a new shape costs, in tokens, in a call of so many. It doubles with every few programs, so that they stay few."""
        return max(NEW_SHAPE_TOKENS, NEW_SHAPE_SHARE * tokens) * 2 ** (max(0, self.programs - PROGRAMS_FREE) / PROGRAMS_DOUBLING)

    def tower(self, tower: Tower, sizes: Sequence[int], new_cost: float, config: ModelConfig) -> list[Piece]:
        """Returns batches of a tower's items; `sizes` as in `towers.Item`."""
        needs = [max(size, tower.unit) for size in sizes]
        exact = tower.exact and len(set(needs)) == 1
        pieces, _ = cover(
            needs,
            known={(shape[0], shape[1]) for shape in self.shapes[tower.name]},
            fit=lambda size: size if exact else round_up(size, tower.unit),
            limit=lambda size: max(1, min(max(tower.most, self._multiple), tower.limit(size))),
            new_cost=new_cost,
            tokens=lambda size: tower.width(size, config),
        )
        self.shapes[tower.name].update((p.count, p.size) for p in pieces)
        return pieces

    def rows(self, lengths: Sequence[int], prompts: Sequence[int], new_cost: float, attention: float) -> list[RowPlan]:
        """Returns packed rows for groups of prompts.

        Args:
          lengths: tokens of each group.
          prompts: prompts pooled from each group.
          new_cost: what a new shape costs, in tokens.
          attention: cost of attention per token and token of the row, in units of a token's other cost.
        """
        plans: list[RowPlan] = []
        shared = [i for i, n in enumerate(lengths) if n <= LONGEST_ROW]
        if shared:
            plans += self._rows(shared, lengths, prompts, new_cost, attention, LONGEST_ROW)
        long: dict[int, list[int]] = {}
        for i, n in enumerate(lengths):
            if n > LONGEST_ROW:
                long.setdefault(row_size(n), []).append(i)
        for size in sorted(long):
            plans += self._rows(long[size], lengths, prompts, new_cost, attention, size)
        return plans

    def _rows(
        self, groups: list[int], lengths: Sequence[int], prompts: Sequence[int], new_cost: float, attention: float, longest: int
    ) -> list[RowPlan]:
        """Tries row lengths and slot counts, and takes the cheapest."""
        needs, pooled = [lengths[i] for i in groups], [prompts[i] for i in groups]
        most = LONGEST_ROW if max(needs) <= LONGEST_ROW else math.inf
        shapes = {(r, s, k) for r, s, k in self.shapes["rows"] if max(needs) <= s <= most and max(pooled) <= k}
        candidates = {(s, k) for _, s, k in shapes}
        size = row_size(max(needs))
        whole = row_size(sum(needs))
        while True:
            candidates |= {(size, k) for k in _slots(size) if k >= max(pooled)}
            if size >= whole or row_size(size + 1) > longest:
                break
            size = row_size(size + 1)
        best: tuple[float, list[RowPlan]] | None = None
        for size, slots in sorted(candidates):
            rows = first_fit_decreasing(needs, pooled, size, slots)
            pieces, cost = cover(
                [size] * len(rows),
                known={(r, s) for r, s, k in shapes if (s, k) == (size, slots)},
                fit=lambda s: s,
                limit=lambda s: max(1, BATCH_TOKENS // s),
                new_cost=new_cost,
                multiple=self._multiple,
            )
            count = sum(p.count for p in pieces)
            # Unused places within rows, attention over whole rows, and the fusion head on every slot.
            cost += len(rows) * size - sum(needs) + count * size * size * attention + count * slots * SLOT_TOKENS
            if best is None or cost < best[0]:
                plan = [RowPlan(p.count, size, slots, tuple(tuple(groups[g] for g in rows[r]) for r in p.items)) for p in pieces]
                best = (cost, plan)
        assert best is not None
        for plan in best[1]:
            self.shapes["rows"].add((plan.count, plan.size, plan.slots))
        return best[1]
