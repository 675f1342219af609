"""PEFT itself loads an exported adapter onto a torch skeleton of the model and computes what our leaves compute."""

import dataclasses
import json
import math

import numpy as np
import pytest

from omni_jax import conversion
from omni_jax.conversion import engine
from omni_jax.conversion.rules import base_rules
from omni_jax.io.torch_pickle import read_torch_file
from tests.conversion import checkpoints
from tests.conversion.test_round_trip import beats_file
from tests.tolerances import assert_close

pytestmark = pytest.mark.reference


def skeleton(config, weights):
    """Returns a torch module with the checkpoint's names and weights: linear layers, the trained heads, and bare parameters elsewhere."""
    import torch

    class Node(torch.nn.Module):
        def prepare_inputs_for_generation(self, *_):
            raise AssertionError("PEFT looks for it in a causal language model; nothing is generated here")

    root = Node()
    heads = {
        "classify_linear": lambda i, o: torch.nn.Sequential(torch.nn.Linear(i, o), torch.nn.GELU(), torch.nn.Linear(o, o)),
        "beats_proj": lambda i, o: torch.nn.Sequential(torch.nn.Linear(i, o), torch.nn.GELU(), torch.nn.Linear(o, o)),
    }
    for name, make in heads.items():
        o, i = weights[f"{name}.0.weight"].shape
        root.add_module(name, make(i, o))
    root.add_module("beats_ln", torch.nn.LayerNorm(weights["beats_ln.weight"].shape[0]))
    linear = {rule.path for rule in base_rules(config) if rule.linear}
    for key, entry in engine.base_entries(config).items():
        parts = key.split(".")
        if parts[0] in (*heads, "beats_ln") or key not in weights:
            continue
        at = root
        for part in parts[:-2]:
            if not hasattr(at, part):
                at.add_module(part, Node())
            at = getattr(at, part)
        if entry.path in linear:
            o, i = entry.torch_shape
            at.add_module(parts[-2], torch.nn.Linear(i, o, bias=key.removesuffix("weight") + "bias" in weights))
        else:
            if not hasattr(at, parts[-2]):
                at.add_module(parts[-2], Node())
            if not hasattr(getattr(at, parts[-2]), parts[-1]):
                getattr(at, parts[-2]).register_parameter(parts[-1], torch.nn.Parameter(torch.zeros(entry.torch_shape)))
    result = root.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()}, strict=False)
    assert not result.unexpected_keys
    assert not result.missing_keys
    return root.eval()


def check_with_peft(base, adapter, model, partly=False):
    """Loads the PyTorch folders with PEFT and compares every adapted projection and whole module with the converted leaves."""
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.numpy import load_file

    config, params = conversion.load(model, dtype="float32")
    weights = {name: value.astype(np.float32) for name, value in checkpoints.read_folder(base).items()}
    assert config.lora is not None
    peft_model = PeftModel.from_pretrained(skeleton(dataclasses.replace(config, lora=None), weights), str(adapter)).eval()
    loaded = {name: value.numpy() for name, value in get_peft_model_state_dict(peft_model).items()}
    exported = load_file(adapter / "adapter_model.safetensors")
    assert loaded.keys() == exported.keys()
    for name, value in exported.items():
        assert_close(loaded[name], value.astype(np.float32), "round_trip")

    rng = np.random.default_rng(0)

    def through_peft(module, x):
        with torch.no_grad():
            return peft_model.base_model.model.get_submodule(module)(torch.from_numpy(x)).numpy()

    compared = 0
    rules = {rule.path: rule for rule in base_rules(config)}
    for key, entry in engine.base_entries(config).items():
        if not (rules[entry.path].linear and rules[entry.path].module in config.lora.targets):
            continue
        leaf = {name: _layer(params[*entry.path[:-1], name], entry.layer) for name in ("kernel", "lora_a", "lora_b")}
        x = rng.standard_normal((5, leaf["kernel"].shape[0])).astype(np.float32)
        expected = x @ leaf["kernel"] + config.lora.scale * (x @ leaf["lora_a"]) @ leaf["lora_b"]
        if (*entry.path[:-1], "bias") in params:
            expected = expected + _layer(params[*entry.path[:-1], "bias"], entry.layer)
        assert_close(through_peft(key.removesuffix(".weight"), x), expected, "adapter_projection")
        compared += 1
    assert compared >= (there := sum("lora_A" in name for name in exported)) and (compared > there) == partly

    for module, at in (("classify_linear", "head"), ("beats_proj", "bridge")):
        w1, b1, w2, b2 = (np.asarray(params[at, layer, name], np.float64) for layer in ("fc1", "fc2") for name in ("kernel", "bias"))
        x = rng.standard_normal((5, w1.shape[0])).astype(np.float32)
        hidden = x @ w1 + b1
        hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        assert_close(through_peft(module, x), hidden @ w2 + b2, "adapter_projection")
    scale, bias = (np.asarray(params["bridge", "norm", name], np.float64) for name in ("scale", "bias"))
    x = rng.standard_normal((5, scale.shape[0])).astype(np.float32)
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config.beats.norm_eps) * scale + bias
    assert_close(through_peft("beats_ln", x), expected, "adapter_projection")


