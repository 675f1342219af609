"""Gradients by different roads: cached and plain, shared rows and own rows, remat policies, what is frozen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.objectives import SCALARS, tuple_loss
from omni_jax.parallel import make_mesh, use_mesh
from omni_jax.train import LossConfig, TrainableConfig, TrainStep, streams
from omni_jax.train.gradients import Forward, collapse_metrics, compute_losses
from omni_jax.train.plan import step_kind
from omni_jax.train.remat import REMAT, policies
from tests.tolerances import assert_close
from tests.train.leaf_by_leaf import assert_same_gradients
from tests.train.random_batches import MODEL, QUICK, WITH_DROPOUT, batch, parts, recipe

pytestmark = pytest.mark.jit

TEMPERATURE, BIAS = SCALARS["temperature"].path, SCALARS["siglip_bias"].path
ALL = {"tuple": 1.0, "distillation": 1.0, "pairwise": 1.0, "siglip": 0.1, "joint": 0.8}


def forward(losses: LossConfig, model=MODEL, remat="layer", choice="adapter") -> tuple[Forward, dict, dict]:
    """Returns the encoder's functions, trainable and frozen parameters."""
    step = TrainStep(model, recipe(trainable=TrainableConfig(recipe=choice)), dtype=jnp.float32)
    trainable, frozen = parts(step)
    return Forward(model, losses, step.names, jnp.float32, policies(remat, model.decoder.num_layers)), trainable, frozen


@functools.cache
def compiled(road: str, fwd: Forward):
    return jax.jit(fwd.plain if road == "plain" else fwd.cached, static_argnames="kind", compiler_options=QUICK)


def plain(fwd: Forward, trainable, frozen, made, key=None):
    """Gradient and metrics of a batch of one micro-batch."""
    assert made.micro_batches == 1
    return compiled("plain", fwd)(trainable, frozen, jax.tree.map(lambda x: x[0], made), kind=made.kinds[0], key=key)


def cached(fwd: Forward, trainable, frozen, made, keys=None):
    return compiled("cached", fwd)(trainable, frozen, made, kind=made.kinds[0], keys=keys)


def assert_same_update(got, want):
    # NumPy from here on: jax would compile each shape's arithmetic.
    (gradients, metrics), (wanted, expected) = jax.device_get((got, want))
    assert metrics.keys() == expected.keys()
    for name in expected:
        assert_close(metrics[name], expected[name], "update_loss")
    assert_same_gradients(gradients, wanted)


@pytest.mark.parametrize(
    ("update", "pairs", "scope"), [(0, "cycle", "local"), (1, "all", "global"), pytest.param(2, "cycle", "local", marks=pytest.mark.slow)]
)
def test_gradient_caching_equals_the_whole_batch_at_once(update, pairs, scope):
    """Four micro-batches of two against one of eight whose shuffles stay in the same four blocks."""
    losses = LossConfig(ALL, temperature=0.2, pairs=pairs, hard_scope=scope, learn_temperature=True, negatives="global")
    fwd, trainable, frozen = forward(losses)
    trainable = {**trainable, TEMPERATURE: jnp.float32(1.3), BIAS: jnp.float32(-2.0)}
    got = cached(fwd, trainable, frozen, batch(losses, update, micro=4, clips=8))
    whole = plain(fwd, trainable, frozen, batch(losses, update, micro=1, clips=8, blocks=4))
    assert_same_update(got, whole)
    assert min(abs(float(whole[0][name])) for name in (TEMPERATURE, BIAS)) > 1e-3


def test_clips_in_pieces_give_what_all_at_once_give(monkeypatch):
    losses = LossConfig(temperature=0.2)
    fwd, trainable, frozen = forward(losses)
    made = batch(losses, 1, clips=4)
    want = plain(fwd, trainable, frozen, made)
    row = made.rows.ids.shape[2] * made.rows.ids.shape[3] * MODEL.decoder.hidden_size * 4
    monkeypatch.setattr(streams, "AT_ONCE", 2 * row)
    compiled.cache_clear()
    assert_same_update(plain(fwd, trainable, frozen, made), want)
    compiled.cache_clear()


def test_pieces_come_from_every_device_and_go_back():
    x = jnp.arange(16.0)[:, None] * jnp.ones(3)
    with use_mesh(make_mesh(2, 2, 1, devices=jax.devices()[:4])):
        pieces = jax.jit(lambda x: streams.split_clips(x, 2))(x)
        back = jax.jit(streams.join_clips)(pieces)
    assert pieces[:, :, 0].tolist() == [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]
    assert np.array_equal(back, x)


