"""Whole updates: accumulation, the count of programs, skipped updates, dropout, meshes, memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.model import attention, decoder
from omni_jax.objectives import LOSSES, SCALARS
from omni_jax.parallel import make_mesh
from omni_jax.train import LossConfig, StepConfig, TrainableConfig, TrainStep, place_batch
from omni_jax.train.gradients import Forward
from omni_jax.train.remat import REMAT
from omni_jax.train.state import state_shardings
from omni_jax.types import InputError
from tests.tolerances import assert_close
from tests.train.leaf_by_leaf import assert_same_gradients
from tests.train.random_batches import MODEL, QUICK, WITH_DROPOUT, batch, recipe, weights

pytestmark = pytest.mark.jit

TEMPERATURE = SCALARS["temperature"].path


def make(config: StepConfig, model=MODEL, mesh=None) -> TrainStep:
    return TrainStep(model, config, dtype=jnp.float32, mesh=mesh, compiler_options=QUICK)


def first_moments(state):
    return jax.device_get(next(s for s in state.optimizer if hasattr(s, "mu")).mu)


@pytest.fixture(scope="module")
def released() -> TrainStep:
    """Two micro-batches of four clips a step, each a pool of its own."""
    return make(recipe(negatives="micro"))


def micro(update: int, **sizes):
    return batch(LossConfig(negatives="micro", temperature=0.2), update, micro=2, clips=8, **sizes)


def test_attention_is_told_how_far_prompts_reach(monkeypatch):
    step, told = make(recipe()), []

    def row_attention(*ids, reach, **options):
        told.append(reach)
        return attention.row_attention(*ids, **options)

    monkeypatch.setattr(decoder, "row_attention", row_attention)
    one = batch(LossConfig(negatives="global"))
    kind = dataclasses.replace(one.kinds[0], reach=128)
    step.lower(*step.init(weights()), dataclasses.replace(one, kinds=(kind,)))
    assert told == [128]


def test_accumulation_averages_the_micro_batches(released):
    state, frozen = released.init(weights())
    made = micro(0)
    assert [one.kinds[0].hard for one in made] == ["text", "audio"] and made[0].hard is None
    forward = Forward(MODEL, released.config.losses, released.names, jnp.float32, REMAT["layer"])
    plain = jax.jit(forward.plain, static_argnames="kind", compiler_options=QUICK)
    parts = [plain(state.trainable, frozen, jax.tree.map(lambda x: x[0], one), kind=one.kinds[0], key=None) for one in made]
    (one, metrics), (other, more) = jax.device_get(parts)
    gradients = {name: (one[name] + other[name]) / 2 for name in one}
    norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients.values()))
    after, got = released(state, frozen, made)
    assert_close(got["loss"], (metrics["loss"] + more["loss"]) / 2, "update_loss")
    assert_close(got["grad_norm"], norm, "gradient_norm")
    moments, factor = first_moments(after), 0.1 * min(1.0, 1 / (norm + 1e-6))
    for name in ("head/fc1/kernel", "bridge/norm/scale", "decoder/layers/attn/q/lora_b"):
        assert_close(moments[name], gradients[name] * factor, "gradient_cache")


def test_each_program_compiles_once_however_kinds_follow_each_other(released):
    state, frozen = released.init(weights())
    for update in (0, 1, 2, 0, 1, 2):
        state, metrics = released(state, frozen, micro(update, seed=update))
    names = sorted(program.split()[0] for program in released.programs)
    assert names == ["add", "apply", "micro", "micro", "micro"]
    assert int(state.step) == 6 and np.isfinite(float(metrics["loss"]))


def test_an_update_that_is_not_finite_is_skipped_and_counted(released):
    state, frozen = released.init(weights())
    state, _ = released(state, frozen, micro(0))
    before = jax.device_get(state)
    whole, made = micro(1)
    vision = made.clips.vision
    patches = np.array(vision.patches)
    patches[0, 2, 0, 0, 3] = np.nan
    clips = dataclasses.replace(made.clips, vision=dataclasses.replace(vision, patches=patches))
    spoilt = (whole, dataclasses.replace(made, clips=clips))
    for row in (1, 2):
        state, metrics = released(state, frozen, spoilt)
        assert int(metrics["skipped"]) == int(metrics["skipped_in_row"]) == row
    after = jax.device_get(state)
    assert int(after.step) == 3
    for old, new in zip(
        jax.tree.leaves((before.trainable, before.optimizer)), jax.tree.leaves((after.trainable, after.optimizer)), strict=True
    ):
        assert_close(new, old, "round_trip")
    state, metrics = released(state, frozen, made)
    assert int(metrics["skipped"]) == 2 and int(metrics["skipped_in_row"]) == 0
    # The schedule goes on where it stood: this is the second update that was made.
    assert float(metrics["learning_rate"]) == pytest.approx(float(released.rate(1)), rel=1e-6)


def test_the_caller_s_parameters_outlive_the_step(released):
    state, frozen = released.init(weights())
    released(state, frozen, micro(0))
    assert all(np.isfinite(np.asarray(x)).all() for x in weights().values())


def test_metrics_name_every_group_that_trains(released):
    state, frozen = released.init(weights())
    _, metrics = released(state, frozen, micro(0))
    groups = {name for name in metrics if name.startswith("grad_norm/")}
    assert groups == {"grad_norm/lora", "grad_norm/head", "grad_norm/bridge"}
    assert all(float(metrics[name]) > 0 for name in groups)
    whole = np.sqrt(sum(float(metrics[name]) ** 2 for name in groups))
    assert_close(metrics["grad_norm"], whole, "gradient_norm")
    assert {"L_T", "L_D", "L_A", "loss", "temperature", "mean_cosine", "effective_rank", "learning_rate"} < metrics.keys()


def test_dropout_is_drawn_from_seed_and_step_alone():
    config = recipe(hn_audio_only=True, pairs="all")
    step = make(config, WITH_DROPOUT)
    made = batch(config.losses, micro=2, clips=4)

    def run(at: int) -> float:
        state, frozen = step.init(weights())
        return float(step(dataclasses.replace(state, step=jnp.int32(at)), frozen, made)[1]["loss"])

    assert run(0) == run(0) and run(3) == run(3)
    assert abs(run(0) - run(3)) > 1e-4
    assert len(step.programs) == 1


def test_everything_trains_and_the_temperature_is_learned():
    config = recipe(trainable=TrainableConfig(recipe="all"), learn_temperature=True, negatives="micro")
    step = make(config)
    state, frozen = step.init(weights())
    before = jax.device_get(state.trainable)
    assert_close(np.exp(-before[TEMPERATURE]), 0.2, "update_loss")
    after, metrics = step(state, frozen, batch(config.losses, 1, clips=4))
    moved = {name for name, x in jax.device_get(after.trainable).items() if not np.array_equal(x, before[name])}
    assert TEMPERATURE in moved and not frozen
    assert {name.partition("/")[0] for name in moved} == {"vision", "audio", "beats", "bridge", "decoder", "head", "loss"}
    assert float(metrics["grad_norm/loss"]) > 0


def test_an_update_of_moments_that_are_not_finite_is_skipped(released):
    """The gradient is finite, and Adam's second moment is not: nothing would move but by NaN."""
    state, frozen = released.init(weights())
    before = jax.device_get(state.trainable)
    spoilt = [
        s._replace(nu={**s.nu, "head/fc1/kernel": s.nu["head/fc1/kernel"] * jnp.nan}) if hasattr(s, "nu") else s for s in state.optimizer
    ]
    after, metrics = released(dataclasses.replace(state, optimizer=tuple(spoilt)), frozen, micro(0))
    assert np.isfinite(float(metrics["grad_norm"])) and int(metrics["skipped"]) == 1
    for name, x in jax.device_get(after.trainable).items():
        np.testing.assert_array_equal(x, before[name])