def _layer(leaf, layer):
    return np.asarray(leaf if layer is None else leaf[layer])


def test_golden_exported_adapter_loads_in_peft(golden, tmp_path):
    conversion.to_jax(golden.checkpoint, tmp_path / "model", adapter=golden.adapter_dir)
    conversion.to_torch(tmp_path / "model", base_out=tmp_path / "base", adapter_out=tmp_path / "adapter")
    check_with_peft(tmp_path / "base", tmp_path / "adapter", tmp_path / "model")


@pytest.mark.parametrize(
    "changes",
    [
        {"rslora": True},
        {"targets": ("decoder/layers/attn/o", "decoder/layers/mlp/down", "vision/layers/attn/q"), "alpha": 1.5},
        {"modules_to_save": ("beats_ln",), "rank": 5},
    ],
)
def test_adapter_trained_here_loads_in_peft(tmp_path, changes):
    """Through `write_adapter` and its own adapter_config.json, which PEFT never saw before."""
    lora = dataclasses.replace(checkpoints.LORA, **changes)
    config = checkpoints.model_config(lora=lora)
    base = checkpoints.write_base(tmp_path / "base", checkpoints.tensors(checkpoints.model_config(), dtype=np.float32))
    beats_file(base / "BEATs.pt")
    source = checkpoints.write_adapter(tmp_path / "source", config)
    conversion.to_jax(base, tmp_path / "model", adapter=source)
    config, params = conversion.load(tmp_path / "model")
    conversion.write_adapter(tmp_path / "adapter", config, params)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["use_rslora"] == lora.rslora
    check_with_peft(base, tmp_path / "adapter", tmp_path / "model")


@pytest.mark.parametrize(
    ("settings", "partly"),
    [
        ({"rank_pattern": {"q_proj": 5, r"layers\.1\..*k_proj": 1}, "alpha_pattern": {"v_proj": 3}}, False),
        ({"rank_pattern": {"^model.layers.0.self_attn.q_proj": 2}, "use_rslora": True}, False),
        (
            {"target_modules": ["q_proj", "up_proj", "fc1"], "exclude_modules": r"(audio_tower|visual)\..*", "layers_to_transform": [1]},
            True,
        ),
        ({"target_modules": ["q", "q_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]}, True),
        ({"target_modules": "all-linear", "exclude_modules": r"(audio_tower|beats)\..*"}, False),
    ],
)
def test_a_released_adapter_computes_in_peft_what_it_does_here(tmp_path, settings, partly):
    """Patterns and selections: PEFT decides which modules they mean, with which rank and alpha."""
    from safetensors.numpy import save_file

    from omni_jax.conversion.adapter import adapter_entries, default_config, read_config

    config = default_config(checkpoints.model_config(lora=checkpoints.LORA)) | settings
    lora, modules, own = read_config(config, checkpoints.model_config(), "adapter_config.json")
    entries = adapter_entries(dataclasses.replace(checkpoints.model_config(), lora=lora), modules)
    rng, tensors = np.random.default_rng(2), {}
    for key, entry in entries.items():
        shape = list(entry.torch_shape)
        module = key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
        if ".lora_" in key and module in own:
            shape[0 if ".lora_A." in key else 1] = own[module][0]
        tensors[key] = rng.standard_normal(shape).astype(np.float32)
    base = checkpoints.write_base(tmp_path / "base", checkpoints.tensors(checkpoints.model_config(), dtype=np.float32))
    beats_file(base / "BEATs.pt")
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    conversion.to_jax(base, tmp_path / "model", adapter=tmp_path / "adapter")
    check_with_peft(base, tmp_path / "adapter", tmp_path / "model", partly)


def test_torch_saved_files_read_as_torch_reads_them(tmp_path):
    import torch

    value = {
        "cfg": {"layers": 3, "name": "x"},
        "model": {
            "plain": torch.randn(3, 4),
            "turned": torch.randn(3, 4).T,
            "half": torch.randn(5).half(),
            "brain": torch.randn(5).bfloat16(),
            "long": torch.arange(3),
            "flag": torch.tensor([True, False]),
            "scalar": torch.tensor(2.5),
            "slice": torch.arange(10.0)[3:7],
            "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        },
        "state": torch.nn.Linear(2, 3).state_dict(),
    }
    torch.save(value, tmp_path / "x.pt")
    found = read_torch_file(tmp_path / "x.pt")
    assert found["cfg"] == value["cfg"]
    for part in ("model", "state"):
        assert found[part].keys() == value[part].keys()
        for name, tensor in value[part].items():
            expected = tensor.detach()
            assert found[part][name].shape == tuple(expected.shape)
            assert np.array_equal(found[part][name].astype(np.float64), expected.double().numpy()), name
