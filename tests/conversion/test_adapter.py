import dataclasses
import json
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax import conversion
from omni_jax.config import LoraConfig
from omni_jax.conversion.adapter import _HARMLESS, _READ, _UNUSED, default_config, read_config
from omni_jax.types import InputError
from tests.conversion import checkpoints
from tests.conversion.test_round_trip import assert_same_tensors, beats_file
from tests.tolerances import assert_close

BASE = checkpoints.model_config()
CONFIG = checkpoints.model_config(lora=checkpoints.LORA)
ATTENTION = r"model\.layers\.(\d+)\.self_attn\.(q|k|v)_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = checkpoints.write_base(tmp_path_factory.mktemp("base") / "base", checkpoints.tensors(BASE, dtype=np.float32))
    beats_file(folder / "BEATs.pt")
    return folder


def settings(**changes):
    return default_config(CONFIG) | changes


@pytest.mark.parametrize(
    ("target", "modules", "paths"),
    [
        (ATTENTION, 6, {"decoder/layers/attn/q", "decoder/layers/attn/k", "decoder/layers/attn/v"}),
        (r".*model\.layers\.1\.self_attn\.q_proj", 1, {"decoder/layers/attn/q"}),
        (r"model\.layers.*(o_proj|down_proj)", 4, {"decoder/layers/attn/o", "decoder/layers/mlp/down"}),
        (["gate_proj", "up_proj"], 8, {f"{t}/layers/mlp/{n}" for t in ("decoder", "vision") for n in ("gate", "up")}),
        (["q_proj"], 7, {"decoder/layers/attn/q", "audio/layers/attn/q", "beats/layers/attn/q"}),
        (["classify_linear.0"], 1, {"head/fc1"}),
        ((["q_proj"], {"layers_to_transform": 1}), 3, {"decoder/layers/attn/q", "audio/layers/attn/q", "beats/layers/attn/q"}),
        ((["q_proj"], {"layers_to_transform": [0], "layers_pattern": "model.layers"}), 1, {"decoder/layers/attn/q"}),
        ((["q_proj"], {"layers_to_transform": [0], "layers_pattern": ["blocks"]}), 0, set()),
        ((["q_proj", "k_proj"], {"exclude_modules": ["model.layers.0.self_attn.q_proj", "k_proj"]}), 6, None),
        ((ATTENTION, {"exclude_modules": r".*(v_proj|\.0\..*)"}), 2, {"decoder/layers/attn/q", "decoder/layers/attn/k"}),
    ],
)
def test_target_modules_select_as_in_peft(target, modules, paths):
    target, more = target if isinstance(target, tuple) else (target, {})
    if not modules:
        with pytest.raises(InputError, match="selects no module"):
            read_config(settings(target_modules=target, **more), BASE, "adapter_config.json")
        return
    lora, selected, _ = read_config(settings(target_modules=target, **more), BASE, "adapter_config.json")
    paths = set(lora.targets) if paths is None else paths
    assert (len(selected), set(lora.targets)) == (modules, paths)


ENDLESS = [r"(\w+\.?)+$x", r"(([a-z]+)*(\.|_|\d)*)*-", r"(.*)*(.*)*(.*)*[^\w.]"]


@pytest.mark.parametrize("pattern", ENDLESS)
def test_a_pattern_that_takes_for_ever_is_refused(monkeypatch, pattern):
    monkeypatch.setattr("omni_jax.conversion.module_matching.MATCH_LIMIT_S", 0.5)
    with pytest.raises(InputError, match=r"takes over 0\.5 s to match; list the module names instead"):
        read_config(settings(target_modules=pattern), BASE, "adapter_config.json")


