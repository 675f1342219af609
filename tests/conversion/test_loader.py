import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from omni_jax import conversion
from omni_jax.conversion.engine import tree_shapes
from omni_jax.conversion.folder import read_manifest
from omni_jax.conversion.store import Store, StoreWriter, fetch_raw, open_stores, raw_file, read_raw
from omni_jax.model import carried_shapes
from omni_jax.planning.chips import CHIPS, Topology
from omni_jax.planning.host_bytes import host_bytes
from tests.conversion import checkpoints
from tests.conversion.test_round_trip import beats_file
from tests.tolerances import assert_close
from tests.train.tiny_run import environment, free_port, start


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    base = checkpoints.write_base(folder / "base", checkpoints.tensors(checkpoints.model_config()))
    beats_file(base / "BEATs.pt")
    adapter = checkpoints.write_adapter(folder / "adapter", checkpoints.model_config(lora=checkpoints.LORA))
    conversion.to_jax(base, folder / "model", adapter=adapter)
    return folder / "model"


@pytest.mark.jit
def test_leaves_have_the_models_shapes_and_stored_types(model):
    config, params = conversion.load(model)
    assert {path: leaf.shape for path, leaf in params.items()} | carried_shapes(config) == tree_shapes(config)
    assert params["decoder", "embed", "embedding"].dtype == jnp.bfloat16
    assert params["head", "fc1", "kernel"].dtype == jnp.float32  # the adapter's version


@pytest.mark.jit
def test_what_no_embedding_depends_on_is_stored_and_not_read(model):
    counts = []
    config, params = conversion.load(model, report_bytes=lambda *found: counts.append(found))
    carried = carried_shapes(config)
    assert len(carried) == 4 and not carried.keys() & params.keys()
    (store,) = (s for s in open_stores(epath.Path(model), read_manifest(model)) if "lm_head.kernel" in s.arrays)
    assert {".".join(path) for path in carried} <= store.arrays.keys()
    assert counts == [(sum(x.nbytes for x in params.values()),) * 2]


@pytest.mark.jit
@pytest.mark.parametrize("dtype", ["float32", jnp.bfloat16])
def test_dtype_casts_every_leaf(model, dtype):
    stored, cast = conversion.load(model)[1], conversion.load(model, dtype=dtype)[1]
    for path, leaf in cast.items():
        assert_close(leaf, stored[path].astype(dtype), "round_trip")


@pytest.mark.jit
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


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of parts of a kilobyte, with an array of several pieces, one of zeros and one without axes."""
    folder, rng = epath.Path(tmp_path_factory.mktemp("store")) / "weights", np.random.default_rng(0)
    arrays = {
        "large": rng.standard_normal((40, 6, 4)).astype(np.float32),
        "half": rng.standard_normal((5, 7)).astype(jnp.bfloat16),
        "zero": np.zeros((4, 3), np.float32),
        "scalar": np.array(2.5, np.float32),
    }
    with StoreWriter(folder, part_bytes=1024) as writer:
        for name, array in arrays.items():
            writer.add(name, array)
    return folder, arrays


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("large", np.s_[0:40, 0:6, 0:4]),
        ("large", np.s_[3:29, 2:4, 0:4]),
        ("large", np.s_[39:40, 0:6, 1:2]),
        ("half", np.s_[1:4, 2:7]),
        ("zero", np.s_[1:2, 0:3]),
        ("scalar", ()),
    ],
)
def test_a_part_of_an_array_is_read_alone(store, name, index):
    folder, arrays = store
    opened = Store(folder)
    assert (len(opened.arrays[name].pieces) > 1) == (name == "large")
    part = opened.read_part(name, index)
    np.testing.assert_array_equal(part, arrays[name][index], strict=True)
    if name != "zero":  # which has no file
        assert opened.bytes_read == arrays[name][index].nbytes


def test_an_object_store_gives_the_same_rows(store):
    folder, arrays = store
    file, shape, index = folder / "part-00000" / "large@0", (10, 6, 4), np.s_[2:9, 1:5, 3:4]
    raw = raw_file(file, shape, np.dtype(np.float32))
    assert raw is not None
    np.testing.assert_array_equal(read_raw(raw, shape, np.dtype(np.float32), index), arrays["large"][:10][index])
    np.testing.assert_array_equal(fetch_raw(raw, shape, np.dtype(np.float32), index), arrays["large"][:10][index])
    assert raw_file(file, (9, 6, 4), np.dtype(np.float32)) is None and raw_file(folder / "nothing", shape, np.dtype(np.float32)) is None


MESHES = ((1, 8, 1), (1, 4, 2), (2, 4, 1))


@pytest.mark.slow
def test_each_of_two_processes_reads_what_the_load_plan_says(tmp_path):
    base = checkpoints.write_base(tmp_path / "base", checkpoints.tensors(checkpoints.model_config(), np.float32))
    beats_file(base / "BEATs.pt")
    conversion.to_jax(base, tmp_path / "model", dtype="float32")
    address, out = f"127.0.0.1:{free_port()}", [tmp_path / f"{i}.json" for i in range(2)]
    around = environment(tmp_path / "cache", devices=4)
    meshes = json.dumps(MESHES)
    script = [sys.executable, "-m", "tests.conversion.load_in_processes", address, "2"]
    pair = [start([*script, str(i), str(tmp_path / "model"), meshes, str(out[i])], around) for i in range(2)]
    try:
        said = [process.communicate(timeout=300)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [0, 0], said
    config, _ = conversion.load(tmp_path / "model")
    for number, (data, fsdp, tensor) in enumerate(MESHES):
        mesh = jax.sharding.AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"))
        plan = host_bytes(config, mesh, Topology(CHIPS["v5e"], (2, 4)), bytes_per_value=4)
        read = [json.loads(path.read_text())[number] for path in out]
        assert plan["hosts"] == 2 and {whole for _, whole in read} == {plan["bytes"]}
        assert sorted(found for found, _ in read) == [plan["bytes_per_host_least"], plan["bytes_per_host"]]
        assert (plan["bytes_per_host"] < plan["bytes"]) == (data == 1)
