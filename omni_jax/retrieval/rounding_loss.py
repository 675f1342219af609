"""What rounding costs: a sample of records embedded twice, with it and without."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from omni_jax.retrieval.directions import possible
from omni_jax.retrieval.metrics import evaluate
from omni_jax.retrieval.rows import paired_cosines
from omni_jax.types import EmbeddingTable

NOTABLE = 2.0
"""Points of R@1 that a direction may lose before another choice is advised."""


@dataclasses.dataclass(frozen=True)
class RoundingLoss:
    """The difference between two sets of vectors of the same records.

    Attributes:
      records: how many.
      cosine: the smallest between a vector and its rounded form.
      table: whose that is.
      exact, rounded: direction -> R@1 in percent; empty where the tables have no direction.
    """

    records: int
    cosine: float
    table: str
    exact: Mapping[str, float]
    rounded: Mapping[str, float]

    @property
    def lost(self) -> dict[str, float]:
        """Points of R@1 by direction."""
        return {name: self.exact[name] - self.rounded[name] for name in self.exact}

    def said(self, rounded: str, exact: str) -> str:
        """Returns one line; the arguments are what the two are called."""
        line = f"{rounded} on {self.records} of these records, against {exact}: smallest cosine {self.cosine:.4f} ({self.table})"
        if not self.exact:
            return line
        most = max(self.lost, key=lambda name: self.lost[name])
        ours, theirs = (float(np.mean(list(rates.values()))) for rates in (self.rounded, self.exact))
        points = f"{abs(theirs - ours):.1f} points {'lost' if theirs >= ours else 'gained'}"
        line += f"; mean R@1 of {len(self.exact)} directions {ours:.1f} %, with {exact} {theirs:.1f} %: {points}"
        line += f", most lost in {most} ({self.lost[most]:.1f})" if self.lost[most] > 0 else ""
        return f"{line}; choose {exact} instead" if self.lost[most] > NOTABLE else line


def rounding_loss(rounded: EmbeddingTable, exact: EmbeddingTable) -> RoundingLoss:
    """Returns what was lost, over the records and tables that both have; there must be some."""
    ids = tuple(sorted({*rounded.ids} & {*exact.ids}))
    some, other = (_restricted(table, ids) for table in (rounded, exact))
    both = some.tables.keys() & other.tables.keys()
    cosines = {name: float(paired_cosines(some.tables[name], other.tables[name]).min()) for name in both}
    table = min(sorted(cosines), key=lambda name: cosines[name])
    exactly, roughly = (_rates(one) if possible(cosines) else {} for one in (other, some))
    return RoundingLoss(len(ids), cosines[table], table, exactly, roughly)


def sample(ids: Sequence[str], count: int) -> list[str]:
    """Returns at most `count` of some ids, always the same, in their order."""
    if len(ids) <= count:
        return list(ids)
    return [ids[int(n)] for n in np.sort(np.random.default_rng(0).choice(len(ids), count, replace=False))]


def _rates(table: EmbeddingTable) -> dict[str, float]:
    return {name: row["R@1"] for name, row in evaluate(table, resamples=0)["directions"].items()}


def _restricted(table: EmbeddingTable, ids: Sequence[str]) -> EmbeddingTable:
    """Rows of these records alone, in their order."""
    places = {name: {record: n for n, record in enumerate(table.ids_of(name))} for name in table.tables}
    own = {name: tuple(record for record in ids if record in place) for name, place in places.items()}
    tables = {name: table.tables[name][[places[name][record] for record in having]] for name, having in own.items() if having}
    return EmbeddingTable(tuple(ids), tables, own={name: own[name] for name in tables if len(own[name]) < len(ids)})