@pytest.mark.parametrize("pattern", ["(", "(?P<x>a", "x{99999999999}", "(" * 5000 + ")" * 5000, "a" * 20_000, "\ud800", "\0"])
def test_a_pattern_that_is_none_is_one_line(pattern):
    with pytest.raises(InputError, match=r"regular expression|selects no module") as caught:
        read_config(settings(target_modules=pattern), BASE, "adapter_config.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(rank=2, alpha=3.5, rslora=True, dropout=0.0),
        LoraConfig(rank=5, alpha=1.0, targets=("decoder/layers/attn/v", "vision/merger/fc1"), modules_to_save=("beats_ln",)),
        LoraConfig(rank=1, alpha=2.0, modules_to_save=()),
    ],
)
def test_settings_survive_being_written_and_read(lora):
    written = default_config(dataclasses.replace(BASE, lora=lora))
    found, _, _ = read_config(json.loads(json.dumps(written)), BASE, "adapter_config.json")
    assert dataclasses.replace(found, targets=()) == dataclasses.replace(lora, targets=())
    assert set(found.targets) == set(lora.targets)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern gives model.layers"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern=['q_proj'] is not a table"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern '(.*\\\\.)?(()' is not a regular expression"),
        ({"alpha_pattern": {"q_proj": "two"}}, "alpha_pattern gives model.layers"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern gives model.layers"),
        ({"lora_alpha": float("inf")}, "lora_alpha=inf is not a finite number"),
        ({"lora_alpha": 10**400}, "is not a finite number"),
        ({"bias": "all"}, "bias='all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"layers_to_transform": ["0"], "target_modules": ["q_proj"]}, "layers_to_transform=['0']"),
        ({"layers_to_transform": [0], "layers_pattern": "(", "target_modules": ["q_proj"]}, "layers_pattern=['(']"),
        ({"layers_pattern": ["layers"], "target_modules": ["q_proj"]}, "layers_pattern=['layers'] without layers_to_transform"),
        ({"exclude_modules": 3}, "exclude_modules=3"),
        ({"exclude_modules": ATTENTION}, "selects no module"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"r": 0}, "r=0"),
        ({"r": True}, "r=True"),
        ({"lora_alpha": "two"}, "lora_alpha='two'"),
        ({"target_modules": "("}, "not a regular expression"),
        ({"target_modules": "nothing"}, "selects no module"),
        ({"target_modules": None}, "target_modules=None"),
        ({"target_modules": ["embed_tokens"]}, "model.embed_tokens, which is not a linear layer"),
        ({"target_modules": ["conv1"]}, "audio_tower.conv1, which is not a linear layer"),
        ({"modules_to_save": ["nothing"]}, "['nothing']"),
        ({"modules_to_save": True}, "modules_to_save=True is not a list of names"),
        ({"kasa_config": {"beta": 1.0}}, "kasa_config"),
        ({"future_scale": 3}, "future_scale=3 is not known"),
        ({"future_flag": False}, "future_flag=False is not known"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, expected):
    with pytest.raises(InputError) as caught:
        read_config(settings(**changes), BASE, "folder/adapter_config.json")
    assert expected in str(caught.value)
    assert "folder/adapter_config.json" in str(caught.value)


def test_fields_that_change_nothing_are_accepted():
    plain, _, _ = read_config(settings(), BASE, "adapter_config.json")
    mapping = {"base_model_class": "Wave", "parent_library": "wave"}
    more = settings(future_scale=None, peft_version="0.21.2", revision="main", auto_mapping=mapping, merge_weights=False)
    assert read_config(more, BASE, "adapter_config.json")[0] == plain


def test_golden_adapter_settings_are_all_known(golden):
    config = json.loads((golden.adapter_dir / "adapter_config.json").read_text())
    assert _UNUSED.keys() | _READ | _HARMLESS >= config.keys()


def test_adapter_keys_are_those_the_settings_select(tmp_path, base):
    q = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    for name, keep, changes, expected in (
        ("missing", lambda n: n != q, {}, f"1 missing ({q})"),
        ("unknown", lambda n: True, {"target_modules": r"model\.layers\.0\.self_attn\.[qkv]_proj"}, "6 unknown"),
        ("unsaved", lambda n: True, {"modules_to_save": ["beats_ln", "beats_proj"]}, "4 unknown (base_model.model.classify_linear"),
        ("rank", lambda n: True, {"r": 4}, "12 misshapen"),
    ):
        adapter = checkpoints.write_adapter(tmp_path / name, CONFIG, changes, keep)
        with pytest.raises(InputError) as caught:
            conversion.to_jax(base, tmp_path / "out", adapter=adapter)
        assert expected in str(caught.value)
        assert "adapter_model.safetensors" in str(caught.value)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "Gaussian", "mystery", 1, ["gaussian"]])
def test_an_initialisation_that_changes_the_base_is_refused_by_name(start):
    with pytest.raises(InputError, match=re.escape(f"init_lora_weights={start!r} is not supported")):
        read_config(default_config(CONFIG) | {"init_lora_weights": start}, BASE, "adapter_config.json")


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_an_initialisation_that_leaves_the_base_alone_is_read(start):
    assert read_config(default_config(CONFIG) | {"init_lora_weights": start}, BASE, "adapter_config.json")[0] == checkpoints.LORA


