import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import conversion
from conversion.engine import tree_shapes
from tests.conversion import checkpoints
from tests.conversion.test_round_trip import beats_file
from tests.tolerances import assert_close


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    base = checkpoints.write_base(folder / "base", checkpoints.tensors(checkpoints.model_config()))
    beats_file(base / "BEATs.pt")
    adapter = checkpoints.write_adapter(folder / "adapter", checkpoints.model_config(lora=checkpoints.LORA))
    conversion.to_jax(base, folder / "model", adapter=adapter)
    return folder / "model"


def test_leaves_have_the_models_shapes_and_stored_types(model):
    config, params = conversion.load(model)
    assert {path: leaf.shape for path, leaf in params.items()} == tree_shapes(config)
    assert params["decoder", "embed", "embedding"].dtype == jnp.bfloat16
    assert params["head", "fc1", "kernel"].dtype == jnp.float32  # the adapter's version


@pytest.mark.parametrize("dtype", ["float32", jnp.bfloat16])
def test_dtype_casts_every_leaf(model, dtype):
    stored, cast = conversion.load(model)[1], conversion.load(model, dtype=dtype)[1]
    for path, leaf in cast.items():
        assert_close(leaf, stored[path].astype(dtype), "round_trip")


def test_leaves_go_where_their_sharding_says(model):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def places(config):
        shapes = tree_shapes(config)
        axes = {
            ("decoder", "layers", "attn", "q", "kernel"): PartitionSpec(None, "fsdp", "tensor"),
            ("decoder", "layers", "attn", "q", "lora_a"): PartitionSpec(None, "fsdp"),
            ("decoder", "embed", "embedding"): PartitionSpec("fsdp", "tensor"),
        }
        return {path: NamedSharding(mesh, axes.get(path, PartitionSpec())) for path in shapes}

    config, sharded = conversion.load(model, shardings=places)
    _, plain = conversion.load(model)
    for path, leaf in sharded.items():
        assert leaf.sharding.is_equivalent_to(places(config)[path], leaf.ndim), path
        assert_close(np.asarray(leaf), np.asarray(plain[path]), "round_trip")
    q = sharded["decoder", "layers", "attn", "q", "kernel"]
    assert q.addressable_shards[0].data.shape == (2, 8, 16)
