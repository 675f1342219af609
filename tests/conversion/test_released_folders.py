"""Checkpoints as other people's programs save them: `.bin` files, other names, stale and loose shards, absent and extra tensors."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from omni_jax import conversion
from omni_jax.conversion import engine
from omni_jax.conversion.folder import read_manifest
from omni_jax.conversion.names import NEW_NORM, OLD_NORM, canonical
from omni_jax.io.safetensors_io import TensorInfo
from omni_jax.io.torch_pickle import open_torch_weights
from omni_jax.types import InputError
from tests.conversion import checkpoints
from tests.conversion.test_round_trip import assert_same_tensors, beats_file
from tests.conversion.torch_files import write_legacy_file, write_torch_file

Q = "model.layers.0.self_attn.q_proj.weight"
TABLE = "relative_attention_bias"


@pytest.fixture(scope="module")
def weights():
    return checkpoints.tensors(checkpoints.model_config())


def folder_of(tmp_path, tensors, write=None, shards=1, index=True):
    """Writes a checkpoint folder: safetensors in one file, or `.bin` files in which the shared table has one storage."""
    base = checkpoints.write_base(tmp_path / "base", {"a": np.zeros(1, np.float32)}, shards=1)
    (base / "model.safetensors").unlink()
    beats_file(base / "BEATs.pt")
    if write is None:
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
        return base
    table = next((value for name, value in tensors.items() if TABLE in name), None)
    tensors = {name: table if TABLE in name else value for name, value in tensors.items()}
    if shards == 1:
        write(base / "pytorch_model.bin", tensors)
        return base
    placed = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        members = {name: tensors[name] for name in sorted(tensors)[number::shards]}
        write(base / file, members)
        placed |= dict.fromkeys(members, file)
    if index:
        total = sum(value.nbytes for value in tensors.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": placed}, indent=2)
        (base / "pytorch_model.bin.index.json").write_text(text + "\n")
    return base


def bins(folder):
    return {name: info.read() for file in sorted(folder.glob("pytorch_model*.bin")) for name, info in open_torch_weights(file).items()}


def both_ways(tmp_path, base, **form):
    made = conversion.to_jax(base, tmp_path / "model")
    conversion.to_torch(tmp_path / "model", base_out=tmp_path / "out", **form)
    return made


@pytest.mark.jit
@pytest.mark.parametrize("write", [write_torch_file, write_legacy_file])
@pytest.mark.parametrize("shards", [1, 2])
def test_bin_files_come_back_as_bin_or_as_safetensors(tmp_path, weights, write, shards):
    base = folder_of(tmp_path, weights, write, shards)
    both_ways(tmp_path, base)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.bin*")) == sorted(path.name for path in base.glob("*.bin*"))
    assert checkpoints.files(tmp_path / "out") == checkpoints.files(base)
    assert_same_tensors(bins(tmp_path / "out"), weights)
    if shards > 1:
        name = "pytorch_model.bin.index.json"
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    for file in (tmp_path / "out").glob("*.bin"):
        starts = [info.start for name, info in open_torch_weights(file).items() if TABLE in name]
        assert len(set(starts)) <= 1 and all(start % 64 == 0 for start in starts)  # a storage that tensors share is written once
    conversion.to_torch(tmp_path / "model", base_out=tmp_path / "safe", file_format="safetensors")
    assert_same_tensors(checkpoints.read_folder(tmp_path / "safe"), weights)
    assert not list((tmp_path / "safe").glob("*.bin*"))
    conversion.to_jax(tmp_path / "safe", tmp_path / "again")
    _, ours = conversion.load(tmp_path / "again")
    _, theirs = conversion.load(tmp_path / "model")
    assert all(np.array_equal(np.asarray(ours[path]), np.asarray(theirs[path])) for path in theirs)


def test_safetensors_come_out_as_bin_on_request(tmp_path, weights):
    base = checkpoints.write_base(tmp_path / "base", weights)
    beats_file(base / "BEATs.pt")
    both_ways(tmp_path, base, file_format="bin")
    index = json.loads((tmp_path / "out" / "pytorch_model.bin.index.json").read_text())
    assert set(index["weight_map"].values()) == {f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)}
    assert_same_tensors(bins(tmp_path / "out"), weights)
    with pytest.raises(InputError, match="--format pickle: choose one of keep, safetensors, bin"):
        conversion.to_torch(tmp_path / "model", base_out=tmp_path / "none", file_format="pickle")


def test_transposed_tensors_of_a_bin_file_are_read_in_order(tmp_path, weights):
    """A tied or turned tensor is a view of another's storage, with strides of its own."""
    turned = np.ascontiguousarray(weights[Q].T).T
    both_ways(tmp_path, folder_of(tmp_path, weights | {Q: turned}, write_torch_file))
    assert_same_tensors(bins(tmp_path / "out"), weights)


