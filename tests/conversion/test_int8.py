"""Folders with int8 matrices: written once, read as they are or rounded and restored on the way, and no base checkpoint again."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from omni_jax import conversion
from omni_jax.cli.main import main
from omni_jax.conversion import loader
from omni_jax.conversion.engine import base_entries
from omni_jax.conversion.folder import read_manifest
from omni_jax.model import abstract_params, carried_shapes, param_shardings, rounded_maps
from omni_jax.model.int8 import SCALE, restored, rounded
from omni_jax.parallel import make_mesh
from omni_jax.types import InputError
from tests.conversion import checkpoints
from tests.conversion.test_round_trip import beats_file
from tests.tolerances import assert_close

pytestmark = pytest.mark.jit


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an adapter, and the two converted together as they are and in int8."""
    folder = tmp_path_factory.mktemp("int8")
    beats_file(checkpoints.write_base(folder / "base", checkpoints.tensors(checkpoints.model_config())) / "BEATs.pt")
    checkpoints.write_adapter(folder / "adapter", checkpoints.model_config(lora=checkpoints.LORA))
    for weights in ("keep", "int8"):
        conversion.to_jax(folder / "base", folder / weights, adapter=folder / "adapter", weights=weights)
    return folder


def test_reading_rounds_as_converting_does(source: Path):
    config, params = conversion.load(source / "int8")
    assert config.weights == "int8" and read_manifest(source / "int8").model == config
    again, others = conversion.load(source / "keep", weights="int8")
    assert again == config and params.keys() == others.keys() == abstract_params(config).keys()
    for path, leaf in params.items():
        assert_close(leaf, others[path], "round_trip")


def test_int8_matrices_stand_for_the_stored_ones(source: Path):
    _, whole = conversion.load(source / "keep")
    config, held = conversion.load(source / "int8", dtype="float32")
    for path in rounded_maps(config):
        q, scale = (np.asarray(held[(*path, name)]) for name in ("kernel", SCALE))
        wanted = np.asarray(whole[(*path, "kernel")], np.float32)
        assert np.abs(restored(q, scale) - wanted).max() <= scale.max() * 0.50001
        for one, other in zip((q, scale), rounded(wanted), strict=True):
            np.testing.assert_array_equal(one, other, strict=True)
    others = held.keys() - {(*path, name) for path in rounded_maps(config) for name in ("kernel", SCALE)}
    assert {held[path].dtype for path in others} == {np.dtype(np.float32)} and ("decoder", "layers", "attn", "q", "lora_a") in others
    for path in others:
        assert_close(held[path], np.asarray(whole[path], np.float32), "round_trip")


def test_what_is_kept_or_wanted_whole_is_restored_in_the_type_of_the_rest(source: Path):
    kept = ("decoder/layers/attn/o", "vision/merger/fc1")
    config, some = conversion.load(source / "int8", weights="int8", kept=kept)
    plain, all_of_it = conversion.load(source / "int8", weights="float")
    assert (plain.weights, config.kept) == ("float", kept)
    _, held = conversion.load(source / "int8")
    for path, leaf in all_of_it.items():
        if path[-1] != "kernel" or (*path[:-1], SCALE) not in held:
            continue
        assert leaf.dtype == jnp.bfloat16 or path[0] in ("head", "bridge")  # the adapter's are float32
        if "/".join(path[:-1]) in kept:
            assert_close(leaf, some[path], "round_trip")
            wanted = restored(*(np.asarray(held[(*path[:-1], name)]) for name in ("kernel", SCALE)))
            assert_close(leaf, wanted.astype(jnp.bfloat16), "round_trip")


def test_an_int8_folder_is_about_half_as_large_and_carries_nothing_for_the_way_back(tmp_path: Path, source: Path):
    sizes = {}
    for weights in ("keep", "int8"):
        made = conversion.to_jax(source / "base", tmp_path / weights, weights=weights)
        sizes[weights] = made.nbytes
        manifest = read_manifest(tmp_path / weights)
        assert bool(manifest.shards) == (weights == "keep")
    arrays = conversion.loader.open_stores(loader.epath.Path(tmp_path / "int8"), read_manifest(tmp_path / "int8"))[-1].arrays
    assert not {".".join(path) for path in carried_shapes(checkpoints.model_config())} & arrays.keys()
    rounded_bytes = sum(arrays[name].nbytes for name in arrays if arrays[name].dtype == np.int8)
    rest = sizes["int8"] - rounded_bytes
    assert sizes["keep"] > 2 * rounded_bytes and rest < sizes["keep"] - 2 * rounded_bytes + 4 * rounded_bytes // 8


