"""Every wrong folder or damaged checkpoint: one line that names the file, and nothing left behind."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from omni_jax import conversion
from omni_jax.io.torch_pickle import read_torch_file
from omni_jax.types import InputError
from tests.conversion import checkpoints
from tests.conversion.test_round_trip import beats_file
from tests.conversion.torch_files import write_torch_file

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def weights():
    return checkpoints.tensors(checkpoints.model_config())


@pytest.fixture
def base(tmp_path, weights):
    folder = checkpoints.write_base(tmp_path / "base", weights)
    beats_file(folder / "BEATs.pt")
    return folder


def refused(tmp_path, base, *expected, **more):
    """Converts, and returns the one-line error after checking that nothing was left behind."""
    with pytest.raises(InputError) as caught:
        conversion.to_jax(base, tmp_path / "out", **more)
    text = str(caught.value)
    assert "\n" not in text
    for part in expected:
        assert part in text
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]
    return text


def rewrite(base, change):
    """Applies `change` to the tensors and writes the checkpoint again as one file."""
    tensors = checkpoints.read_folder(base)
    change(tensors)
    for file in base.glob("model*"):
        file.unlink()
    save_file(tensors, base / "model.safetensors")


def test_missing_folder_file_and_wrong_folder(tmp_path, base):
    refused(tmp_path, tmp_path / "none", "no such folder")
    refused(tmp_path, base / "config.json", "is a file")
    refused(tmp_path, base / "assets", "has no config.json")
    adapter = checkpoints.write_adapter(tmp_path / "adapter", checkpoints.model_config(lora=checkpoints.LORA))
    refused(tmp_path, adapter, "is an adapter", "--adapter")
    refused(tmp_path, base, "has no adapter_config.json", adapter=base)


def test_converted_folder_is_not_a_source(tmp_path, base):
    conversion.to_jax(base, tmp_path / "model")
    refused(tmp_path, tmp_path / "model", "already a converted folder")


def test_no_weights(tmp_path, base):
    for file in base.glob("model*"):
        file.unlink()
    refused(tmp_path, base, "neither model.safetensors.index.json nor model.safetensors")


def test_config_that_is_not_json_or_not_of_this_model(tmp_path, base):
    config = json.loads((base / "config.json").read_text())
    for text, expected in (("{", "not readable as JSON"), ("[]", "JSON object"), ("{}", "'text_config' is missing")):
        (base / "config.json").write_text(text)
        refused(tmp_path, base, "config.json", expected)
    config["text_config"]["hidden_size"] = "wide"
    (base / "config.json").write_text(json.dumps(config))
    refused(tmp_path, base, "config.json")


@pytest.mark.jit
@pytest.mark.parametrize(
    ("section", "field", "value", "expected"),
    [
        ("text_config", "num_hidden_layers", 3, "missing (model.layers.2."),
        ("text_config", "num_hidden_layers", 1, "unknown (model.layers.1."),
        ("text_config", "intermediate_size", 24, "misshapen (model.layers.0.mlp.down_proj.weight is 32x20, expected 32x24"),
        ("text_config", "vocab_size", 41, "expected 41x32"),
        ("vision_config", "depth", 3, "missing (visual.blocks.2."),
        ("audio_config", "d_model", 16, "misshapen"),
    ],
)
def test_config_that_contradicts_the_weights(tmp_path, base, section, field, value, expected):
    config = checkpoints.tiny_config()
    config[section][field] = value
    (base / "config.json").write_text(json.dumps(config))
    refused(tmp_path, base, expected, str(base), "config.json that belongs to these weights")


def test_unknown_missing_and_misshapen_are_named_and_counted(tmp_path, base):
    def change(tensors):
        del tensors[Q]
        tensors["model.extra.weight"] = np.zeros(3, np.float32)
        tensors["beats_ln.bias"] = np.zeros(3, np.float32)

    rewrite(base, change)
    refused(tmp_path, base, "1 unknown (model.extra.weight)", f"1 missing ({Q})", "1 misshapen (beats_ln.bias is 3, expected 24)")


def test_index_that_names_absent_or_outside_files_or_wrong_shards(tmp_path, base):
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = next(iter(index["weight_map"]))
    other = {"model-00001-of-00002.safetensors": "model-00002-of-00002.safetensors"}
    for file, expected in (
        ("model-00003-of-00002.safetensors", "1 of 3 weight files are absent (model-00003-of-00002.safetensors)"),
        ("../../etc/passwd", "outside its folder"),
        (other.get(index["weight_map"][name], "model-00001-of-00002.safetensors"), f"{name} not in"),
    ):
        path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | {name: file}}))
        refused(tmp_path, base, "index.json", expected)
    path.write_text(json.dumps(index | {"metadata": ["total_size"]}))
    refused(tmp_path, base, "its metadata is ['total_size']")
    path.write_text("{}")
    refused(tmp_path, base, "no weight_map")


def test_truncated_shard(tmp_path, base):
    path = base / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(tmp_path, base, path.name, "truncated", "download it again")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinite_weights(tmp_path, base, dtype, value):
    def change(tensors):
        tensors[Q] = tensors[Q].astype(dtype)
        tensors[Q][3, 4] = value

    rewrite(base, change)
    refused(tmp_path, base, Q, "holds 1 NaN or infinite values of 1024")


def test_largest_finite_values_are_accepted(tmp_path, base):
    def change(tensors):
        tensors[Q][:] = ml_dtypes.finfo(tensors[Q].dtype).max

    rewrite(base, change)
    assert conversion.to_jax(base, tmp_path / "out").tensors > 100


def test_integer_weights(tmp_path, base):
    rewrite(base, lambda tensors: tensors.update({Q: np.zeros((32, 32), np.int8)}))
    refused(tmp_path, base, f"{Q} is I8", "quantised")


def test_shared_table_that_differs_between_layers(tmp_path, base):
    name = "beats.encoder.layers.2.self_attn.relative_attention_bias.weight"
    rewrite(base, lambda tensors: tensors.update({name: tensors[name] + np.asarray(1, tensors[name].dtype)}))
    refused(tmp_path, base, name, "must share one table")


def test_dangling_link(tmp_path, base):
    (base / "vocab.json").symlink_to(base / "gone.json")
    refused(tmp_path, base, "vocab.json", "does not exist")


def test_output_that_exists(tmp_path, base):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    with pytest.raises(InputError, match="not an empty folder"):
        conversion.to_jax(base, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["precious"]
    (tmp_path / "empty").mkdir()
    conversion.to_jax(base, tmp_path / "empty")
    assert (tmp_path / "empty" / "omni_jax.json").exists()


def test_bad_beats_files(tmp_path, base):
    for value, expected in (
        ({"model": {}}, "'cfg' and 'model'"),
        ({"cfg": {}, "model": {}}, "lacks 'encoder_layers'"),
        ({"cfg": {"deep_norm": False}, "model": {}}, "deep_norm"),
        ({"cfg": {}, "model": {"w": np.zeros(2, np.int64)}}, "not floating-point"),
        ([1], "'cfg' and 'model'"),
    ):
        write_torch_file(tmp_path / "bad.pt", value)
        refused(tmp_path, base, "bad.pt", expected, beats=tmp_path / "bad.pt")
    weights = beats_file(tmp_path / "good.pt")
    cfg = read_torch_file(tmp_path / "good.pt")["cfg"]
    write_torch_file(tmp_path / "bad.pt", {"cfg": cfg | {"encoder_layers": 4}, "model": weights})
    refused(tmp_path, base, "bad.pt", "missing (beats.encoder.layers.3.", beats=tmp_path / "bad.pt")
    weights["layer_norm.weight"][0] = np.nan
    write_torch_file(tmp_path / "bad.pt", {"cfg": cfg, "model": weights})
    refused(tmp_path, base, "bad.pt", "layer_norm.weight", "NaN", beats=tmp_path / "bad.pt")


def test_loading_and_exporting_what_is_not_a_finished_conversion(tmp_path, base):
    for folder, expected in ((tmp_path / "none", "no such folder"), (base, "not a converted folder")):
        with pytest.raises(InputError, match=expected):
            conversion.load(folder)
        with pytest.raises(InputError, match=expected):
            conversion.to_torch(folder, base_out=tmp_path / "x")
    conversion.to_jax(base, tmp_path / "model")
    with pytest.raises(InputError, match="nothing to write"):
        conversion.to_torch(tmp_path / "model")
    with pytest.raises(InputError, match="has no adapter"):
        conversion.to_torch(tmp_path / "model", adapter_out=tmp_path / "x")
    manifest = json.loads((tmp_path / "model" / "omni_jax.json").read_text())
    (tmp_path / "model" / "omni_jax.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(InputError, match="format 99"):
        conversion.load(tmp_path / "model")
    for damaged in ({}, manifest | {"names": ["lm_head"]}):
        (tmp_path / "model" / "omni_jax.json").write_text(json.dumps(damaged))
        with pytest.raises(InputError, match=r"omni_jax\.json: cannot be read"):
            conversion.to_torch(tmp_path / "model", base_out=tmp_path / "x")
    (tmp_path / "model" / "omni_jax.json").write_text(json.dumps(manifest))
    shutil.rmtree(tmp_path / "model" / "weights" / "part-00000")
    for action in (lambda: conversion.load(tmp_path / "model"), lambda: conversion.to_torch(tmp_path / "model", base_out=tmp_path / "x")):
        with pytest.raises(InputError, match="part-00000"):
            action()
    assert not (tmp_path / "x").exists()


@pytest.mark.jit
@pytest.mark.parametrize("name", ["../out.json", "/tmp/out.json", "a/../../out.json", "a\\b", "", "."])
@pytest.mark.parametrize("field", ["side_files", "adapter_files", "shards"])
def test_a_converted_folder_that_names_files_outside_is_refused(tmp_path, base, field, name):
    """An export writes under the names that the folder gives."""
    path = tmp_path / "model" / "omni_jax.json"
    conversion.to_jax(base, tmp_path / "model")
    manifest = json.loads(path.read_text())
    bad = {"shards": [{"file": name, "metadata": {}, "tensors": []}]}.get(field, [name])
    path.write_text(json.dumps(manifest | {field: [*manifest[field], *bad]}))
    with pytest.raises(InputError, match=r"omni_jax\.json: names a file outside its folder"):
        conversion.to_torch(tmp_path / "model", base_out=tmp_path / "x")
    assert not (tmp_path / "out.json").exists()


def test_files_of_deep_json_are_one_line(tmp_path, base):
    deep = "[" * 200_000
    for file in ("config.json", "model.safetensors.index.json"):
        folder = tmp_path / file
        shutil.copytree(base, folder)
        (folder / file).write_text(deep)
        refused(tmp_path / file, folder, file, "not readable as JSON")


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("section", "field", "value", "expected"),
    [
        ("text_config", "num_attention_heads", "four", "text_config.num_attention_heads is 'four'"),
        ("text_config", "num_hidden_layers", 2.0, "text_config.num_hidden_layers is 2.0"),
        ("text_config", "rms_norm_eps", "small", "text_config.rms_norm_eps is 'small'"),
        ("text_config", "rope_scaling", "yarn", "text_config.rope_scaling is 'yarn'"),
        ("text_config", "rope_scaling", {"mrope_section": 8}, "text_config.rope_scaling.mrope_section is 8"),
        ("vision_config", "depth", True, "vision_config.depth is True"),
        ("vision_config", "fullatt_block_indexes", 1, "vision_config.fullatt_block_indexes is 1"),
        ("audio_config", "d_model", None, "audio_config.d_model is None"),
        ("audio_config", "n_window", -1, "audio_config.n_window is -1"),
    ],
)
def test_a_field_of_the_wrong_type_is_named(tmp_path, base, section, field, value, expected):
    config = checkpoints.tiny_config()
    config[section][field] = value
    (base / "config.json").write_text(json.dumps(config))
    refused(tmp_path, base, "config.json", expected, "expected")


def test_a_section_or_time_of_the_wrong_type_is_named(tmp_path, base):
    for field, value in (("audio_config", [1]), ("seconds_per_chunk", "2"), ("position_id_per_seconds", None)):
        (base / "config.json").write_text(json.dumps(checkpoints.tiny_config() | {field: value}))
        refused(tmp_path, base, f"config.json: {field} is {value!r}")


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic"])
def test_other_kinds_of_rope_scaling_are_refused(tmp_path, base, key, kind):
    config = checkpoints.tiny_config()
    config["text_config"]["rope_scaling"] = {"rope_type": "default", "mrope_section": [2, 3, 3], "factor": 4.0} | {key: kind}
    (base / "config.json").write_text(json.dumps(config))
    refused(tmp_path, base, "config.json", f"rope_scaling type '{kind}' is not supported")


# ------------------------------------------------------------------------------------------------------------- control tokens

FIELDS = {
    "pad_token_id": "<|endoftext|>",
    "audio_token_index": "<|AUDIO|>",
    "audio_start_token_id": "<|audio_bos|>",
    "audio_end_token_id": "<|audio_eos|>",
    "video_token_index": "<|VIDEO|>",
    "vision_start_token_id": "<|vision_bos|>",
    "vision_end_token_id": "<|vision_eos|>",
}


@pytest.mark.jit
@pytest.mark.parametrize("field", FIELDS)
def test_a_control_token_that_the_tokenizer_contradicts(tmp_path, base, field):
    config = checkpoints.tiny_config()
    right = config[field]
    for value, expected in ((20, f"{FIELDS[field]} is {right} in"), (40, "below text_config.vocab_size (40)"), ("2", "not a token id")):
        (base / "config.json").write_text(json.dumps(config | {field: value}))
        refused(tmp_path, base, f"config.json: {field} {value!r}", expected)


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
def test_every_tokenizer_file_must_agree(tmp_path, base, file):
    contents = {
        "added_tokens.json": lambda number: {"<|audio_bos|>": number},
        "tokenizer_config.json": lambda number: {"added_tokens_decoder": {str(number): {"content": "<|audio_bos|>"}}},
    }
    (base / file).write_text(json.dumps(contents[file](9)))
    refused(tmp_path, base, "audio_start_token_id 3", "<|audio_bos|> is 9", str(base / file))
    (base / file).write_text(json.dumps(contents[file](3)))
    assert conversion.to_jax(base, tmp_path / "out").tensors > 100


def test_the_padding_token_is_the_configured_one(tmp_path, base):
    (base / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "<|AUDIO|>"}}))
    refused(tmp_path, base, "pad_token_id 0", "<|AUDIO|> is 2")


def test_no_tokenizer_or_one_without_control_tokens(tmp_path, base):
    (base / "tokenizer.json").write_text(json.dumps({"added_tokens": []}))
    refused(tmp_path, base, "<|AUDIO|> is in none of tokenizer.json")
    (base / "tokenizer.json").write_text(json.dumps({"added_tokens": [7]}))
    refused(tmp_path, base, "tokenizer.json", "not a tokenizer file")
    (base / "tokenizer.json").unlink()
    refused(tmp_path, base, str(base), "has no tokenizer")


# ------------------------------------------------------------------------------------------------------------------- BEATs


def test_beats_that_do_not_fit_the_published_settings(tmp_path, base):
    (base / "BEATs.pt").unlink()
    why = "published defaults were used, because the file named by audio_config.beats_path (BEATs.pt) is absent; put it into the folder"
    refused(tmp_path, base, str(base), why, "or give --beats FILE.pt")
    config = checkpoints.tiny_config()
    config["audio_config"]["beats_path"] = None
    (base / "config.json").write_text(json.dumps(config))
    refused(tmp_path, base, "config.json names no file", "--beats FILE.pt")


def test_beats_that_do_not_fit_their_own_file(tmp_path, base):
    rewrite(base, lambda tensors: tensors.pop("beats.layer_norm.weight"))
    refused(tmp_path, base, "1 missing (beats.layer_norm.weight)", "use the BEATs.pt that belongs to these weights")


def test_no_beats_at_all_is_no_wave_checkpoint(tmp_path, base):
    def change(tensors):
        for name in [name for name in tensors if name.startswith("beats.")]:
            del tensors[name]

    rewrite(base, change)
    refused(tmp_path, base, str(base), "BEATs weights (beats.*) are missing", "not a WAVE checkpoint")


# ---------------------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize(("first", "second"), [("q", "q"), ("q", "q/adapter"), ("q/base", "q"), ("q", "./x/../q")])
def test_outputs_that_hold_each_other_are_refused_first(tmp_path, monkeypatch, first, second):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"--base-out .* and --adapter-out .*: one holds the other"):
        conversion.to_torch(tmp_path / "none", base_out=first, adapter_out=second)
    assert not list(tmp_path.iterdir())


def test_leftovers_of_dead_processes_are_swept(tmp_path, base):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = {n: tmp_path / f".out.incomplete-{n}" for n in (gone.pid, os.getpid(), os.getppid(), "notes")}
    other = tmp_path / f".other.incomplete-{gone.pid}"
    for folder in (*names.values(), other):
        folder.mkdir()
        (folder / "omni_jax.json").write_text("{}")
    conversion.to_jax(base, tmp_path / "out")
    left = {path for path in tmp_path.iterdir() if "incomplete" in path.name}
    assert left == {names[os.getppid()], names["notes"], other}


def test_an_interrupted_folder_is_removed_though_threads_still_write_into_it(tmp_path):
    """Orbax writes in threads of its own, which an interruption does not stop at once."""
    from omni_jax.conversion.folder import new_folder

    done = threading.Event()

    def write(folder):
        for number in range(60):
            with contextlib.suppress(OSError):  # the folder may go between two calls
                (folder / "part").mkdir(parents=True, exist_ok=True)
                (folder / "part" / str(number)).write_bytes(b"x")
            time.sleep(0.01)
        done.set()

    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as folder:
        threading.Thread(target=write, args=(folder,)).start()
        raise KeyboardInterrupt
    assert done.wait(10)
    assert not list(tmp_path.iterdir())