def test_large_tensors_of_a_bin_file_are_read_in_rows(tmp_path, weights, monkeypatch):
    from omni_jax.conversion import importer

    monkeypatch.setattr(importer, "_BLOCK", 1000)
    read, sizes = TensorInfo._read, []

    def counted(info, position, shape):
        array = read(info, position, shape)
        sizes.append((info.name, array.nbytes))
        return array

    monkeypatch.setattr(TensorInfo, "_read", counted)
    both_ways(tmp_path, folder_of(tmp_path, weights, write_torch_file))
    assert [size for name, size in sizes if name == "lm_head.weight"] == [15 * 64, 15 * 64, 10 * 64]
    assert_same_tensors(bins(tmp_path / "out"), weights)


def test_a_damaged_bin_file_is_refused(tmp_path, weights):
    base = folder_of(tmp_path, weights, write_torch_file)
    data = bytearray((base / "pytorch_model.bin").read_bytes())
    data[data.index(weights[Q].tobytes()) + 5] ^= 1
    (base / "pytorch_model.bin").write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"pytorch_model.bin: damaged or truncated torch file \(Bad CRC-32"):
        conversion.to_jax(base, tmp_path / "model")


# ----------------------------------------------------------------------------------------------------------------------- names


def nested(name):
    """The names of transformers 5."""
    if name.startswith("model."):
        return f"model.language_model.{name.removeprefix('model.')}"
    return name if name.startswith("lm_head") else f"model.{name}"


def new_norm(name):
    for old, new in zip(OLD_NORM, NEW_NORM, strict=True):
        name = name.removesuffix(old) + new if name.endswith(f".{old}") else name
    return name


SPELLINGS = {
    "module.": lambda name: f"module.{name}",
    "model.": lambda name: f"model.{name}",
    "thinker.": lambda name: f"thinker.{name}",
    "model.thinker.": lambda name: f"model.thinker.{name}",
    "thinker.model.": lambda name: f"thinker.{nested(name)}",
    "transformers 5": nested,
    "PEFT": lambda name: f"base_model.model.{name}",
    "PEFT around transformers 5": lambda name: f"base_model.model.{nested(name)}",
    "compiled, parallel": lambda name: f"module._orig_mod.{name}",
    "compiled layers": lambda name: name.replace("model.layers.0.", "model.layers.0._orig_mod."),
    "LLaVA": lambda name: f"language_model.{name}" if name.startswith(("model.", "lm_head")) else name,
    "base_layer": lambda name: name.replace("q_proj.", "q_proj.base_layer."),
    "new weight norm": new_norm,
    "everything": lambda name: new_norm(f"module.base_model.model.thinker.{nested(name)}"),
}


@pytest.mark.jit
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_model_and_comes_back(tmp_path, weights, spelling):
    renamed = {SPELLINGS[spelling](name): value for name, value in weights.items()}
    assert len(renamed) == len(weights) and renamed.keys() != weights.keys()
    assert {canonical(name) for name in renamed} == weights.keys()
    both_ways(tmp_path, folder_of(tmp_path, renamed))
    assert_same_tensors(load_file(tmp_path / "out" / "model.safetensors"), renamed)
    _, params = conversion.load(tmp_path / "model")
    assert np.array_equal(np.asarray(params["decoder", "embed", "embedding"]), weights["model.embed_tokens.weight"])
    assert np.array_equal(np.asarray(params["beats", "pos_conv", "v"]), weights["beats.encoder.pos_conv.0.weight_v"].T)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({f"model.{Q}": None}, f"{Q} as {Q} and model.{Q}"),
        ({"beats.encoder.pos_conv.0.parametrizations.weight.original0": "beats.encoder.pos_conv.0.weight_g"}, "weight_g as"),
        ({"model.layers.0.self_attn.q_proj.lora_A.weight": None}, "holds LoRA matrices"),
        ({"classify_linear.modules_to_save.default.0.weight": None}, "unknown (classify_linear.modules_to_save.default.0.weight)"),
        ({"layers.0.self_attn.q_proj.weight": None}, "unknown (layers.0.self_attn.q_proj.weight)"),
    ],
)
def test_names_that_are_ambiguous_or_unknown_are_refused_by_name(tmp_path, weights, more, expected):
    with pytest.raises(InputError) as caught:
        conversion.to_jax(folder_of(tmp_path, weights | {name: weights[of or Q] for name, of in more.items()}), tmp_path / "model")
    assert expected in str(caught.value)


