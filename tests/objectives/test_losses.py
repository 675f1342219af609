"""The losses: recorded values, a case by hand, plain NumPy, gradients, invariances, and shards against the whole batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import ArrayLike

from omni_jax.objectives import (
    LOSSES,
    Pool,
    active_duals,
    active_hard_negative,
    active_pairs,
    active_students,
    distillation_loss,
    info_nce,
    pairwise_loss,
    siglip_loss,
    sigmoid_contrast,
    tuple_loss,
)
from tests.golden_set import GoldenSet
from tests.tolerances import assert_close

pytestmark = [pytest.mark.jit, pytest.mark.exact]

TAU = 0.07

compiled = jax.jit(info_nce, static_argnames=("hard_scope", "hard_blocks"))


def plain(a: ArrayLike, b: ArrayLike, hard: Sequence[np.ndarray] | None = None, tau: float = TAU) -> float:
    """InfoNCE row by row in float64; `hard[i]` are the hard negatives that row i sees."""

    def unit(rows: ArrayLike) -> np.ndarray:
        x = np.asarray(rows, np.float64)
        return x / np.sqrt((x * x).sum(-1, keepdims=True))

    total = 0.0
    for x, y in ((unit(a), unit(b)), (unit(b), unit(a))):
        for i, row in enumerate(x):
            rivals = [row @ other / tau for other in y]
            rivals += [row @ unit(other) / tau for other in (hard[i] if hard is not None else ())]
            top = max(rivals)
            total += math.log(sum(math.exp(r - top) for r in rivals)) + top - rivals[i]
    return total / (2 * np.shape(a)[0])


def batch(seed: int, *shapes: tuple[int, int]) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


# ------------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("step", range(3))
def test_golden_losses_from_recorded_embeddings(golden: GoldenSet, step: int) -> None:
    read = {
        name: jnp.asarray(golden.losses[f"step{step}/{name}"]) for name in ("anchor", "positive", "hard_negative", "text", "audio", "video")
    }
    singles = {name: read[name] for name in ("text", "audio", "video")}
    tau = golden.spec["temperature"]
    got = {
        "L_T": tuple_loss(read["anchor"], read["positive"], read["hard_negative"], temperature=tau),
        "L_D": distillation_loss(read["anchor"], [singles[name] for name in active_students(step)], temperature=tau),
        "L_A": pairwise_loss(singles, active_pairs(step), temperature=tau),
    }
    for name, value in got.items():
        assert value.dtype == jnp.float32 and value.shape == ()
        assert_close(value, golden.losses[f"step{step}/{name}"], "loss_from_embeddings")


def test_three_by_three_by_hand() -> None:
    # Cosines: a0.b = (1, 0, 0.6), a1.b = (0, 1, 0.8), a2.b = (0, -1, -0.8); temperature 0.5 doubles them.
    a = jnp.array([[2.0, 0.0], [0.0, 1.0], [0.0, -3.0]])
    b = jnp.array([[1.0, 0.0], [0.0, 5.0], [3.0, 4.0]])
    rows = [math.log(math.exp(2) + 1 + math.exp(1.2)) - 2, math.log(1 + math.exp(2) + math.exp(1.6)) - 2]
    rows.append(math.log(1 + math.exp(-2) + math.exp(-1.6)) + 1.6)
    columns = [math.log(math.exp(2) + 2) - 2, math.log(1 + math.exp(2) + math.exp(-2)) - 2]
    columns.append(math.log(math.exp(1.2) + math.exp(1.6) + math.exp(-1.6)) + 1.6)
    assert_close(info_nce(a, b, temperature=0.5), (sum(rows) + sum(columns)) / 6, "loss_sharding")
    # One hard negative (0, 1): a . h = (0, 1, -1), b . h = (0, 1, 0.8), a further column in every row of both directions.
    hard = jnp.array([[0.0, 7.0]])
    terms = [math.log(math.exp(2) + 1 + math.exp(1.2) + 1) - 2, math.log(1 + 2 * math.exp(2) + math.exp(1.6)) - 2]
    terms.append(math.log(1 + 2 * math.exp(-2) + math.exp(-1.6)) + 1.6)
    terms += [math.log(math.exp(2) + 3) - 2, math.log(1 + 2 * math.exp(2) + math.exp(-2)) - 2]
    terms.append(math.log(math.exp(1.2) + 2 * math.exp(1.6) + math.exp(-1.6)) + 1.6)
    assert_close(info_nce(a, b, hard, temperature=0.5), sum(terms) / 6, "loss_sharding")


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1, 4, 8]),
    blocks=st.sampled_from([1, 2, 4]),
    tau=st.sampled_from([0.01, 0.05, 1.0]),
)
def test_values_are_those_of_plain_numpy(seed: int, size: int, blocks: int, tau: float) -> None:
    hypothesis.assume(size % blocks == 0)
    a, b, hard = batch(seed, (size, 5), (size, 5), (size, 5))
    seen = np.split(np.asarray(hard), blocks)
    mine = [seen[i * blocks // size] for i in range(size)]
    scale = 1 / tau  # the largest logit: float32 rounds relative to it
    assert_close(tau * compiled(a, b, temperature=tau), plain(a, b, tau=tau) / scale, "loss_sharding")
    assert_close(tau * compiled(a, b, hard, temperature=tau, hard_blocks=blocks), plain(a, b, mine, tau) / scale, "loss_sharding")
    every = [np.asarray(hard)] * size
    assert_close(
        tau * compiled(a, b, hard, temperature=tau, hard_blocks=blocks, hard_scope="global"),
        plain(a, b, every, tau) / scale,
        "loss_sharding",
    )


def test_means_over_pairs_and_students() -> None:
    t, v, a, z = batch(4, *[(6, 8)] * 4)
    singles = {"text": t, "audio": a, "video": v}
    pairs = active_pairs(0, "all")
    want = np.mean([plain(t, a), plain(t, v), plain(a, v)])
    assert_close(pairwise_loss(singles, pairs, temperature=TAU), want, "loss_from_embeddings")
    want = np.mean([plain(z, t), plain(z, a), plain(z, v)])
    assert_close(distillation_loss(z, singles, temperature=TAU), want, "loss_from_embeddings")
    assert_close(distillation_loss(z, [t, a, v], temperature=TAU), want, "loss_from_embeddings")


def test_the_joint_loss_compares_each_modality_with_the_two_others_together() -> None:
    z = dict(zip(("text", "audio", "video", "av", "at", "tv"), batch(12, *[(6, 8)] * 6), strict=True))
    terms = {dual: plain(z[name], z[dual]) for name, dual in (("text", "av"), ("video", "at"), ("audio", "tv"))}

    def joint(names: tuple[str, ...]) -> jax.Array:
        return LOSSES["joint"].value(Pool({name: z[name] for name in names}, (), (), {"temperature": jnp.float32(TAU)}))

    assert_close(joint(tuple(z)), np.mean(list(terms.values())), "loss_from_embeddings")
    for step in range(3):  # under the cycle what it compares is embedded anyway
        (dual,) = active_duals(step)
        assert_close(joint((*active_students(step), dual)), terms[dual], "loss_from_embeddings")
    assert active_duals(1, "all") == ("av", "at", "tv")


def plain_sigmoid(a: ArrayLike, b: ArrayLike, tau: float, bias: float) -> float:
    """The sigmoid loss pair by pair in float64."""
    x, y = (np.asarray(rows, np.float64) / np.linalg.norm(np.asarray(rows, np.float64), axis=1, keepdims=True) for rows in (a, b))
    signs = ((i, j, 1 if i == j else -1) for i in range(len(x)) for j in range(len(y)))
    return sum(math.log1p(math.exp(-sign * (x[i] @ y[j] / tau + bias))) for i, j, sign in signs) / len(x)


def test_the_sigmoid_loss_is_that_of_plain_numpy_and_its_bias_takes_a_gradient() -> None:
    a, b = batch(11, (5, 8), (5, 8))
    value, slope = jax.value_and_grad(lambda bias: sigmoid_contrast(a, b, temperature=0.5, bias=bias))(jnp.float32(-1.5))
    assert_close(value, plain_sigmoid(a, b, 0.5, -1.5), "loss_from_embeddings")
    step = 1e-5
    assert_close(slope, (plain_sigmoid(a, b, 0.5, -1.5 + step) - plain_sigmoid(a, b, 0.5, -1.5 - step)) / (2 * step), "loss_gradient")
    singles = {"text": a, "audio": b, "video": a + b}
    want = np.mean([plain_sigmoid(singles[x], singles[y], TAU, -10.0) for x, y in active_pairs(0, "all")])
    assert_close(siglip_loss(singles, active_pairs(0, "all"), temperature=TAU, bias=-10.0) / want, 1.0, "loss_from_embeddings")


def test_schedule_rotates_pairs_and_hard_negatives() -> None:
    assert [active_pairs(step)[0] for step in range(4)] == [("text", "audio"), ("text", "video"), ("audio", "video"), ("text", "audio")]
    assert [active_students(step) for step in range(3)] == [("text", "audio"), ("text", "video"), ("audio", "video")]
    assert active_students(1, "all") == ("text", "audio", "video")
    assert [active_hard_negative(step) for step in range(4)] == ["text", "audio", "video", "text"]
    assert {active_hard_negative(step, audio_only=True) for step in range(3)} == {"audio"}
    with pytest.raises(ValueError, match="'cycle' or 'all'"):
        active_pairs(0, "some")


# --------------------------------------------------------------------------------------------------------------- invariances


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**32 - 1))
def test_order_of_the_batch_and_lengths_do_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b, hard = batch(seed, (8, 6), (8, 6), (8, 6))
    value = compiled(a, b, hard, temperature=TAU)
    order, other = rng.permutation(8), rng.permutation(8)
    assert_close(compiled(a[order], b[order], hard[other], temperature=TAU), value, "loss_invariance")
    lengths = jnp.asarray(np.exp(rng.uniform(-8, 8, size=(3, 8, 1))), jnp.float32)
    assert_close(compiled(a * lengths[0], b * lengths[1], hard * lengths[2], temperature=TAU), value, "loss_invariance")
    assert_close(compiled(b, a, hard, temperature=TAU), value, "loss_invariance")
    turn = jnp.asarray(np.linalg.qr(rng.normal(size=(6, 6)))[0], jnp.float32)
    assert_close(compiled(a @ turn, b @ turn, hard @ turn, temperature=TAU), value, "loss_invariance")


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**32 - 1))
def test_order_and_lengths_matter_to_no_loss(seed: int) -> None:
    """Values stay; the gradient of a row that was stretched shrinks as much, and moves with its row."""
    rng = np.random.default_rng(seed)
    xs = batch(seed, *[(8, 6)] * 5)
    values, gradients = every(*xs, *SCALARS)
    order = rng.permutation(8)
    moved_values, moved = every(*(x[order] for x in xs), *SCALARS)
    lengths = [jnp.asarray(2.0 ** rng.integers(-6, 7, size=(8, 1)), jnp.float32) for _ in xs]
    stretched_values, stretched = every(*(x * length for x, length in zip(xs, lengths, strict=True)), *SCALARS)
    assert_close(moved_values, values, "loss_invariance")
    assert_close(stretched_values, values, "loss_invariance")
    for gradient, by_order, by_length, length in zip(gradients[:5], moved[:5], stretched[:5], lengths, strict=True):
        assert_close(by_order, gradient[order], "loss_invariance")
        assert_close(by_length * length, gradient, "loss_invariance")


def test_low_precision_inputs_are_computed_in_float32() -> None:
    a, b = (x.astype(jnp.bfloat16) for x in batch(1, (5, 7), (5, 7)))
    value = info_nce(a, b, temperature=0.01)
    assert value.dtype == jnp.float32
    assert_close(value, info_nce(a.astype(jnp.float32), b.astype(jnp.float32), temperature=0.01), "round_trip")


# ----------------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("which", [0, 1, 2], ids=["a", "b", "hard"])
def test_gradients_are_those_of_finite_differences_in_float64(which: int) -> None:
    xs = [np.asarray(x, np.float64) for x in batch(3, (3, 4), (3, 4), (3, 4))]
    got = jax.grad(lambda *xs: compiled(*xs, temperature=TAU), argnums=which)(*(jnp.asarray(x, jnp.float32) for x in xs))
    step, want = 1e-6, np.zeros_like(xs[which])

    def moved(place: tuple[int, ...], by: float) -> float:
        copies = [x.copy() for x in xs]
        copies[which][place] += by
        return plain(copies[0], copies[1], [copies[2]] * 3)

    for place in np.ndindex(want.shape):
        want[place] = (moved(place, step) - moved(place, -step)) / (2 * step)
    assert_close(got, want, "loss_gradient")


def test_distillation_from_a_better_teacher_has_the_reference_gradient_and_lifts_its_students() -> None:
    """The teacher tells four factors of each clip, a student three, and worse; SPEC section 6 in float64, differentiated by hand."""
    rng = np.random.default_rng(5)
    factors = np.stack(np.unravel_index(rng.permutation(256)[:48], (4, 4, 4, 4)), axis=1)
    tables = rng.normal(size=(4, 4, 32))
    told = np.stack([tables[k][factors[:, k]] for k in range(4)])  # (factor, clip, width)
    teacher = told.sum(0)
    students = [told[list(kept)].sum(0) + rng.normal(size=teacher.shape) for kept in ((0, 1, 2), (0, 1, 3), (0, 2, 3))]

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def found(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.mean(np.argmax(unit(x) @ unit(y).T, axis=1) == np.arange(len(x))))

    def slope(student: np.ndarray) -> np.ndarray:
        a, b = unit(teacher), unit(student)
        logits = np.exp(a @ b.T / TAU)
        rows, columns = logits / logits.sum(1, keepdims=True), logits / logits.sum(0, keepdims=True)
        by_unit = (rows + columns - 2 * np.eye(len(a))).T @ a / (2 * len(a) * TAU)
        across = by_unit - (by_unit * b).sum(1, keepdims=True) * b
        return across / np.linalg.norm(student, axis=1, keepdims=True) / len(students)

    def loss(xs: list[jax.Array]) -> jax.Array:
        return distillation_loss(jnp.asarray(teacher, jnp.float32), xs, temperature=TAU)

    gradient = jax.grad(loss)([jnp.asarray(x, jnp.float32) for x in students])
    for got, student in zip(gradient, students, strict=True):
        assert_close(got, slope(student), "gradient")
    before = [found(x, y) for x in students for y in students if x is not y]
    moved = [x - 100 * np.asarray(g, np.float64) for x, g in zip(students, gradient, strict=True)]
    after = [found(x, y) for x in moved for y in moved if x is not y]
    assert found(teacher, teacher) == 1 and max(before) < 0.3 and np.mean(after) > np.mean(before) + 0.05


def test_teacher_and_hard_negatives_take_no_gradient() -> None:
    z, x, hard = batch(5, (4, 6), (4, 6), (4, 6))
    teacher, student = jax.grad(lambda z, x: distillation_loss(z, [x], temperature=TAU), argnums=(0, 1))(z, x)
    assert not np.any(teacher) and np.any(student)
    anchor, positive, negative = jax.grad(lambda *xs: tuple_loss(*xs, temperature=TAU), argnums=(0, 1, 2))(z, x, hard)
    assert np.any(anchor) and np.any(positive) and not np.any(negative)


def test_learned_temperature_takes_a_gradient() -> None:
    a, b = batch(6, (4, 6), (4, 6))
    slope = jax.grad(lambda tau: info_nce(a, b, temperature=tau))(jnp.float32(0.5))
    step = 1e-5
    assert_close(slope, (plain(a, b, tau=0.5 + step) - plain(a, b, tau=0.5 - step)) / (2 * step), "loss_gradient")


def test_zero_vectors_have_finite_values_and_gradients() -> None:
    a, b = batch(7, (4, 6), (4, 6))
    value, gradient = jax.value_and_grad(lambda x: info_nce(x, b, temperature=TAU))(a.at[2].set(0))
    assert np.isfinite(value) and np.isfinite(gradient).all()


# ------------------------------------------------------------------------------------------------------------------- sharding


def all_losses(z: jax.Array, p: jax.Array, hard: jax.Array, t: jax.Array, v: jax.Array, tau: jax.Array, bias: jax.Array, **kw) -> jax.Array:
    """The losses as one (4,) array, so that a weighted sum of them can be differentiated."""
    shards = {name: kw.pop(name) for name in ("hard_scope", "hard_blocks") if name in kw}
    return jnp.stack(
        [
            tuple_loss(z, p, hard, temperature=tau, **shards, **kw),
            distillation_loss(z, [t, v], temperature=tau, **kw),
            pairwise_loss({"text": t, "video": v}, (("text", "video"),), temperature=tau, **kw),
            # A sum over the batch, not a mean: brought to the size of the others.
            siglip_loss({"text": t, "video": v}, (("text", "video"),), temperature=tau, bias=bias, **kw) / 20,
        ]
    )


def with_gradients(losses: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]:
    """Compiled: seven inputs to the (4,) losses, and the gradient of a weighted sum of them by each input."""

    def weighted(*xs: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = losses(*xs)
        return values @ jnp.array([1.0, 0.7, 1.3, 0.9]), values

    compiled = jax.jit(jax.value_and_grad(weighted, argnums=range(7), has_aux=True))

    def call(*xs: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        (_, values), gradients = compiled(*xs)
        return values, gradients

    return call


every = with_gradients(all_losses)
SCALARS = (np.float32(TAU), np.float32(-2.0))  # NumPy: processes of their own import this before they know their devices
ONE_AXIS, TWO_AXES = (("data",), (8,)), (("data", "fsdp"), (2, 4))


@pytest.mark.parametrize(
    ("axes", "shape", "scope", "blocks"),
    [
        (*ONE_AXIS, "local", None),  # a block a shard
        (*TWO_AXES, "local", 24),  # three blocks a shard
        (*TWO_AXES, "local", 3),  # blocks that begin in the midst of a shard
        (*ONE_AXIS, "local", 1),
        (*TWO_AXES, "global", None),
    ],
)
def test_shards_and_jit_on_eight_devices_equal_one_device(
    axes: tuple[str, ...], shape: tuple[int, ...], scope: str, blocks: int | None
) -> None:
    mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(shape))
    xs = batch(8, *[(24, 10)] * 5)
    whole = functools.partial(all_losses, hard_scope=scope, hard_blocks=blocks or 8)
    want, want_gradients = with_gradients(whole)(*xs, *SCALARS)

    spread = [jax.device_put(x, NamedSharding(mesh, P(axes))) for x in xs] + list(SCALARS)
    split = functools.partial(all_losses, hard_scope=scope, hard_blocks=blocks, axis_name=axes)
    mapped = jax.shard_map(split, mesh=mesh, in_specs=(*[P(axes)] * 5, P(), P()), out_specs=P())
    for losses in (mapped, whole):
        got, gradients = with_gradients(losses)(*spread)
        assert_close(got, want, "loss_sharding")
        for gradient, expected in zip(gradients, want_gradients, strict=True):
            assert_close(gradient, expected, "loss_sharding_gradient")


def test_gradient_taken_inside_the_shards_is_that_of_the_whole_batch() -> None:
    mesh = Mesh(np.array(jax.devices()), ("data",))
    a, b = batch(9, (16, 6), (16, 6))

    def inside(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.grad(lambda x: info_nce(x, b, temperature=TAU, axis_name="data"))(a)

    got = jax.jit(jax.shard_map(inside, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(a, b)
    assert_close(got, jax.grad(lambda x: info_nce(x, b, temperature=TAU))(a), "loss_sharding_gradient")


def test_local_and_global_hard_negatives_differ() -> None:
    a, b, hard = batch(10, (8, 6), (8, 6), (8, 6))
    local = info_nce(a, b, hard, temperature=TAU, hard_blocks=4)
    everywhere = info_nce(a, b, hard, temperature=TAU, hard_blocks=4, hard_scope="global")
    assert float(everywhere) > float(local) > float(info_nce(a, b, temperature=TAU))


@pytest.mark.parametrize("blocks", [1, 4])
def test_a_hard_negative_of_weight_two_counts_as_two_of_weight_one(blocks: int) -> None:
    a, b, hard = batch(11, (8, 6), (8, 6), (8, 6))
    twice = jnp.repeat(hard.reshape(blocks, -1, 6), 2, axis=1).reshape(-1, 6)
    found, want = (tuple_loss(a, b, x, temperature=TAU, hard_blocks=blocks, hard_weight=w) for x, w in ((hard, 2.0), (twice, 1.0)))
    assert_close(found, want, "loss")
    assert float(found) > float(tuple_loss(a, b, hard, temperature=TAU, hard_blocks=blocks))


# ------------------------------------------------------------------------------------------------------------------ bad input


def test_shapes_that_do_not_fit_are_refused() -> None:
    a, b, hard = batch(0, (4, 3), (5, 3), (4, 2))
    with pytest.raises(ValueError, match="must both be"):
        info_nce(a, b, temperature=TAU)
    with pytest.raises(ValueError, match="hard negatives"):
        info_nce(a, a, hard, temperature=TAU)
    with pytest.raises(ValueError, match="must divide"):
        info_nce(a, a, a, temperature=TAU, hard_blocks=3)
    with pytest.raises(ValueError, match="'local' or 'global'"):
        info_nce(a, a, a, temperature=TAU, hard_scope="near")
    with pytest.raises(ValueError, match="no pairs"):
        pairwise_loss({"text": a}, (), temperature=TAU)
    with pytest.raises(ValueError, match="no students"):
        distillation_loss(a, [], temperature=TAU)
    with pytest.raises(ValueError, match="no pairs"):
        siglip_loss({"text": a}, (), temperature=TAU, bias=-10.0)
    with pytest.raises(ValueError, match="must both be"):
        sigmoid_contrast(a, b, temperature=TAU, bias=-10.0)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    with pytest.raises(ValueError, match=r"hard_blocks=3 must divide the batch \(8\)"):
        jax.shard_map(
            lambda x: info_nce(x, x, x, temperature=TAU, axis_name="data", hard_blocks=3), mesh=mesh, in_specs=P("data"), out_specs=P()
        )(jnp.ones((8, 3)))