@pytest.mark.slow
def test_gradient_caching_equals_the_whole_batch_where_everything_trains():
    losses = LossConfig(temperature=0.2, negatives="global")
    fwd, trainable, frozen = forward(losses, choice="all")
    assert fwd.kept == ()
    got = cached(fwd, trainable, frozen, batch(losses, 1, micro=2, clips=4))
    assert_same_update(got, plain(fwd, trainable, frozen, batch(losses, 1, clips=4, blocks=2)))
    assert {name.partition("/")[0] for name, g in jax.device_get(got[0]).items() if np.abs(g).max() > 0} == {
        "audio",
        "beats",
        "bridge",
        "decoder",
        "head",
        "vision",
    }


def test_both_passes_of_gradient_caching_drop_the_same():
    losses = LossConfig(temperature=0.2, negatives="global")
    fwd, trainable, frozen = forward(losses, WITH_DROPOUT)
    made, keys = batch(losses, 1, micro=2, clips=4), jax.random.split(jax.random.PRNGKey(3), 2)
    kind = made.kinds[0]

    def whole(trainable):
        found = []
        for i in range(2):
            one = jax.tree.map(lambda x, i=i: x[i], made)
            kept = fwd.keep(trainable, frozen, one, kind)
            found.append(fwd.embed(trainable, frozen, one, kept, kind, keys[i], hard=True))
        pool = {name: jnp.concatenate([z[name] for z in found]) for name in found[0]}
        return compute_losses(pool, {}, losses, kind, 2)

    expected = jax.jit(jax.grad(whole, has_aux=True), compiler_options=QUICK)(trainable)
    got = cached(fwd, trainable, frozen, made, keys)
    assert_same_update(got, expected)
    other = cached(fwd, trainable, frozen, made, keys[::-1])
    assert abs(float(other[1]["loss"] - got[1]["loss"])) > 1e-3


def test_a_caption_that_shares_the_anchors_row_is_the_hard_negative_of_its_own_row():
    losses = LossConfig(temperature=0.2)
    fwd, trainable, frozen = forward(losses)
    shared, apart = (batch(losses, 0, clips=4, share_prefix=s) for s in (True, False))
    assert shared.hard is None and apart.hard is not None
    assert_same_update(plain(fwd, trainable, frozen, shared), plain(fwd, trainable, frozen, apart))