@pytest.mark.jit
def test_what_no_embedding_needs_may_be_absent_or_extra_and_is_reported(tmp_path, weights):
    extra = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32) for n in range(2)}
    extra |= {"visual.rotary_pos_emb.inv_freq": np.ones(2, np.float32), "model.position_ids": np.arange(4)[None]}
    absent = ("lm_head.weight", "audio_tower.audio_bos_eos_token.weight", "beats.predictor.weight", "beats.predictor.bias")
    kept = {name: value for name, value in weights.items() if name not in absent}
    made = both_ways(tmp_path, folder_of(tmp_path, kept | extra))
    said = "\n".join(made.notes)
    assert (
        "4 tables that the model computes itself are kept for the way back alone" in said and "has no lm_head.weight, audio_tower" in said
    )
    assert_same_tensors(load_file(tmp_path / "out" / "model.safetensors"), kept | extra)
    config, params = conversion.load(tmp_path / "model")
    assert params.keys() == engine.tree_shapes(config).keys() - {("lm_head", "kernel"), ("audio", "bos_eos", "embedding")}


@pytest.mark.costly
@pytest.mark.parametrize("write", [None, write_torch_file])
def test_tables_that_the_model_computes_come_back_and_are_checked(tmp_path, weights, write):
    extra = {"model.rotary_emb.inv_freq": np.linspace(0, 1, 16, dtype=np.float32), "model.position_ids": np.arange(4, dtype=np.int64)[None]}
    if write is None:
        base = checkpoints.write_base(tmp_path / "base", weights | extra)
        beats_file(base / "BEATs.pt")
    else:
        base = folder_of(tmp_path, weights | extra, write, shards=2)
    made, index = both_ways(tmp_path, base), next(base.glob("*.index.json")).name
    assert made.tensors == len({name for name in weights if TABLE not in name}) + 1 + len(extra)
    assert checkpoints.files(tmp_path / "out") == checkpoints.files(base)
    assert (tmp_path / "out" / index).read_bytes() == (base / index).read_bytes()
    assert_same_tensors(bins(tmp_path / "out") if write else checkpoints.read_folder(tmp_path / "out"), weights | extra)
    conversion.to_jax(base, tmp_path / "small", dtype="bfloat16")
    conversion.to_torch(tmp_path / "small", base_out=tmp_path / "small out", file_format="safetensors")
    assert_same_tensors({n: v for n, v in checkpoints.read_folder(tmp_path / "small out").items() if n in extra}, extra)
    part = next(path for path in (tmp_path / "model" / "extra").rglob("*") if path.is_file() and path.stat().st_size == 64)
    part.write_bytes(bytes(64))
    with pytest.raises(InputError, match=r"extra.*holds other values than were written"):
        conversion.to_torch(tmp_path / "model", base_out=tmp_path / "none")


# ---------------------------------------------------------------------------------------------------------------- which files


def shards_of(tmp_path, weights):
    base = checkpoints.write_base(tmp_path / "base", weights)
    beats_file(base / "BEATs.pt")
    return base


@pytest.mark.parametrize("beside", ["an index without its shards", "another file"])
@pytest.mark.parametrize("write", [None, write_torch_file])
def test_a_whole_file_comes_before_loose_files_and_an_index_without_shards(tmp_path, weights, write, beside):
    base = folder_of(tmp_path, weights, write)
    old = {name: np.zeros_like(value) for name, value in weights.items()}
    other = folder_of(tmp_path / "old", old, write_torch_file, 2) if write else checkpoints.write_base(tmp_path / "old", old)
    if beside == "another file":
        save_file({"heads.weight": weights[Q]}, base / "heads.safetensors")
    else:
        (index,) = other.glob("*.index.json")
        (base / index.name).write_bytes(index.read_bytes())
    made = both_ways(tmp_path, base)
    assert len(made.notes) == 1 and "are not read and not copied" in made.notes[0]
    assert_same_tensors(bins(tmp_path / "out") if write else checkpoints.read_folder(tmp_path / "out"), weights)


@pytest.mark.parametrize(
    "stale", ["model-00001-of-00003.safetensors", "model.safetensors", "consolidated.safetensors", "pytorch_model.bin"]
)
def test_stale_weight_files_are_left_out_with_a_note(tmp_path, weights, stale):
    base = shards_of(tmp_path, weights)
    (base / stale).write_bytes(b"not even a weight file")
    made = both_ways(tmp_path, base)
    assert any(stale in note and "not read and not copied" in note for note in made.notes)
    assert not (tmp_path / "model" / stale).exists() and not (tmp_path / "out" / stale).exists()
    assert_same_tensors(checkpoints.read_folder(tmp_path / "out"), weights)


def test_the_index_says_which_shard_holds_a_tensor(tmp_path, weights):
    base = shards_of(tmp_path, weights)
    placed = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(file for file in placed.values() if file != placed[Q])
    save_file(load_file(base / other) | {Q: np.zeros_like(weights[Q])}, base / other)
    made = both_ways(tmp_path, base)
    assert any(Q in note and "those of model.safetensors.index.json are read" in note for note in made.notes)
    assert_same_tensors(checkpoints.read_folder(tmp_path / "out"), weights)