@pytest.mark.parametrize(("shape", "negatives"), [((1, 8, 1), "global"), ((2, 4, 1), "micro"), ((2, 2, 2), "global")])
def test_a_mesh_gives_the_single_device_s_update(shape, negatives, single):
    """With every loss and every scalar; hard negatives come from the rows of one shard (global) or of two (micro)."""
    config, moments, parameters, losses = single(negatives)
    step = make(config, mesh=make_mesh(*shape))
    state, frozen = step.init(weights())
    places = jax.tree.map(lambda x: x.sharding, state)
    for update in range(2):
        state, metrics = step(state, frozen, place_batch(batch(config.losses, micro=2, clips=16, blocks=4, seed=update), step.mesh))
        assert_close(metrics["loss"], losses[update], "update_loss")
        assert_same_gradients(first_moments(state), moments[update])
    for name, value in jax.device_get(state.trainable).items():
        assert_close(value, parameters[name], "sharding")
    assert [program.split()[0] for program in step.programs] == (["update"] if negatives == "global" else ["micro", "add", "apply"])
    same = jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), state, places)
    assert all(jax.tree.leaves(same))
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state.optimizer))


# Adam divides by the size of a gradient: where that is small its rounding moves a parameter by much of the learning rate. Of a whole model
# some gradients are smaller than of what an adapter trains: there a rounding of 2e-5 would stand against a rate of 1e-4.
RATES = {"adapter": 1e-4, "all": 2e-5}


