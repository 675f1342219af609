"""The real programs as shapes: they lower for 256 chips without libtpu, and the shapes are those of real batches."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.config import PRESETS, ConfigError
from omni_jax.config.backbones import WAVE_7B
from omni_jax.parallel import make_mesh
from omni_jax.planning.abstract import abstract_batch, abstract_state, planned_batch
from omni_jax.planning.chips import read_topology
from omni_jax.planning.devices import planning_mesh
from omni_jax.planning.programs import Setting, embed_programs, train_program
from omni_jax.train import LossConfig, OptimizerConfig, StepConfig, place_batch, step_kind
from omni_jax.types import BatchShapes
from tests.model import builders
from tests.train.random_batches import CHUNKS, FBANK, MODEL, STEPS, batch, recipe, weights
from tests.train.test_step import make

PRESET = PRESETS["training"]


def setting(topology: str = "v5e:16x16", slices: int = 1, sizes: tuple[int, int, int] = (1, 256, 1), **changes: object) -> Setting:
    config = StepConfig(OptimizerConfig(total_steps=100), LossConfig(negatives="global"))
    given: dict[str, int] = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    made = Setting(WAVE_7B, config, PRESET, read_topology(topology, slices), given, clips=slices * sizes[0] * sizes[1])
    return dataclasses.replace(made, **changes)


def abstract_mesh(given: Setting):
    return planning_mesh(given.topology, dict(given.mesh), compiled=False)


def test_the_published_architecture_is_that_of_the_manifests():
    assert WAVE_7B == builders.SEVEN_B


@pytest.mark.jit
@pytest.mark.parametrize("count", [0, 1, 2])
def test_every_step_kind_lowers_for_256_chips_without_libtpu(count: int):
    given = setting(micro_batches=2)
    program = train_program(given, abstract_mesh(given), count)
    assert program.status == "lowered" and program.kind is not None
    assert dataclasses.replace(program.kind, layout=None, reach=0) == step_kind(count, given.recipe.losses)


@pytest.mark.jit
def test_a_step_lowers_for_two_slices_and_for_pools_of_their_own():
    given = setting(slices=2, sizes=(1, 128, 2), micro_batches=2)
    losses = dataclasses.replace(given.recipe.losses, negatives="micro")
    given = dataclasses.replace(given, recipe=dataclasses.replace(given.recipe, losses=losses))
    assert given.looped == 2
    assert train_program(given, abstract_mesh(given), 1).status == "lowered"


@pytest.mark.jit
def test_the_embedding_pass_lowers_for_256_chips_without_libtpu():
    given = setting()
    assert [p.name for p in embed_programs(given, abstract_mesh(given))] == ["embed/vision", "embed/audio", "embed/beats", "embed/rows"]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_abstract_batches_have_the_shapes_and_places_of_real_ones(count: int):
    losses = LossConfig(negatives="global", temperature=0.2)
    real = place_batch(batch(losses, count, micro=2, clips=16, blocks=2), make_mesh())
    kind = step_kind(count, losses)
    shapes = BatchShapes(STEPS, 24, CHUNKS, FBANK, row_tokens=64, hard_tokens=64)
    made = abstract_batch(MODEL, kind, shapes, clips=8, micro_batches=2, blocks=2, mesh=make_mesh())
    assert jax.tree.structure(made) == jax.tree.structure(real)
    for got, want in zip(jax.tree.leaves(made), jax.tree.leaves(real), strict=True):
        assert (got.shape, got.dtype, got.sharding.spec) == (want.shape, want.dtype, want.sharding.spec)


@pytest.mark.jit
def test_abstract_state_is_what_the_step_starts_from():
    step = make(recipe(learn_temperature=True), mesh=make_mesh())
    for made, real in zip(abstract_state(step, MODEL, jnp.float32), step.init(weights()), strict=True):
        assert jax.tree.structure(made) == jax.tree.structure(real)
        for got, want in zip(jax.tree.leaves(made), jax.tree.leaves(real), strict=True):
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
            assert got.sharding.is_equivalent_to(want.sharding, len(got.shape))


def test_shapes_of_the_training_preset():
    """Eight frames of 224 x 224 and 8 s: 256 video tokens, 400 audio tokens, then captions of 129; a clip's prompts in one row."""
    tuples, caption, sound, frames = 256 + 400 + 4 + 129, 129, 400 + 2 + 6, 256 + 2 + 6
    text, audio = (planned_batch(WAVE_7B, PRESET, step_kind(count, LossConfig()), row_multiple=1) for count in (0, 1))
    assert dataclasses.astuple(text[1]) == (4, 256, 4, 800, 2 * tuples + caption + caption + sound, 0)
    assert dataclasses.astuple(audio[1]) == (4, 256, 4, 800, 2 * tuples + caption + frames, tuples)
    assert [len(kind.rows) for kind, _ in (text, audio)] == [1, 1]


def test_batches_that_do_not_divide_are_refused():
    given = setting(clips=100)
    with pytest.raises(ConfigError, match=r"100 clips does not divide over 256 batch shards \(data x fsdp\); use a multiple of 256"):
        train_program(given, abstract_mesh(given), 0)
    with pytest.raises(ConfigError, match="does not divide into 3 blocks"):
        train_program(dataclasses.replace(given, clips=256, blocks=3), abstract_mesh(given), 0)


def test_whole_tracks_have_no_one_shape():
    with pytest.raises(ConfigError, match="audio_seconds=0"):
        planned_batch(WAVE_7B, dataclasses.replace(PRESET, audio_seconds=0.0), step_kind(0, LossConfig()))


def test_no_array_is_made():
    given = setting()
    state = abstract_batch(WAVE_7B, step_kind(0, LossConfig()), BatchShapes(4, 256, 4, 800, 1024), clips=256, micro_batches=1)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state))
    patches = state.clips.vision.patches
    assert math.prod(patches.shape) > 2**28 and not isinstance(patches, np.ndarray) and given.clips == 256
