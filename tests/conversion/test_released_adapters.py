"""Adapters as other people's programs save them: ranks and alphas of their own, other names, other files."""

from __future__ import annotations

import dataclasses
import json
import math

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from omni_jax import conversion
from omni_jax.conversion.adapter import default_config, open_adapter, read_config
from omni_jax.conversion.folder import read_manifest
from omni_jax.conversion.rules import base_rules
from omni_jax.types import InputError
from tests.conversion import checkpoints
from tests.conversion.test_round_trip import assert_same_tensors, beats_file
from tests.conversion.torch_files import write_torch_file
from tests.repository import ROOT
from tests.tolerances import assert_close

BASE = checkpoints.model_config()
CONFIG = checkpoints.model_config(lora=checkpoints.LORA)
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = checkpoints.write_base(tmp_path_factory.mktemp("base") / "base", checkpoints.tensors(BASE, dtype=np.float32))
    beats_file(folder / "BEATs.pt")
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Name -> tensor of an adapter with default names."""
    return load_file(checkpoints.write_adapter(tmp_path_factory.mktemp("plain") / "adapter", CONFIG) / FILE)


def written(folder, tensors, **settings):
    folder.mkdir()
    save_file(tensors, folder / FILE, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(default_config(CONFIG) | settings))
    return folder


def with_ranks(tensors, rank_of):
    """Gives each module's matrices the rank that `rank_of` says, 3 where it says nothing."""
    rng, found = np.random.default_rng(4), {}
    for name, value in tensors.items():
        rank = rank_of(name) or 3
        shape = (rank, value.shape[1]) if ".lora_A." in name else (value.shape[0], rank) if ".lora_B." in name else None
        found[name] = value if shape is None else rng.standard_normal(shape).astype(value.dtype)
    return found


PATTERNS = [
    ({"rank_pattern": {"q_proj": 5, r"layers\.1\..*k_proj": 1}}, False),
    ({"alpha_pattern": {"v_proj": 3, "model.layers.0.self_attn.q_proj": 16}}, False),
    ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 7.5}}, True),
    ({"rank_pattern": {"[qkv]_proj": 4}, "alpha_pattern": {"[qkv]_proj": 1}}, False),
]


def rank_and_alpha(module, settings):
    """What PEFT gives a module; the test's own few lines."""
    import re

    def of(field, default):
        found = (value for pattern, value in settings.get(field, {}).items() if re.match(rf"(.*\.)?({pattern})$", module))
        return next(found, default)

    return of("rank_pattern", 3), of("alpha_pattern", 8.0)


@pytest.mark.jit
@pytest.mark.parametrize(("settings", "rslora"), PATTERNS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_ranks_and_alphas_of_single_modules(tmp_path, base, plain, settings, rslora, dtype):
    def module_of(name):
        return name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]

    tensors = with_ranks(plain, lambda name: rank_and_alpha(module_of(name), settings)[0])
    tensors = {name: value.astype(dtype) for name, value in tensors.items()}
    adapter = written(tmp_path / "adapter", tensors, use_rslora=rslora, **settings)
    both = conversion.to_jax(base, tmp_path / "model", adapter=adapter)
    config, params = conversion.load(tmp_path / "model", dtype="float32")
    assert config.lora is not None
    for letter in "qkv":
        a, b = (np.asarray(params["decoder", "layers", "attn", letter, side], np.float64) for side in ("lora_a", "lora_b"))
        for layer in range(2):
            module = f"model.layers.{layer}.self_attn.{letter}_proj"
            rank, alpha = rank_and_alpha(module, settings)
            down, up = (tensors[f"base_model.model.{module}.lora_{side}.weight"].astype(np.float64) for side in "AB")
            expected = up @ down * (alpha / (math.sqrt(rank) if rslora else rank))
            assert_close((a[layer] @ b[layer]).T * config.lora.scale, expected, "layer")
    conversion.to_torch(tmp_path / "model", adapter_out=tmp_path / "out")
    assert_same_tensors(load_file(tmp_path / "out" / FILE), tensors)
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == (adapter / "adapter_config.json").read_bytes()
    alone = conversion.to_jax(base, tmp_path / "merged", adapter=adapter, merge_adapter=True)
    assert both.tensors - alone.tensors == len(tensors), "what is kept for the way back counts twice"
    assert both.parameters - alone.parameters == sum(value.size for value in tensors.values())
    _, merged = conversion.load(tmp_path / "merged")
    rank, alpha = rank_and_alpha("model.layers.1.self_attn.q_proj", settings)
    down, up = (tensors[f"base_model.model.model.layers.1.self_attn.q_proj.lora_{side}.weight"].astype(np.float64) for side in "AB")
    kernel = np.asarray(params["decoder", "layers", "attn", "q", "kernel"][1], np.float64)
    expected = kernel + (up @ down * (alpha / (math.sqrt(rank) if rslora else rank))).T
    assert_close(merged["decoder", "layers", "attn", "q", "kernel"][1], expected, "layer")