@pytest.fixture(scope="module", params=["adapter", pytest.param("all", marks=pytest.mark.slow)])
def single(request):
    """Two updates on one device, by negatives: the recipe, first moments and losses after each, the parameters after both."""
    trainable, rate = TrainableConfig(recipe=request.param), RATES[request.param]
    losses = {"weights": dict.fromkeys(LOSSES, 0.5), "learn_temperature": True, "scalars": {"siglip_bias": -2.0}}

    @functools.cache
    def run(negatives: str):
        config = recipe(hn_audio_only=True, pairs="all", trainable=trainable, learning_rate=rate, negatives=negatives, **losses)
        step = make(config)
        state, frozen = step.init(weights())
        values, moments = [], []
        for update in range(2):
            state, metrics = step(state, frozen, batch(config.losses, micro=2, clips=16, blocks=4, seed=update))
            values.append(float(metrics["loss"]))
            moments.append(first_moments(state))
        assert all(np.abs(moments[0][scalar.path]) > 1e-5 for scalar in SCALARS.values())
        return config, moments, jax.device_get(state.trainable), values

    return run


def test_moments_lie_where_their_parameters_do():
    mesh = make_mesh(2, 2, 2)
    step = make(recipe(), mesh=mesh)
    state, _ = step.init(weights())
    places = state_shardings(state, MODEL, mesh)
    adam = next(s for s in places.optimizer if hasattr(s, "mu"))
    assert adam.mu == places.trainable == adam.nu
    assert not places.trainable["head/fc1/kernel"].is_fully_replicated


def test_memory_does_not_grow_with_the_number_of_micro_batches():
    """Compiled temporaries, cached tower outputs apart, of 32 and of 4 micro-batches of eight clips."""
    config = recipe(hn_audio_only=True)
    step = make(config)
    state, frozen = step.init(weights())
    sizes = []
    kind = batch(config.losses, clips=8).kinds[0]

    def kept(trainable, frozen, batches):
        return jax.lax.map(lambda one: step.forward.keep(trainable, frozen, one, kind), batches)

    for count in (4, 32):
        shapes = jax.tree.map(lambda x, n=count: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype), batch(config.losses, clips=8))
        shapes = dataclasses.replace(shapes, kinds=(kind,) * count)
        # In XLA's own order, as one device runs it: that of tests/programs.py is for several.
        analysis = step.lower(state, frozen, shapes).compile({"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_DEFAULT"}).memory_analysis()
        assert analysis is not None
        features = jax.tree.leaves(jax.eval_shape(kept, state.trainable, frozen, shapes))
        sizes.append(analysis.temp_size_in_bytes - sum(x.size * x.dtype.itemsize for x in features))
    assert sizes[1] <= 1.15 * sizes[0]


def test_a_batch_must_say_what_it_plays(released):
    state, frozen = released.init(weights())
    with pytest.raises(InputError, match="lists 0 kinds"):
        released(state, frozen, tuple(dataclasses.replace(one, kinds=()) for one in micro(0)))
    pooled = make(recipe(negatives="global"))
    with pytest.raises(InputError, match="has the same kind"):
        pooled(state, frozen, micro(0))


@pytest.mark.slow
def test_bfloat16_activations_and_frozen_weights_give_the_float32_direction():
    losses = {"hn_audio_only": True, "pairs": "all", "temperature": 0.5}
    moments = []
    for dtype, frozen_dtype in ((jnp.float32, None), (jnp.bfloat16, "bfloat16")):
        config = recipe(frozen_dtype=frozen_dtype, **losses)
        step = TrainStep(MODEL, config, dtype=dtype, compiler_options=QUICK)
        state, frozen = step.init(weights())
        assert {x.dtype for x in state.trainable.values()} == {jnp.dtype(jnp.float32)}
        state, metrics = step(state, frozen, batch(config.losses, clips=8))
        assert np.isfinite(float(metrics["loss"])) and int(metrics["skipped"]) == 0
        moments.append(np.concatenate([m.ravel() for m in first_moments(state).values()]))
    assert_close(moments[1], moments[0], "bfloat16_cosine")
