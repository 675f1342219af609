"""What the command says about the cost of rounding: cosines, points of R@1, and when to choose otherwise."""

from __future__ import annotations

import numpy as np
import pytest

from omni_jax.retrieval.rounding_loss import rounding_loss, sample
from omni_jax.types import EmbeddingTable

pytestmark = pytest.mark.jit
IDS = tuple(f"clip {n}" for n in range(40))


def tables(noise: float, ids: tuple[str, ...] = IDS, names: tuple[str, ...] = ("text", "video")) -> EmbeddingTable:
    """Tables in which every record finds itself, moved by noise."""
    rng, rows = np.random.default_rng(3), np.eye(40, dtype=np.float32)[[IDS.index(i) for i in ids]]
    return EmbeddingTable(ids, {name: rows + noise * rng.standard_normal(rows.shape).astype(np.float32) for name in names})


def test_a_loss_of_more_than_two_points_says_how_much_and_what_to_choose():
    found = rounding_loss(tables(0.5), tables(0.0))
    assert found.exact == {"t2v": 100.0, "v2t": 100.0} and max(found.lost.values()) > 2
    ours = sum(found.rounded.values()) / 2
    said = found.said("int8-dynamic", "int8")
    assert f"mean R@1 of 2 directions {ours:.1f} %, with int8 100.0 %: {100 - ours:.1f} points lost, most lost in " in said
    assert said.startswith(f"int8-dynamic on 40 of these records, against int8: smallest cosine {found.cosine:.4f} ({found.table})")
    assert said.endswith("; choose int8 instead") and "\n" not in said


def test_a_small_loss_is_said_without_advice():
    said = rounding_loss(tables(0.001), tables(0.0)).said("int8-dynamic", "int8")
    assert said.endswith("with int8 100.0 %: 0.0 points lost")


def test_tables_without_a_direction_and_records_that_one_lacks_are_compared_by_cosine():
    found = rounding_loss(tables(0.1, names=("text",)), tables(0.0, IDS[5:], ("text",)))
    assert (found.records, found.exact) == (35, {}) and 0.5 < found.cosine < 1
    assert found.said("a", "b").endswith("(text)")


def test_a_sample_is_the_same_each_time_and_keeps_the_order():
    chosen = sample(IDS, 7)
    assert chosen == sample(IDS, 7) == sorted(chosen, key=IDS.index) and len({*chosen}) == 7
    assert sample(IDS, 100) == list(IDS)
