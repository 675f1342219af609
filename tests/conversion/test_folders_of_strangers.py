"""Checkpoint and adapter folders as training programs, the Hub's cache and editors leave them: read, or one line that fits its cause."""

from __future__ import annotations

import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from omni_jax import conversion
from omni_jax.conversion import control_tokens
from omni_jax.conversion.adapter import default_config, open_adapter, read_config
from omni_jax.conversion.folder import read_manifest
from omni_jax.conversion.source import model_config, open_checkpoint
from omni_jax.io.torch_pickle import open_torch_weights
from omni_jax.tokens.tokenizer import Tokenizer
from omni_jax.types import InputError
from tests.conversion import checkpoints
from tests.conversion.test_configurations import BEATS_CFG, changed
from tests.conversion.test_released_folders import Q, assert_same_tensors, both_ways, folder_of
from tests.conversion.torch_files import Assembler, write_legacy_file, write_program, write_torch_file

BASE = checkpoints.model_config()
CONFIG = checkpoints.model_config(lora=checkpoints.LORA)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def weights():
    return checkpoints.tensors(BASE)


@pytest.fixture
def plain(tmp_path):
    """A folder with the tensors in one safetensors file."""
    return folder_of(tmp_path, checkpoints.tensors(BASE))


def refused(folder, words, out="model"):
    with pytest.raises(InputError) as caught:
        conversion.to_jax(folder, folder.parent / out)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("write", [write_torch_file, write_legacy_file])
@pytest.mark.parametrize("name", ["state_dict", "model", "module", "model_state_dict"])
def test_the_weights_of_a_training_programs_own_file_are_found(tmp_path, weights, write, name):
    write(tmp_path / "x.bin", {"epoch": 3, "optimizer": {"state": {}, "step": weights[Q]}, name: weights, "args": None})
    found = open_torch_weights(tmp_path / "x.bin")
    assert found.keys() == weights.keys() and all(info.name == key for key, info in found.items())
    assert np.array_equal(found[Q].read(), weights[Q])
    write(tmp_path / "two.bin", {name: weights, "averaged": weights})
    with pytest.raises(InputError, match=rf"it holds 2 \({name}, averaged\): save one of them alone"):
        open_torch_weights(tmp_path / "two.bin")


def test_a_tensor_that_repeats_its_storage_is_named_so(tmp_path):
    assembler = Assembler()
    row = assembler.tensor("0", "FloatStorage", 1, 0, (32,), (0,))
    program = b"\x80\x02}" + assembler.value("w") + row + b"s."
    write_program(tmp_path / "x.bin", program, {"0": np.ones(1, np.float32).tobytes()})
    with pytest.raises(InputError, match=r"repeats the 1 values of its storage; write it with .contiguous\(\)"):
        open_torch_weights(tmp_path / "x.bin")


def test_an_embedding_that_was_saved_under_the_outputs_name_is_read_and_comes_back(tmp_path, weights):
    """As `safetensors.torch.save_model` writes a tied model: the first of two names, and the other in the metadata."""
    kept = {name: value for name, value in weights.items() if name != EMBEDDING} | {OUTPUT: weights[EMBEDDING]}
    base = folder_of(tmp_path, kept)
    refused(base, f"1 missing ({EMBEDDING})")
    save_file(kept, base / "model.safetensors", {"format": "pt", EMBEDDING: OUTPUT})
    both_ways(tmp_path, base)
    assert_same_tensors(checkpoints.read_folder(tmp_path / "out"), kept)
    without = folder_of(tmp_path / "no", {name: value for name, value in weights.items() if name != OUTPUT})
    conversion.to_jax(without, tmp_path / "plain")
    assert read_manifest(tmp_path / "plain").base_digest == read_manifest(tmp_path / "model").base_digest


def test_golden_folder_with_byte_order_marks_is_read(tmp_path, golden):
    base = tmp_path / "base"
    shutil.copytree(golden.checkpoint, base)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"):
        (base / name).write_bytes(b"\xef\xbb\xbf" + (base / name).read_bytes().replace(b"\n", b"\r\n"))
    read, plain = open_checkpoint(base), open_checkpoint(golden.checkpoint)
    assert model_config(read) == model_config(plain) and read.index == plain.index
    control_tokens.check(read, model_config(read))
    assert Tokenizer.from_pretrained(base).encode_text("a dog") == Tokenizer.from_pretrained(golden.checkpoint).encode_text("a dog")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize(("text", "words"), [(POINTER, "is a Git LFS pointer, not the file"), ("<!DOCTYPE html><html>", "is a web page")])
def test_what_lies_in_the_place_of_a_file_is_named(plain, name, text, words):
    (plain / name).write_text(text)
    refused(plain, f"{plain / name}: {words}")


def test_files_under_names_that_say_something_else(plain, weights):
    (plain / "model.safetensors").rename(plain / "pytorch_model.bin")
    refused(plain, "pytorch_model.bin: holds safetensors by its content; name it so (model.safetensors)")
    (plain / "pytorch_model.bin").rename(plain / "weights.pth")
    refused(plain, "or its shards; weights.pth is not read under its name: a state dict of torch is read as pytorch_model.bin")
    (plain / "weights.pth").unlink()
    refused(plain, "or its shards; expected PyTorch weights")  # BEATs.pt is there, and is no such file
    head = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (plain / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + b"x")
    refused(plain, "tensor w has element type F8_E4M3, which is not read; take the checkpoint that is not quantised")


