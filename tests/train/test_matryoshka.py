"""The losses on leading dimensions: their sum, its gradient, shards of a batch, and what is refused."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.config import ConfigError
from omni_jax.objectives import LOSSES, Pool
from omni_jax.parallel import make_mesh, use_mesh
from omni_jax.train import LossConfig, RunConfig, TrainStep, step_kind
from omni_jax.train.gradients import compute_losses
from tests.objectives.test_losses import plain
from tests.tolerances import assert_close
from tests.train.random_batches import MODEL, recipe

TAU, WIDTH, CLIPS = 0.2, 12, 16
LOSSES_OF_STEP = {"tuple": 1.0, "distillation": 0.7, "pairwise": 1.3}
KIND = step_kind(1, LossConfig(LOSSES_OF_STEP))  # text and video; the hard negative exchanges audio
NAMES = ("anchor", "positive", "hard", *KIND.singles)


def pool(seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal((CLIPS, WIDTH)), jnp.float32) for name in NAMES}


def config(*dims: int, weights: tuple[float, ...] = ()) -> LossConfig:
    return LossConfig(LOSSES_OF_STEP, temperature=TAU, matryoshka_dims=dims, matryoshka_weights=weights)


def loss(z: dict[str, jax.Array], losses: LossConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
    return compute_losses(z, {}, losses, KIND, blocks=1)


def naive(z: dict[str, Any], factors: dict[int, float]) -> float:
    """The definition in float64: every loss on each number of leading dimensions."""
    total = 0.0
    for width, factor in factors.items():
        cut = {name: np.asarray(x, np.float64)[:, :width] for name, x in z.items()}
        text, video, anchor = cut["text"], cut["video"], cut["anchor"]
        parts = {
            "tuple": plain(anchor, cut["positive"], [cut["hard"]] * CLIPS, TAU),
            "distillation": (plain(anchor, text, None, TAU) + plain(anchor, video, None, TAU)) / 2,
            "pairwise": plain(text, video, None, TAU),
        }
        total += factor * sum(LOSSES_OF_STEP[name] * value for name, value in parts.items())
    return total


@pytest.mark.jit
def test_without_dimensions_value_and_gradient_are_those_of_the_losses_alone_to_the_bit() -> None:
    z, kept = pool(), config()

    def alone(z: dict[str, jax.Array]) -> jax.Array:
        values: Any = {"temperature": TAU}
        found = {name: LOSSES[name].value(Pool(z, KIND.singles, KIND.pairs, values, None, "local", 1)) for name in kept.weights}
        return sum((weight * found[name] for name, weight in kept.weights.items()), jnp.zeros(()))

    made, want = (jax.jit(jax.value_and_grad(f))(z) for f in (lambda z: loss(z, kept)[0], alone))
    assert jax.tree.all(jax.tree.map(np.array_equal, made, want))


@pytest.mark.jit
def test_each_loss_counts_on_the_leading_dimensions_too_and_its_gradient_is_the_slope() -> None:
    z, losses = pool(), config(4, 8, weights=(0.5, 2.0))
    factors = {WIDTH: 1.0, 4: 0.5, 8: 2.0}
    (value, metrics), gradient = jax.jit(jax.value_and_grad(functools.partial(loss, losses=losses), has_aux=True))(z)
    assert_close(value, naive(z, factors), "loss")
    want = plain(np.asarray(z["text"])[:, :4], np.asarray(z["video"])[:, :4], None, TAU)
    assert_close(metrics["L_A_4"], want, "loss")
    assert {"L_T", "L_T_4", "L_T_8", "L_D_8", "L_A"} <= set(metrics) and not np.asarray(gradient["hard"]).any()
    rng, step = np.random.default_rng(1), 1e-5
    # The teacher of L_D takes no gradient: the slope along its copy is that of L_T alone, so the students' are compared.
    way = {name: rng.standard_normal((CLIPS, WIDTH)) if name in ("text", "video", "positive") else 0.0 for name in NAMES}
    ends = [naive({name: np.asarray(x, np.float64) + sign * step * way[name] for name, x in z.items()}, factors) for sign in (1, -1)]
    slope = sum(float(np.sum(np.asarray(gradient[name], np.float64) * way[name])) for name in NAMES)
    assert_close(slope, (ends[0] - ends[1]) / (2 * step), "finite_difference")


@pytest.mark.jit
def test_eight_devices_give_what_one_gives() -> None:
    z, losses = pool(), config(4, 8)
    program = jax.value_and_grad(functools.partial(loss, losses=losses), has_aux=True)
    (want, _), want_gradient = jax.jit(program)(z)
    with use_mesh(make_mesh(2, 4, 1)):
        (got, _), gradient = jax.jit(program)(z)
    assert_close(got, want, "loss_sharding")
    for name in NAMES:
        assert_close(gradient[name], want_gradient[name], "loss_sharding_gradient")


def test_all_dimensions_have_their_own_factor_where_they_are_listed() -> None:
    assert config(4, 12, weights=(0.5, 3.0)).widths(12) == {12: 3.0, 4: 0.5}
    assert config(4).widths(12) == {12: 1.0, 4: 1.0} and config().widths(12) == {12: 1.0}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"matryoshka_dims": (4, 4)}, r"matryoshka_dims=\(4, 4\): must be different positive"),
        ({"matryoshka_dims": (0,)}, r"matryoshka_dims=\(0,\): must be different positive"),
        ({"matryoshka_dims": (4, 8), "matryoshka_weights": (1.0,)}, r"matryoshka_weights=\(1.0,\): give one positive number for each"),
    ],
)
def test_dimensions_that_cannot_be_used_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LossConfig(**fields)


def test_more_dimensions_than_an_embedding_has_are_refused_before_anything_is_compiled() -> None:
    with pytest.raises(ConfigError, match=r"9999 is more than the .* of an embedding"):
        TrainStep(MODEL, recipe(matryoshka_dims=(9999,)))


def test_a_config_file_s_list_of_dimensions_is_read() -> None:
    from omni_jax.configs import tiny

    values = tiny.get_config().to_dict()
    values["losses"] |= {"matryoshka_dims": [8, 16]}
    assert RunConfig.from_config(values).losses.matryoshka_dims == (8, 16)
