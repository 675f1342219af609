"""An embedding depends on its clip alone: not on its company, its bucket, shared prefixes, or the devices it ran on."""

from __future__ import annotations

import numpy as np
import pytest

from omni_jax.config import TABLE_MODALITIES, TABLES
from omni_jax.model import Encoder
from omni_jax.model.runner import Runner
from omni_jax.tokens.buckets import Planner
from omni_jax.types import Features
from tests.model import batches, builders, reference
from tests.model.batches import Embeddings
from tests.model.reference import Weights
from tests.tolerances import assert_close

pytestmark = pytest.mark.jit


@pytest.fixture(scope="module")
def features() -> list[Features]:
    return batches.clips(builders.ODD)


@pytest.fixture(scope="module")
def runner(odd: tuple[Encoder, Weights]) -> Runner:
    return Runner(odd[0])


@pytest.fixture(scope="module")
def mixed(features: list[Features], runner: Runner) -> Embeddings:
    """All clips and tables in one batch, every prompt with its own copy of the media."""
    return batches.embed(runner, batches.plan(builders.ODD, features, Planner(), share_prefix=False))


def same(got: Embeddings, want: Embeddings) -> None:
    assert got.keys() == want.keys()
    for (clip, table), vector in got.items():
        try:
            assert_close(vector, want[clip, table], "invariance")
        except AssertionError as e:
            e.add_note(f"clip {clip}, table {table}")
            raise


def test_every_clip_gets_the_tables_it_can(features: list[Features], mixed: Embeddings):
    has = [{m for m, there in (("t", f.record.text), ("v", f.vision), ("a", f.audio)) if there is not None} for f in features]
    assert set(mixed) == {(c, t) for c in range(len(features)) for t in TABLES if TABLE_MODALITIES[t] <= has[c]}
    vectors = np.stack(list(mixed.values()))
    # Far apart beside the tolerance: agreeing with the wrong prompt would be seen.
    distances = np.abs(vectors[:, None] - vectors[None]).max(axis=-1) + np.eye(len(vectors))
    assert np.isfinite(vectors).all() and distances.min() > 1e-2


def test_shared_prefixes(features: list[Features], runner: Runner, mixed: Embeddings):
    shared = batches.plan(builders.ODD, features, Planner())
    apart = batches.plan(builders.ODD, features, Planner(), share_prefix=False)
    assert shared.used_tokens < apart.used_tokens
    same(batches.embed(runner, shared), mixed)


def test_larger_buckets(features: list[Features], runner: Runner, mixed: Embeddings):
    roomy = batches.plan(builders.ODD, features, batches.Roomy())
    tight = batches.plan(builders.ODD, features, Planner())
    assert roomy.used_tokens == tight.used_tokens and roomy.total_tokens > tight.total_tokens + 300
    same(batches.embed(runner, roomy), mixed)


def test_other_order(features: list[Features], runner: Runner, mixed: Embeddings):
    turned = batches.embed(runner, batches.plan(builders.ODD, features[::-1], Planner(), share_prefix=False))
    same({(len(features) - 1 - clip, table): vector for (clip, table), vector in turned.items()}, mixed)


@pytest.mark.parametrize("table", TABLES)
def test_every_table_alone(features: list[Features], runner: Runner, mixed: Embeddings, alone: Planner, table: str):
    for clip, item in enumerate(features):
        if (clip, table) in mixed:
            got = batches.embed(runner, batches.plan(builders.ODD, [item], alone, (table,)))
            same({(clip, name): vector for (_, name), vector in got.items()}, {(clip, table): mixed[clip, table]})


@pytest.fixture(scope="module")
def alone() -> Planner:
    """One plan for all single prompts, so that they share programs."""
    return Planner()


def test_runner_agrees_with_the_plain_rewrite(features: list[Features], odd: tuple[Encoder, Weights], mixed: Embeddings):
    """The last rung without golden data: a caption through tokens, rows, decoder and text head."""
    _, w = odd
    batch = batches.plan(builders.ODD, features[:1], Planner(), ("text",))
    rows = batch.rows[0]
    ids = rows.ids[0][rows.segment[0] == 1]
    embeddings = reference.embed_prompt(w / "decoder", ids, {})
    states = reference.decoder(w / "decoder", builders.ODD.decoder, embeddings, np.tile(np.arange(len(ids)), (3, 1)))
    assert_close(mixed[0, "text"], states[-1, -1], "embed")


def test_text_goes_through_the_head_it_is_asked_for(features: list[Features], odd: tuple[Encoder, Weights], runner: Runner):
    batch = batches.plan(builders.ODD, features[:1], Planner(), ("text", "audio"))
    last, fused = ({name: v for _, name, v in runner.embed(batch, head)} for head in ("last", "fused"))
    assert np.array_equal(last["audio"], fused["audio"])
    assert np.abs(last["text"] - fused["text"]).max() > 1e-2


def test_programs_are_counted_and_reused(features: list[Features], runner: Runner):
    batch = batches.plan(builders.ODD, features, Planner())
    batches.embed(runner, batch)
    count = len(runner.programs)
    assert {program.split()[0] for program in runner.programs} == {"vision", "audio", "beats", "rows"}
    batches.embed(runner, batches.plan(builders.ODD, features[::-1], Planner()))
    assert len(runner.programs) == count


def test_two_batches_in_flight_do_not_mix(features: list[Features], runner: Runner):
    """The media table is one buffer on the device; a batch started before the last one was read must leave it alone."""
    first, second = (batches.plan(builders.ODD, [f], Planner()) for f in features[:2])
    one, two = runner.embed(first), runner.embed(second)
    got = [{(0, name): v for _, name, v in found} for found in (one, two)]
    for vectors, batch in zip(got, (first, second), strict=True):
        same(vectors, batches.embed(runner, batch))