def test_tensors_without_values_and_names_that_nothing_explains(tmp_path, weights):
    refused(
        folder_of(tmp_path / "a", weights | {Q: np.zeros(0, ml_dtypes.bfloat16)}), f"1 tensors hold no values ({Q}), as DeepSpeed ZeRO-3"
    )
    wrapped = {f"student.{name}": value for name, value in weights.items()}
    refused(folder_of(tmp_path / "b", wrapped), "no tensor has a known name (student.")


@pytest.mark.parametrize("where", ["snapshots/abc", "checkpoint-500"])
def test_a_folder_around_the_wanted_one_names_it(tmp_path, plain, where):
    outer = tmp_path / "outer"
    (outer / where).parent.mkdir(parents=True)
    plain.rename(outer / where)
    refused(outer, f"has no config.json; name one of the checkpoints in it ({where})")
    (outer / where / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=rf"has no adapter_config.json; name one of the adapters in it \({where}\)"):
        open_adapter(outer, BASE)
    os.remove(outer / where / "adapter_config.json")
    with pytest.raises(InputError, match="it is a whole checkpoint: give it as --base"):
        open_adapter(outer / where, BASE)


def test_the_state_of_a_run_is_not_copied_and_told(tmp_path, plain):
    adapter = checkpoints.write_adapter(tmp_path / "adapter", CONFIG)
    write_torch_file(adapter / "adapter_model.bin", {"w": np.zeros(1, np.float32)})
    for folder in (plain, adapter):
        for name in ("optimizer.pt", "rng_state_0.pth", "global_step5/mp_rank_00_model_states.pt", "checkpoint-5/model.safetensors"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"x")
        (folder / "trainer_state.json").write_text("{}")
    made = conversion.to_jax(plain, tmp_path / "model", adapter=adapter)
    files = read_manifest(tmp_path / "model")
    for folder, copied in ((plain, files.side_files), (adapter, files.adapter_files)):
        state = "4 files and folders of a run's state are not copied (checkpoint-5, global_step5, optimizer.pt, ...)"
        assert f"{folder}: {state}" in made.notes and "trainer_state.json" in copied
        assert not {name for name in copied if name.startswith(("optimizer", "rng", "global", "checkpoint", "adapter_model"))}
    assert f"{adapter}: adapter_model.bin beside adapter_model.safetensors is not read and not copied" in made.notes


def test_settings_of_an_adapter_that_say_nothing_are_read_and_odd_ones_are_one_line():
    nothing = {"use_dora": None, "fan_in_fan_out": None, "trainable_token_indices": [], "layer_replication": [], "future": {}, "other": ""}
    where = "adapter_config.json"
    assert read_config(default_config(CONFIG) | nothing, BASE, where) == read_config(default_config(CONFIG), BASE, where)
    with pytest.raises(InputError, match=r"adapter_config.json: lora_dropout=1.5 is not at least 0 and below 1"):
        read_config(default_config(CONFIG) | {"lora_dropout": 1.5}, BASE, where)


@pytest.mark.parametrize(
    ("value", "words"), [(3.5, "encoder_layers is 3.5"), ("3", "encoder_layers is '3'"), (None, "encoder_layers is None")]
)
def test_settings_of_beats_are_whole_numbers(plain, value, words):
    (plain / "config.json").write_text(json.dumps(changed("audio_config.beats_cfg", BEATS_CFG | {"encoder_layers": value})))
    with pytest.raises(InputError, match=f"beats_cfg: BEATs cfg: encoder_layers is {value!r}, expected a whole number"):
        model_config(open_checkpoint(plain))


def test_what_training_programs_write_into_a_configuration_is_carried(plain):
    expected = model_config(open_checkpoint(plain))
    config = checkpoints.tiny_config() | {
        "unsloth_version": "2025.1",
        "gradient_checkpointing": True,
        "transformers.js_config": {"dtype": "q4"},
    }
    (plain / "config.json").write_text(json.dumps(config))
    assert model_config(open_checkpoint(plain)) == expected


@pytest.mark.parametrize(
    ("file", "fields", "words"),
    [
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}, "image_mean is [0.5, 0.5, 0.5], and [0.48"),
        ("preprocessor_config.json", {"n_fft": 512, "feature_size": 128}, "n_fft is 512, and 400 is"),
        ("preprocessor_config.json", {"do_rescale": False, "image_mean": None}, "do_rescale is False"),
        ("video_preprocessor_config.json", {"patch_size": 16}, "patch_size is 16"),
        ("processor_config.json", {"feature_extractor": {"sampling_rate": 8000}}, "feature_extractor.sampling_rate is 8000"),
    ],
)
def test_a_processor_that_prepares_otherwise_is_refused_by_name(plain, file, fields, words):
    (plain / file).write_text(json.dumps(fields))
    refused(plain, f"{plain / file}: {words}")


def test_a_processor_with_other_limits_or_rounded_numbers_is_read(plain):
    sound = {"feature_size": 128, "do_normalize": False, "sampling_rate": 16000, "dither": 0}
    picture = {"min_pixels": 784, "max_pixels": 50176, "image_mean": [0.48145466, 0.4578275, 0.40821073], "rescale_factor": 0.003921569}
    (plain / "processor_config.json").write_text(json.dumps({"image_processor": picture, "feature_extractor": sound}))
    (plain / "preprocessor_config.json").write_text(json.dumps(sound | picture | {"do_normalize": True}))
    conversion.to_jax(plain, plain.parent / "model")
