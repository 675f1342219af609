"""The stand-ins have the sizes that their names say, and the page shows what came of them."""

from __future__ import annotations

import math

import pytest

from tests.repository import ROOT
from tools.stand_ins import CASES, StandIn, model_operations, shapes


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_stand_in_is_as_large_as_its_name_says(case: StandIn):
    weights = sum(math.prod(shape) for shape in shapes(case).values())
    assert weights / 1e9 == pytest.approx(float(case.name.split()[-1].removesuffix("B")), rel=0.05)
    # Six operations for each weight and token; the table of embeddings multiplies nothing, attention comes on top.
    tokens = case.batch * case.tokens
    attention = 3 * 2 * 2 * case.layers * case.heads * case.head * case.tokens * tokens
    expected = 6 * (weights - case.vocabulary * case.width) * tokens + attention
    assert model_operations(case) == pytest.approx(expected)


def test_the_page_shows_published_shares_beside_predicted_ones_with_their_error():
    page = (ROOT / "docs/guides/pods.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| MaxText ")]
    published = {case.name: case.published for case in CASES}
    assert rows
    for name, _, stated, predicted, error, *_ in rows:
        assert stated == f"{published[name]:.1%}".replace("%", " %")
        share = float(predicted.removesuffix(" %")) / 100
        assert error == f"{share / published[name] - 1:+.0%}".replace("%", " %")