def test_an_adapter_that_is_merged_is_merged_before_rounding(tmp_path: Path, source: Path):
    for weights in ("keep", "int8"):
        conversion.to_jax(source / "base", tmp_path / weights, adapter=source / "adapter", merge_adapter=True, weights=weights)
    _, want = conversion.load(tmp_path / "keep", weights="int8")
    config, got = conversion.load(tmp_path / "int8")
    assert config.lora is None and got.keys() == want.keys()
    for path, leaf in got.items():
        assert_close(leaf, want[path], "round_trip")
    _, apart = conversion.load(source / "int8")
    q = "decoder", "layers", "attn", "q", "kernel"
    assert not np.array_equal(apart[q], got[q])


def test_no_base_checkpoint_comes_out_of_an_int8_folder_and_the_adapter_does(tmp_path: Path, source: Path, capsys):
    assert main(["convert", "to-torch", "--model", str(source / "int8"), "--base-out", str(tmp_path / "base")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and str(source / "int8") in error
    assert "rounded to int8 and are not the checkpoint's; write the base from a folder converted without --weights" in error
    assert not (tmp_path / "base").exists()
    conversion.to_torch(source / "int8", adapter_out=tmp_path / "adapter")
    conversion.to_torch(source / "keep", adapter_out=tmp_path / "other")
    assert checkpoints.files(tmp_path / "adapter", weights=True) == checkpoints.files(tmp_path / "other", weights=True)


def test_what_a_run_did_not_train_is_not_written_from_int8(tmp_path: Path, source: Path):
    config = checkpoints.model_config(lora=checkpoints.LORA)
    conversion.to_jax(source / "base", tmp_path / "model", weights="int8")
    with pytest.raises(InputError, match="in int8 alone, and the run did not train it"):
        conversion.write_trained(tmp_path / "model", config, {}, adapter_out=tmp_path / "adapter")
    with pytest.raises(InputError, match="are not the checkpoint's"):
        conversion.write_trained(tmp_path / "model", config, {}, base_out=tmp_path / "base")


def test_a_matrix_that_is_not_finite_is_refused_by_name(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loader.Store, "_verify", lambda *_: None)
    read = loader.Store.read

    def broken(self, names, *rest):
        for name, array in read(self, names, *rest):
            if name == "vision.layers.mlp.up.kernel.1":
                array = array.copy()
                array[0, 0] = np.nan
            yield name, array

    monkeypatch.setattr(loader.Store, "read", broken)
    with pytest.raises(InputError, match=r"keep: vision\.layers\.mlp\.up\.kernel\.1 holds values that are not finite"):
        conversion.load(source / "keep", weights="int8")


@pytest.mark.parametrize("folder", ["keep", "int8"])
def test_a_mesh_holds_the_parts_of_int8_matrices_and_their_scales(source: Path, folder: str, monkeypatch: pytest.MonkeyPatch):
    config, whole = conversion.load(source / folder, weights="int8")
    mesh = make_mesh(1, 4, 2)
    # As one of several processes would: every part of a leaf by itself.
    monkeypatch.setattr(loader, "_parts", every_part)
    _, parts = conversion.load(source / folder, weights="int8", shardings=lambda c: param_shardings(c, mesh))
    split = 0
    for path, leaf in parts.items():
        assert_close(np.asarray(leaf), np.asarray(whole[path]), "round_trip")
        split += leaf.dtype == jnp.int8 and leaf.addressable_shards[0].data.size < leaf.size
    assert split > len(rounded_maps(config)) / 2


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_restored_parts_are_those_of_the_restored_whole(source: Path, weights: str, monkeypatch: pytest.MonkeyPatch):
    kept = ("decoder/layers/mlp/up",)
    _, whole = conversion.load(source / "int8", weights=weights, kept=kept)
    mesh = make_mesh(1, 4, 2)
    monkeypatch.setattr(loader, "_parts", every_part)
    _, parts = conversion.load(source / "int8", weights=weights, kept=kept, shardings=lambda c: param_shardings(c, mesh))
    for path, leaf in parts.items():
        assert_close(np.asarray(leaf), np.asarray(whole[path]), "round_trip")


def every_part(group: list, sharding: jax.sharding.Sharding | None) -> list:
    if sharding is None or not isinstance(sharding, NamedSharding) or sharding.spec == PartitionSpec():
        return []
    shape = loader._shape(group)
    return list(dict.fromkeys(loader._key(index, shape) for index in sharding.addressable_devices_indices_map(shape).values()))


def test_an_unknown_kind_is_refused(tmp_path: Path, source: Path):
    with pytest.raises(InputError, match="--weights int4: choose one of keep, int8"):
        conversion.to_jax(source / "base", tmp_path / "model", weights="int4")


def test_a_scale_that_is_missing_is_named(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch):
    name = "decoder.layers.mlp.down.kernel_scale.0"
    opened = loader.open_stores

    def lacking(*args):
        stores = opened(*args)
        del stores[-1].arrays[name]
        return stores

    monkeypatch.setattr(loader, "open_stores", lacking)
    with pytest.raises(InputError, match=f"{name} is missing; convert the checkpoint again"):
        conversion.load(source / "int8")
    assert base_entries(checkpoints.model_config())