def test_an_alpha_that_every_module_takes_from_the_pattern():
    config = default_config(CONFIG) | {"alpha_pattern": {".*": 16}}
    lora, selected, own = read_config(config, BASE, "adapter_config.json")
    assert selected and not own
    assert checkpoints.LORA.alpha != 16 and lora.scale == 16 / checkpoints.LORA.rank


@pytest.mark.jit
def test_what_a_run_makes_of_such_an_adapter_is_written_at_the_largest_rank(tmp_path, base, plain):
    settings = {"rank_pattern": {"q_proj": 5}}
    adapter = written(tmp_path / "adapter", with_ranks(plain, lambda name: 5 if "q_proj" in name else 3), **settings)
    conversion.to_jax(base, tmp_path / "model", adapter=adapter)
    config, params = conversion.load(tmp_path / "model")
    conversion.write_adapter(tmp_path / "out", config, params)
    conversion.to_jax(base, tmp_path / "again", adapter=tmp_path / "out")
    again, same = conversion.load(tmp_path / "again")
    assert again.lora is not None and config.lora is not None and again.lora.scale == config.lora.scale
    assert all(np.array_equal(np.asarray(same[path]), np.asarray(leaf)) for path, leaf in params.items())


@pytest.mark.parametrize("spelling", ["all-linear", "All-Linear"])
def test_all_linear_means_every_linear_layer_but_the_output_and_what_is_saved_whole(spelling):
    lora, selected, _ = read_config(default_config(CONFIG) | {"target_modules": spelling}, BASE, "adapter_config.json")
    saved = ("classify_linear", "beats_proj")
    linear = {rule.module for rule in base_rules(BASE) if rule.linear and not rule.torch.startswith(saved)}
    assert set(lora.targets) == linear and "visual.blocks.1.attn.q" in selected and "lm_head" not in selected
    assert not any(name.startswith(saved) for name in selected)


def default_names(name):
    for side in "AB":
        name = name.replace(f".lora_{side}.weight", f".lora_{side}.default.weight")
    head, rest = name.removeprefix("base_model.model.").split(".", 1)
    return f"base_model.model.{head}.modules_to_save.default.{rest}" if head in CONFIG.lora.modules_to_save else name


def transformers_5(name):
    inner = name.removeprefix("base_model.model.")
    inner = inner.replace("model.layers", "model.language_model.layers") if inner.startswith("model.") else f"model.{inner}"
    return f"base_model.model.{inner}"


SPELLINGS = {
    ".default.": default_names,
    "transformers 5": transformers_5,
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "module.": lambda name: f"module.{name}",
    "thinker.": lambda name: name.replace("base_model.model.", "base_model.model.thinker."),
}


