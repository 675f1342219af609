"""Eight devices: parameters really are split, and embeddings are those of one device."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from omni_jax.config import ModelConfig
from omni_jax.model import Encoder, abstract_params, param_axes, param_shardings
from omni_jax.model.runner import Runner, place_params
from omni_jax.parallel import RULES, make_mesh, partition_spec, sharding
from omni_jax.tokens.buckets import Planner
from omni_jax.types import Features, RowBatch
from tests.model import batches, builders, reference_towers
from tests.tolerances import assert_close

MESHES = [(1, 8, 1), (2, 2, 2), (8, 1, 1), (1, 2, 4)]


@pytest.mark.parametrize("config", [builders.SEVEN_B, builders.ODD, builders.EVEN], ids=["7b", "odd", "even"])
def test_every_parameter_names_its_axes(config: ModelConfig):
    shapes, axes = abstract_params(config), param_axes(config)
    assert axes.keys() == shapes.keys()
    for path, names in axes.items():
        assert len(names) == len(shapes[path].shape), path
        assert ("layers" in names) == ("layers" in path), path
        assert all(name is None or name in RULES for name in names), path


@pytest.mark.parametrize("sizes", [*MESHES, (1, 16, 1), (4, 64, 1), (2, 16, 4)])
def test_rules_resolve_for_every_parameter_at_7b(sizes: tuple[int, int, int]):
    mesh = AbstractMesh(sizes, ("data", "fsdp", "tensor"))
    shapes = abstract_params(builders.SEVEN_B)
    whole = 0
    for path, names in param_axes(builders.SEVEN_B).items():
        spec = partition_spec(names, shapes[path].shape, mesh)
        ways = math.prod(dict(mesh.shape)[axis] for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ()))
        whole += math.prod(shapes[path].shape) // ways
    # A device holds its share of fsdp x tensor and little more: what stays whole is small.
    share = sum(math.prod(s.shape) for s in shapes.values()) / (sizes[1] * sizes[2])
    assert whole < 1.1 * share + 5e7


@pytest.mark.parametrize("sizes", MESHES)
def test_parameters_lie_where_the_rules_say(even: Encoder, sizes: tuple[int, int, int]):
    mesh = make_mesh(*sizes)
    ways = {"data": sizes[0], "fsdp": sizes[1], "tensor": sizes[2]}
    shardings = param_shardings(even.config, mesh)
    placed = nnx.to_flat_state(place_params(nnx.state(even, nnx.Param), mesh))
    for path, leaf in placed:
        array: jax.Array = leaf[...]
        want = []
        for name, length in zip(leaf.get_metadata()["axes"], array.shape, strict=True):
            target: Any = RULES[name] if name else None
            want.append(length // ways[target] if target and length % ways[target] == 0 else length)
        assert [s.data.shape for s in array.addressable_shards] == [tuple(want)] * 8, path
        assert array.sharding.is_equivalent_to(shardings[tuple(str(p) for p in path)], array.ndim), path
        if "layers" in path and path[-1] == "kernel" and "gate" not in path[:-1]:
            # Every matrix of every stack is split over all of fsdp and tensor.
            assert math.prod(want) * sizes[1] * sizes[2] == array.size, path


@pytest.fixture(scope="module")
def even() -> Encoder:
    return builders.random_encoder(builders.EVEN, host=True)[0]


@pytest.fixture(scope="module")
def features() -> list[Features]:
    return batches.clips(builders.EVEN)[:3:2]


def embed(encoder: Encoder, features: list[Features], sizes: tuple[int, int, int] | None) -> batches.Embeddings:
    mesh = None if sizes is None else make_mesh(*sizes)
    planner = Planner(row_multiple=1 if sizes is None else sizes[0] * sizes[1])
    return batches.embed(Runner(encoder, mesh), batches.plan(encoder.config, features, planner))


@pytest.fixture(scope="module")
def one_device(even: Encoder, features: list[Features]) -> batches.Embeddings:
    return embed(even, features, None)


@pytest.mark.jit
@pytest.mark.parametrize("sizes", [m if m == (2, 2, 2) else pytest.param(m, marks=pytest.mark.slow) for m in MESHES])
def test_eight_devices_agree_with_one(even: Encoder, features: list[Features], one_device: batches.Embeddings, sizes: tuple[int, int, int]):
    got = embed(even, features, sizes)
    assert got.keys() == one_device.keys()
    for key, vector in got.items():
        assert_close(vector, one_device[key], "sharding")


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1)])
def test_eight_devices_agree_with_one_where_widths_do_not_divide(sizes: tuple[int, int, int]):
    encoder, _ = builders.random_encoder(builders.ODD, host=True)
    features = batches.clips(builders.ODD)
    one, eight = embed(encoder, features, None), embed(encoder, features, sizes)
    assert one.keys() == eight.keys()
    for key, vector in eight.items():
        assert_close(vector, one[key], "sharding")


@pytest.mark.jit
def test_the_fusion_head_does_not_gather_its_weight(even: Encoder):
    """Its weight stays split (686 MiB at 7B): the compiler sums partial products instead."""
    mesh = make_mesh(1, 8, 1)
    graph, state = nnx.split(even.head)
    states = jax.device_put(builders.noise(1, 8, 2, 64), sharding(("batch", None, None), (8, 2, 64), mesh))
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda p, x: nnx.merge(graph, p)(x)).lower(place_params(state, mesh), states).compile()
    program = compiled.as_text() or ""
    assert even.head.fc1.kernel.shape == (128, 64) and "f32[16,64]" in program
    assert "f32[128,64]" not in program


# ---------------------------------------------------------------------------------------------------------- one part at a time

ITEMS = 4  # one for each group of devices that shares a batch item


def inputs(config: ModelConfig) -> dict[str, dict[str, np.ndarray]]:
    """Arguments of each part, the batch axis first."""
    grid = np.array(reference_towers.patch_order(6, 8, 2))
    prompts = [builders.random_prompt(seed, 9, 8, config.decoder.vocab_size) for seed in range(ITEMS)]
    rows = builders.pack([[(p, 1, 1)] for p in prompts], [[8, 4]] * ITEMS, 9)
    return {
        "video_tokens": {
            "patches": builders.noise(1, ITEMS, len(grid), config.vision.patch_values),
            "coords": np.tile(grid, (ITEMS, 1, 1)),
            "window": np.tile(np.arange(len(grid)) // 24, (ITEMS, 1)),
        },
        "whisper_tokens": {"mel": builders.noise(2, ITEMS, 28, config.audio.num_mel_bins), "frames": np.full(ITEMS, 28)},
        "beats_tokens": {"fbank": builders.noise(3, ITEMS, 48, config.beats.num_mel_bins), "frames": np.full(ITEMS, 48)},
        "embed_rows": {**rows, "positions": np.moveaxis(rows["positions"], 0, 1)},
    }


def call(model: Encoder, part: str, given: dict[str, jax.Array]) -> jax.Array:
    if part == "beats_tokens":
        return model.beats_tokens(given["fbank"], given["frames"], 7)
    if part == "embed_rows":
        return jnp.stack(model.embed_rows(RowBatch(**given), jnp.asarray(builders.noise(4, 8, model.config.decoder.hidden_size))))
    return getattr(model, part)(**given)


def part_of(encoder: Encoder, part: str, sizes: tuple[int, int, int] | None = None) -> jax.Array:
    """Returns what one part gives on one device, or on a mesh of `sizes`."""
    graph, params = nnx.split(encoder)
    given = inputs(encoder.config)[part]

    def compute(params: nnx.State, given: dict[str, jax.Array]) -> jax.Array:
        return call(nnx.merge(graph, params), part, given)

    if sizes is None:
        return jax.jit(compute)(params, given)
    mesh = make_mesh(*sizes)
    placed = {n: jax.device_put(a, sharding(("batch", *[None] * (a.ndim - 1)), a.shape, mesh)) for n, a in given.items()}
    with jax.set_mesh(mesh):
        return jax.jit(compute)(place_params(params, mesh), placed)


@pytest.fixture(scope="module")
def on_one_device(even: Encoder) -> Callable[[str], jax.Array]:
    """What each part gives on one device, compiled once."""
    return functools.cache(functools.partial(part_of, even))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [*MESHES, (2, 4, 1), (1, 4, 2), (4, 1, 2), (1, 1, 8), (2, 1, 4)])
@pytest.mark.parametrize("part", ["video_tokens", "whisper_tokens", "beats_tokens", "embed_rows"])
def test_every_part_on_every_mesh(even: Encoder, on_one_device: Callable[[str], jax.Array], part: str, sizes: tuple[int, int, int]):
    """On (2, 2, 2) the compiler once laid out the audio tower's last carry by the projection's weight, and got it wrong."""
    assert_close(part_of(even, part, sizes), on_one_device(part), "sharding")