def test_tensors_that_the_index_does_not_know(tmp_path, weights):
    """Needed ones are read, as transformers 5 reads them; what the model does not know, or the index has under another name, is not."""
    base = shards_of(tmp_path, weights)
    file = base / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    home = index["weight_map"].pop(Q)
    file.write_text(json.dumps(index))
    other = "model.layers.0.self_attn.k_proj.weight"
    save_file(load_file(base / home) | {"strange.weight": weights[Q], f"module.{other}": np.zeros_like(weights[other])}, base / home)
    made = both_ways(tmp_path, base)
    said = "\n".join(made.notes)
    assert f"1 tensors that the index does not know are read all the same ({Q})" in said
    assert "1 tensors that the index does not know are not read (strange.weight)" in said
    assert f"1 tensors that model.safetensors.index.json does not know are not read (module.{other})" in said
    assert_same_tensors(checkpoints.read_folder(tmp_path / "out"), weights)
    assert json.loads((tmp_path / "out" / file.name).read_text())["weight_map"][Q] == home


@pytest.mark.parametrize("write", [None, write_torch_file])
def test_shards_without_an_index_are_read_where_they_do_not_overlap(tmp_path, weights, write):
    if write is None:
        base = shards_of(tmp_path, weights)
        (base / "model.safetensors.index.json").unlink()
        first = base / "model-00001-of-00002.safetensors"
    else:
        base = folder_of(tmp_path, weights, write, shards=2, index=False)
        first = base / "pytorch_model-00001-of-00002.bin"
    both_ways(tmp_path, base)
    assert_same_tensors(checkpoints.read_folder(tmp_path / "out") if write is None else bins(tmp_path / "out"), weights)
    (base / first.name.replace("00001-of-00002", "extra")).write_bytes(first.read_bytes())
    with pytest.raises(InputError, match="several checkpoints and no index"):
        conversion.to_jax(base, tmp_path / "none")
    (base / first.name.replace("00001-of-00002", "extra")).unlink()
    first.rename(base / first.name.replace("00001-of-00002", "00001-of-00003"))
    with pytest.raises(InputError, match="several checkpoints and no index"):
        conversion.to_jax(base, tmp_path / "none")
    next(base.glob("*00002-of-00002*")).unlink()
    with pytest.raises(InputError, match="2 of 3 weight files are absent"):
        conversion.to_jax(base, tmp_path / "none")


def test_loose_shards_that_overlap_are_refused(tmp_path, weights):
    base = shards_of(tmp_path, weights)
    (base / "model.safetensors.index.json").unlink()
    second = base / "model-00002-of-00002.safetensors"
    name = next(iter(load_file(base / "model-00001-of-00002.safetensors")))
    save_file(load_file(second) | {name: weights[name]}, second)
    with pytest.raises(InputError, match=r"1 doubled tensors .* no index says which are right"):
        conversion.to_jax(base, tmp_path / "model")


# ----------------------------------------------------------------------------------------------------------- the weight norm


@pytest.mark.costly
@pytest.mark.parametrize(("style", "names"), [("keep", OLD_NORM), ("old", OLD_NORM), ("new", NEW_NORM)])
def test_an_export_says_how_its_weight_norm_loads(tmp_path, weights, style, names):
    both_ways(tmp_path, folder_of(tmp_path, weights), weight_norm=style)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {name.split("pos_conv.0.")[1] for name in written if "pos_conv" in name} == {*names, "bias"}
    page = (tmp_path / "out" / "README.omni_jax.md").read_text()
    assert f"stored as `{' and '.join(names)}`" in page and 'read("model.safetensors")' in page
    lines = page.split("```python\n")[1].split("```")[0].splitlines()
    assert len(lines) == 3
    conversion.to_jax(tmp_path / "out", tmp_path / "again")  # and the page is not taken for a side file of the next export
    conversion.to_torch(tmp_path / "again", base_out=tmp_path / "last")
    assert checkpoints.files(tmp_path / "last") == checkpoints.files(tmp_path / "base")


@pytest.mark.parametrize("given", [True, False])
def test_the_beats_file_is_recorded_by_its_digest(tmp_path, weights, given):
    import hashlib

    base = folder_of(tmp_path, weights)
    (base / "BEATs.pt").rename(base / "BEATs_iter3.pt" if given else base / "BEATs.pt")
    file = base / ("BEATs_iter3.pt" if given else "BEATs.pt")
    conversion.to_jax(base, tmp_path / "model", beats=file if given else None)
    gave = "weights and settings" if given else "settings"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert read_manifest(tmp_path / "model").beats_file == {"name": file.name, "sha256": digest, "gave": gave}
