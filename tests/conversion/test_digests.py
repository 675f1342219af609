"""Values that storage changed after they were written are refused at every read, and never exported."""

import json
import shutil

import numpy as np
import pytest
from etils import epath

from omni_jax import conversion
from omni_jax.conversion import store as store_module
from omni_jax.conversion.folder import read_manifest
from omni_jax.conversion.store import Store, StoreWriter, open_stores
from omni_jax.types import InputError
from tests.conversion import checkpoints
from tests.conversion.test_round_trip import beats_file


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digests")
    base = checkpoints.write_base(folder / "base", checkpoints.tensors(checkpoints.model_config(), np.float32))
    beats_file(base / "BEATs.pt")
    adapter = checkpoints.write_adapter(folder / "adapter", checkpoints.model_config(lora=checkpoints.LORA))
    conversion.to_jax(base, folder / "model", adapter=adapter)
    return folder / "model"


def zeros(data):
    return bytes(len(data))


def flip(data):
    return data[:-2] + bytes([data[-2] ^ 0x40]) + data[-1:]


def values_of(folder, name):
    """Returns the file that holds the values of a piece."""
    (file,) = [path for path in folder.glob(f"part-*/{name}@0/*") if not path.name.startswith(".")]
    return file


@pytest.mark.jit
@pytest.mark.parametrize("change", [zeros, flip, None], ids=["zeros", "one_bit", "absent"])
@pytest.mark.parametrize(
    ("part", "name"), [("weights", "decoder.layers.attn.q.kernel.1"), ("weights", "bridge.norm.scale"), ("adapter", "head.fc1.kernel")]
)
def test_changed_values_are_neither_loaded_nor_exported(converted, tmp_path, change, part, name):
    model = tmp_path / "model"
    shutil.copytree(converted, model)
    file = values_of(model / part, name)
    file.unlink() if change is None else file.write_bytes(change(file.read_bytes()))  # zarr reads zeros where there is no file
    refusal = f"{name}.*{'missing' if change is None else 'other values than were written'}.*convert the checkpoint again"
    if part == "adapter" or name != "bridge.norm.scale":  # which the adapter replaces
        with pytest.raises(InputError, match=refusal):
            conversion.load(model)
    outputs = {"base_out": tmp_path / "out"} if part == "weights" else {"adapter_out": tmp_path / "out"}
    with pytest.raises(InputError, match=refusal):
        conversion.to_torch(model, **outputs)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_index_or_weights_of_another_folder_are_refused(converted, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(converted, model)
    path = model / "weights" / "index.json"
    index = json.loads(path.read_text())
    index["arrays"]["bridge.norm.scale"]["digests"] = ["0" * 32]
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"index\.json: does not belong to this folder"):
        conversion.load(model)
    index["arrays"]["bridge.norm.scale"]["rows"] = 0
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"index\.json: cannot be read \(bridge.norm.scale has a digest for each 0 rows\)"):
        conversion.load(model)
    shutil.rmtree(model / "weights")
    shutil.copytree(converted / "adapter", model / "weights")
    with pytest.raises(InputError, match="does not belong to this folder"):
        conversion.to_torch(model, base_out=tmp_path / "out")


@pytest.mark.jit
def test_a_folder_of_an_earlier_version_is_read_with_a_warning(converted, tmp_path, caplog):
    model = tmp_path / "model"
    shutil.copytree(converted, model)
    path = model / "weights" / "index.json"
    index = json.loads(path.read_text())
    for array in index["arrays"].values():
        del array["rows"], array["digests"]
    path.write_text(json.dumps(index))
    conversion.load(model)
    assert caplog.text.count("has no digests, its values are not checked; convert the checkpoint again") == 1


def test_the_digest_of_a_folder_follows_from_its_index(converted):
    manifest = read_manifest(converted)
    assert [store.digest for store in open_stores(epath.Path(converted), manifest)] == [manifest.adapter_digest, manifest.base_digest]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A store of one array of ten rows of 24 bytes, in pieces of four rows with a digest for each two."""
    monkeypatch.setattr(store_module, "DIGEST_BYTES", 60)
    array = np.arange(60, dtype=np.float32).reshape(10, 6)
    with StoreWriter(epath.Path(tmp_path / "store"), part_bytes=120) as writer:
        writer.add("a", array)
    return tmp_path / "store", array


def test_digests_do_not_depend_on_the_pieces(small, tmp_path):
    folder, array = small
    with StoreWriter(epath.Path(tmp_path / "one"), part_bytes=10**6) as writer:
        writer.add("a", array)
    opened, one = Store(epath.Path(folder)), Store(epath.Path(tmp_path / "one"))
    assert (len(opened.arrays["a"].pieces), len(one.arrays["a"].pieces)) == (3, 1)
    assert opened.arrays["a"].digests == one.arrays["a"].digests and opened.digest == one.digest


def test_a_part_is_checked_with_the_rows_that_share_its_digest(small):
    folder, array = small
    file = values_of(folder, "a")
    file.write_bytes(flip(file.read_bytes()))  # in row 3
    opened = Store(epath.Path(folder))
    for rows in (slice(0, 2), slice(4, 10)):
        np.testing.assert_array_equal(opened.read_part("a", (rows, slice(1, 3))), array[rows, 1:3])
    for rows in (slice(2, 3), slice(3, 4), slice(0, 10)):
        with pytest.raises(InputError, match="rows from 2"):
            opened.read_part("a", (rows, slice(0, 1)))