@pytest.mark.jit
@pytest.mark.parametrize("rslora", [False, True])
def test_merging_folds_in_lora_and_whole_modules(tmp_path, base, rslora):
    config = dataclasses.replace(CONFIG, lora=dataclasses.replace(checkpoints.LORA, rslora=rslora))
    adapter = checkpoints.write_adapter(tmp_path / "adapter", config)
    conversion.to_jax(base, tmp_path / "apart", adapter=adapter)
    conversion.to_jax(base, tmp_path / "merged", adapter=adapter, merge_adapter=True)
    apart_config, apart = conversion.load(tmp_path / "apart")
    merged_config, merged = conversion.load(tmp_path / "merged")
    assert merged_config == dataclasses.replace(apart_config, lora=None)
    scale = 8.0 / (math.sqrt(3) if rslora else 3)
    for path, leaf in merged.items():
        expected = np.asarray(apart[path], np.float64)
        if (*path[:-1], "lora_a") in apart and path[-1] == "kernel":
            a, b = (np.asarray(apart[(*path[:-1], side)], np.float64) for side in ("lora_a", "lora_b"))
            assert np.abs(a @ b).max() > 0.1
            expected = expected + scale * (a @ b)
        assert_close(leaf, expected, "layer")
    conversion.to_torch(tmp_path / "merged", base_out=tmp_path / "base")
    weights = checkpoints.read_folder(tmp_path / "base")
    assert_close(weights["classify_linear.0.weight"], np.asarray(merged["head", "fc1", "kernel"]).T, "round_trip")
    with pytest.raises(InputError, match="merged into the base"):
        conversion.to_torch(tmp_path / "merged", adapter_out=tmp_path / "again")
    with pytest.raises(InputError, match="--adapter"):
        conversion.to_jax(base, tmp_path / "none", merge_adapter=True)


@pytest.mark.jit
def test_base_stays_apart_from_the_adapters_modules(tmp_path, base):
    adapter = checkpoints.write_adapter(tmp_path / "adapter", CONFIG)
    conversion.to_jax(base, tmp_path / "model", adapter=adapter)
    conversion.to_torch(tmp_path / "model", base_out=tmp_path / "base", adapter_out=tmp_path / "out")
    assert_same_tensors(checkpoints.read_folder(tmp_path / "base"), checkpoints.read_folder(base))
    saved = checkpoints.read_folder(adapter)
    assert_same_tensors(checkpoints.read_folder(tmp_path / "out"), saved)
    _, params = conversion.load(tmp_path / "model")
    assert_close(params["bridge", "norm", "scale"], saved["base_model.model.beats_ln.weight"], "round_trip")


@pytest.mark.jit
def test_layers_without_lora_get_zeros_and_are_not_exported(tmp_path, base):
    target = r"model\.layers\.1\.self_attn\.q_proj"
    lora = LoraConfig(rank=3, targets=("decoder/layers/attn/q",), modules_to_save=())
    adapter = checkpoints.write_adapter(
        tmp_path / "adapter",
        dataclasses.replace(BASE, lora=lora),
        {"target_modules": target, "modules_to_save": None},
        lambda n: ".1." in n,
    )
    conversion.to_jax(base, tmp_path / "model", adapter=adapter)
    _, params = conversion.load(tmp_path / "model")
    a = np.asarray(params["decoder", "layers", "attn", "q", "lora_a"])
    assert not a[0].any()
    assert a[1].all()
    conversion.to_torch(tmp_path / "model", adapter_out=tmp_path / "out")
    assert_same_tensors(checkpoints.read_folder(tmp_path / "out"), checkpoints.read_folder(adapter))


@pytest.mark.jit
def test_trained_adapter_without_a_source_is_written_in_full(tmp_path, base):
    adapter = checkpoints.write_adapter(tmp_path / "adapter", CONFIG)
    conversion.to_jax(base, tmp_path / "model", adapter=adapter)
    config, params = conversion.load(tmp_path / "model")
    conversion.write_adapter(tmp_path / "out", config, params, base_model="WAVE-7B")
    assert_same_tensors(checkpoints.read_folder(tmp_path / "out"), checkpoints.read_folder(adapter))
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written == default_config(config, "WAVE-7B")
    conversion.to_jax(base, tmp_path / "again", adapter=tmp_path / "out")


def test_golden_adapter_config_has_no_field_that_is_not_written(golden):
    """PEFT's own file names every field; what we write for a new adapter must not lack one."""
    assert set(default_config(CONFIG)) >= set(golden.adapter_config) - {"peft_version"}


def test_nan_in_the_adapter_is_named(tmp_path, base):
    adapter = checkpoints.write_adapter(tmp_path / "adapter", CONFIG)
    weights = checkpoints.read_folder(adapter)
    name = next(n for n in weights if "lora_B" in n)
    weights[name][0, 0] = jnp.nan
    from safetensors.numpy import save_file

    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"lora_B.*NaN"):
        conversion.to_jax(base, tmp_path / "out", adapter=adapter)