@pytest.mark.parametrize("update", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_all_prompts_of_a_clip_in_one_row_give_what_rows_of_their_own_give(update):
    """Update 0 has the hard negative's caption as a branch in that row, update 1 a hard negative with a row to itself."""
    losses = LossConfig(temperature=0.2)
    fwd, trainable, frozen = forward(losses)
    together, apart = (batch(losses, update, clips=4, one_row=one) for one in (True, False))
    assert together.rows.ids.shape[2] == 1 and apart.rows.ids.shape[2] == 3
    assert_same_update(plain(fwd, trainable, frozen, together), plain(fwd, trainable, frozen, apart))


@pytest.mark.parametrize("remat", ["none", "layer:1,dots", pytest.param("dots", marks=pytest.mark.slow)])
def test_remat_policies_agree(remat):
    losses = LossConfig(temperature=0.2)
    made = batch(losses, 1, clips=4)
    fwd, trainable, frozen = forward(losses)
    other, *_ = forward(losses, remat=remat)
    assert_same_update(plain(other, trainable, frozen, made), plain(fwd, trainable, frozen, made))


def test_the_gradient_is_the_slope_of_the_loss():
    """Central differences along a random direction; without L_T and L_D, whose hard negatives and teacher move without counting."""
    losses = LossConfig({"pairwise": 1, "siglip": 0.1}, temperature=0.5, learn_temperature=True)
    fwd, trainable, frozen = forward(losses)
    trainable = {**trainable, TEMPERATURE: jnp.float32(0.7), BIAS: jnp.float32(-2.0)}
    made = batch(losses, 2, clips=4)
    rng = np.random.default_rng(0)
    trainable = jax.device_get(trainable)
    way = {name: rng.standard_normal(x.shape).astype(np.float32) for name, x in trainable.items()}
    step = 1e-4

    def loss(sign):
        moved = {name: x + np.float32(sign * step) * way[name] for name, x in trainable.items()}
        return float(plain(fwd, moved, frozen, made)[1]["loss"])

    gradients, _ = jax.device_get(plain(fwd, trainable, frozen, made))
    slope = sum(float(np.vdot(gradients[name], way[name])) for name in way)
    assert_close((loss(1) - loss(-1)) / (2 * step), slope, "finite_difference")


def test_the_hard_negative_takes_no_gradient():
    """Its embedding changes with LoRA, the derivative of the loss along it does not count."""
    losses = LossConfig({"tuple": 1}, temperature=0.2)
    fwd, trainable, frozen = forward(losses)
    made = batch(losses, 1, clips=4)
    one, kind = jax.tree.map(lambda x: x[0], made), made.kinds[0]

    def negative(trainable):
        kept = fwd.keep(trainable, frozen, one, kind)
        return jnp.sum(fwd.embed(trainable, frozen, one, kept, kind, None, hard=True)["hard"])

    assert not any(g.any() for g in jax.device_get(jax.jit(jax.grad(negative), compiler_options=QUICK)(trainable)).values())


@pytest.mark.parametrize("remat", REMAT)
def test_nothing_is_kept_or_computed_for_the_gradient_of_frozen_weights(remat: str):
    """No loop over the decoder's layers gives or is given a part of a frozen stack, and towers have no backward loop at all."""
    losses = LossConfig(temperature=0.2)
    fwd, trainable, frozen = forward(losses, remat=remat)
    made = batch(losses, 1, clips=4)
    one = jax.tree.map(lambda x: x[0], made)
    program = jax.make_jaxpr(lambda t, f: fwd.plain(t, f, one, made.kinds[0], None))(trainable, frozen)
    loops = [eqn for eqn in equations(program.jaxpr) if eqn.primitive.name == "scan"]
    outputs, inputs = ({var.aval.shape for eqn in loops for var in vars_of(eqn)} for vars_of in (lambda e: e.outvars, lambda e: e.invars))
    stacks = {x.shape for name, x in frozen.items() if "decoder/layers" in name and name.endswith("kernel")}
    # The loop runs all layers but the last: the frozen stack is read where it is, LoRA's is cut.
    cut = {(layers - 1, *rest) for layers, *rest in stacks}
    assert stacks and stacks <= inputs and not (stacks | cut) & outputs and not cut & inputs
    layers, *rest = trainable["decoder/layers/attn/q/lora_a"].shape
    assert (layers - 1, *rest) in inputs & outputs
    assert sum(eqn.params["length"] == MODEL.vision.num_layers and not eqn.params["reverse"] for eqn in loops) >= 1
    assert sum(bool(eqn.params["reverse"]) for eqn in loops) == 1  # the decoder's


def equations(jaxpr):
    """Every equation, those of inner programs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def test_towers_that_no_stream_reads_do_not_run():
    losses = LossConfig({"pairwise": 1}, temperature=0.2)
    fwd, trainable, frozen = forward(losses)
    made = batch(losses, 0, clips=4)
    spoilt = {name: jnp.full_like(x, jnp.nan) if name.startswith("vision/") else x for name, x in frozen.items()}
    assert np.isfinite(float(plain(fwd, trainable, spoilt, made)[1]["loss"]))


def test_the_weight_of_hard_negatives_is_that_of_the_config():
    rng = np.random.default_rng(0)
    z = {name: jnp.asarray(rng.standard_normal((4, 6)), jnp.float32) for name in ("anchor", "positive", "hard")}
    losses = LossConfig({"tuple": 1}, temperature=0.2, hard_weight=3.0)
    found = compute_losses(z, {}, losses, step_kind(0, losses), 2)[1]["L_T"]
    assert_close(found, tuple_loss(*z.values(), temperature=0.2, hard_blocks=2, hard_weight=3.0), "loss")


def test_spread_tells_collapsed_embeddings_from_full_ones():
    full = collapse_metrics(jnp.eye(8))
    assert_close(full["mean_cosine"], 0.0, "update_loss")
    assert_close(full["effective_rank"], 7.0, "update_loss")
    line = collapse_metrics(jnp.array([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1]]))
    assert float(line["mean_cosine"]) > 0.97 and float(line["effective_rank"]) < 1.1
    same = collapse_metrics(jnp.ones((4, 3)))
    assert_close(same["mean_cosine"], 1.0, "update_loss")
    assert_close(same["effective_rank"], 0.0, "update_loss")
