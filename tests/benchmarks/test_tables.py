"""The seven-table benchmark at a tiny size: equal embeddings, operations by hand, every figure there. No time is asserted."""

from __future__ import annotations

import pytest

from omni_jax.config import TABLES
from tools.benchmarks import encoder_7b, mid_size, tables


@pytest.mark.costly
def test_seven_tables_take_at_most_55_percent_of_the_operations() -> None:
    """At the mid size and at 7B, padding included: this is arithmetic over the batches, and no time."""
    for config in (mid_size.mid_config(), encoder_7b.shape_7b()):
        clips = mid_size.synthetic_clips(config, 2)
        together, apart = tables.work(config, clips, TABLES)
        assert together.computed <= 0.55 * apart.computed
        assert together.needed <= 0.55 * apart.needed
        six, six_apart = tables.work(config, clips, tables.SIX)
        assert six.computed < six_apart.computed < apart.computed


@pytest.mark.jit
def test_run_compares_the_embeddings_and_gives_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    config = encoder_7b.shape_7b(layers=2, width=128)
    results = tables.run(pairs=1, config=config, clips=2, large=config, grid=(2, 4, 6), mel_frames=200)
    assert results["difference"] <= tables.LARGEST_DIFFERENCE
    assert set(results) == {"difference", *tables.CASES}
    for name in tables.CASES:
        figures = results[name]
        assert figures["share_of_operations"] == figures["share_of_operations_7b"] < 1 and figures["ratio"] > 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[2:]] == list(tables.CASES)