@pytest.mark.jit
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_adapter_and_comes_back(tmp_path, base, plain, spelling):
    renamed = {SPELLINGS[spelling](name): value for name, value in plain.items()}
    assert renamed.keys().isdisjoint(plain)
    # Its own program's patterns are of its own names.
    target = (
        r"model\.language_model\.layers\.\d+\.self_attn\.[qkv]_proj" if spelling == "transformers 5" else ["q_proj", "k_proj", "v_proj"]
    )
    more = {} if spelling == "transformers 5" else {"exclude_modules": r"(.*\.)?(audio_tower|beats)\..*"}
    adapter = written(tmp_path / "adapter", renamed, target_modules=target, **more)
    conversion.to_jax(base, tmp_path / "model", adapter=adapter)
    conversion.to_torch(tmp_path / "model", adapter_out=tmp_path / "out")
    assert_same_tensors(load_file(tmp_path / "out" / FILE), renamed)
    _, params = conversion.load(tmp_path / "model")
    expected = plain["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].T
    assert np.array_equal(np.asarray(params["decoder", "layers", "attn", "q", "lora_a"][1]), expected)
    assert np.array_equal(np.asarray(params["head", "fc1", "kernel"]), plain["base_model.model.classify_linear.0.weight"].T)


def test_patterns_are_compared_with_the_names_in_the_file_module_by_module(tmp_path, base):
    """Under transformers 5 the decoder's names are nested and those of what WAVE adds are not."""
    lora = dataclasses.replace(checkpoints.LORA, targets=("decoder/layers/attn/q", "bridge/fc1"), modules_to_save=())
    plain = load_file(checkpoints.write_adapter(tmp_path / "plain", checkpoints.model_config(lora=lora)) / FILE)
    mixed = {name.replace("model.model.layers.", "model.model.language_model.layers."): value for name, value in plain.items()}
    settings = {
        "modules_to_save": None,
        "target_modules": ["q_proj", "beats_proj.0"],
        "exclude_modules": r"model\.(visual|audio_tower)\..*|beats\..*",
    }
    adapter = written(tmp_path / "adapter", mixed, alpha_pattern={"language_model.*q_proj": 16, "beats_proj.0": 2}, **settings)
    found = open_adapter(adapter, BASE)
    factors = {key: found.scale(f"{key}.weight") for key in ("model.layers.1.self_attn.q_proj", "beats_proj.0")}
    assert factors == {"model.layers.1.self_attn.q_proj": 16 / 3, "beats_proj.0": 2 / 3}


def test_a_module_listed_by_its_whole_name_is_meant_in_whichever_layer():
    settings = {"target_modules": ["q_proj", "beats_proj.0", "model.layers.0.self_attn.k_proj"], "layers_to_transform": [1]}
    config = default_config(CONFIG) | settings | {"modules_to_save": None, "exclude_modules": r"(audio_tower|beats|visual)\..*"}
    _, selected, _ = read_config(config, BASE, "adapter_config.json")
    assert selected == {"model.layers.1.self_attn.q_proj", "beats_proj.0", "model.layers.0.self_attn.k_proj"}


@pytest.mark.jit
def test_a_table_that_layers_share_is_the_adapters_where_beats_is_saved_whole(tmp_path, base):
    key, path = "base_model.model.beats.encoder.layers.{}.self_attn.relative_attention_bias.weight", ("beats", "relative_bias", "embedding")
    lora = dataclasses.replace(checkpoints.LORA, modules_to_save=("beats",))
    plain = load_file(checkpoints.write_adapter(tmp_path / "plain", checkpoints.model_config(lora=lora)) / FILE)
    tensors = plain | {key.format(layer): plain[key.format(0)] for layer in range(3)}
    settings = {"modules_to_save": ["beats"], "exclude_modules": r"(audio_tower|beats)\..*"}
    adapter = written(tmp_path / "adapter", tensors, **settings)
    for merge in (False, True):
        conversion.to_jax(base, tmp_path / f"model {merge}", adapter=adapter, merge_adapter=merge)
        _, params = conversion.load(tmp_path / f"model {merge}")
        assert np.array_equal(np.asarray(params[path]), plain[key.format(0)])
    conversion.to_torch(tmp_path / "model False", adapter_out=tmp_path / "out")
    assert_same_tensors(load_file(tmp_path / "out" / FILE), tensors)
    odd = written(tmp_path / "odd", plain | {key.format(0): 2 * plain[key.format(0)]}, **settings)
    with pytest.raises(InputError, match=r"differs from .* but all layers must share one table"):
        conversion.to_jax(base, tmp_path / "none", adapter=odd)


def test_copies_of_the_base_beside_saved_modules_are_left_out_and_reported(tmp_path, base, plain):
    renamed = {default_names(name): value for name, value in plain.items()}
    copy = {"base_model.model.beats_ln.original_module.weight": np.ones(24, np.float32)}
    made = conversion.to_jax(base, tmp_path / "model", adapter=written(tmp_path / "adapter", renamed | copy))
    assert any("1 copies of the base's modules are left out" in note for note in made.notes)


def test_several_adapters_in_one_file_or_folder_are_refused_by_name(tmp_path, base, plain):
    renamed = {default_names(name): value for name, value in plain.items()}
    second = {name.replace(".default.", ".second."): value for name, value in renamed.items()}
    with pytest.raises(InputError, match=r"holds 2 adapters \(default, second\)"):
        conversion.to_jax(base, tmp_path / "out", adapter=written(tmp_path / "both", renamed | second))
    (tmp_path / "several").mkdir()
    for name in ("one", "two"):
        written(tmp_path / "several" / name, plain)
    with pytest.raises(InputError, match=r"name one of the adapters in it \(one, two\)"):
        conversion.to_jax(base, tmp_path / "out", adapter=tmp_path / "several")
    doubled = plain | {f"module.{next(iter(plain))}": next(iter(plain.values()))}
    with pytest.raises(InputError, match="have two names"):
        conversion.to_jax(base, tmp_path / "out", adapter=written(tmp_path / "doubled", doubled))


def test_an_adapter_in_a_bin_file_of_bfloat16(tmp_path, base, plain):
    tensors = {name: value.astype(ml_dtypes.bfloat16) for name, value in plain.items()}
    adapter = written(tmp_path / "adapter", {"a": np.zeros(1, np.float32)})
    (adapter / FILE).unlink()
    write_torch_file(adapter / "adapter_model.bin", tensors)
    conversion.to_jax(base, tmp_path / "model", adapter=adapter)
    conversion.to_torch(tmp_path / "model", adapter_out=tmp_path / "out")
    assert_same_tensors(load_file(tmp_path / "out" / FILE), tensors)


def test_lora_of_the_model_is_that_of_the_adapter_where_nothing_is_special(plain):
    assert read_config(default_config(CONFIG), BASE, "adapter_config.json")[0] == checkpoints.LORA
    other = dataclasses.replace(checkpoints.LORA, rank=7, alpha=3.5, rslora=True)
    assert read_config(default_config(dataclasses.replace(BASE, lora=other)), BASE, "adapter_config.json")[0] == other


@pytest.mark.jit
def test_a_run_goes_on_from_a_released_adapter_where_model_lora_is_unset(tmp_path, base, plain):
    """`--config.model.lora=None`: what the adapter holds is where training starts, and what is exported again."""
    from omni_jax.api import training
    from omni_jax.cli.config_file import read_config
    from omni_jax.train.trainable import select

    conversion.to_jax(base, tmp_path / "model", adapter=written(tmp_path / "adapter", plain))
    changes = [f"model.base={tmp_path / 'model'}", "data.train=shards"]
    unset = read_config(str(ROOT / "configs" / "omniretriever_7b.py"), [*changes, "model.lora=None"])
    found, _ = conversion.load(tmp_path / "model")
    model = training._with_lora(found, unset)
    assert model == found and model.lora == checkpoints.LORA
    with pytest.raises(InputError, match=r"has an adapter of rank 3 already, .* set model.lora to None to continue training it"):
        training._with_lora(found, read_config(str(ROOT / "configs" / "omniretriever_7b.py"), changes))
    params = training._params(tmp_path / "model", read_manifest(tmp_path / "model"), model, unset, None, lambda _: None)
    names = [tuple(name.split("/")) for name in select(model, unset.trainable)]
    trained = {path: np.asarray(params[path], np.float32) for path in names}
    made = conversion.write_trained(tmp_path / "model", model, trained, adapter_out=tmp_path / "out")
    assert not made.left_out and {path[0] for path in names} == {"decoder", "head", "bridge"}
    assert_same_tensors(load_file(tmp_path / "out" / FILE), plain)
