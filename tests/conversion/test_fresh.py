"""Fresh folders: loaded, tokenized, embedded, exported to torch's layout and converted back."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from etils import epath

from omni_jax import conversion
from omni_jax.config import LoraConfig
from omni_jax.conversion import engine
from omni_jax.conversion.adapter import adapter_entries
from omni_jax.conversion.fresh import fresh_value, write_fresh
from omni_jax.conversion.source import model_config, open_checkpoint
from omni_jax.io.safetensors_io import read_header
from omni_jax.model import carried_shapes
from omni_jax.tokens.tokenizer import Tokenizer
from omni_jax.types import InputError

ARCHITECTURE = {
    "decoder": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "mrope_sections": [2, 3, 3],
        "max_positions": 512,
    },
    "vision": {"hidden_size": 16, "intermediate_size": 20, "num_layers": 2, "num_heads": 2, "full_attention_layers": [1]},
    "audio": {"hidden_size": 16, "intermediate_size": 20, "num_layers": 1, "num_heads": 2, "n_window": 50, "output_size": 32},
    "beats": {
        "num_layers": 2,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_heads": 2,
        "embed_dim": 16,
        "conv_pos": 8,
        "conv_pos_groups": 2,
        "num_buckets": 16,
        "max_distance": 40,
        "predictor_classes": 5,
    },
}
CAPTIONS = ["a red disc on black", "a blue ring on black", "the disc is red", "the ring is blue", "a red ring"]
LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.0)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A fresh folder with an adapter."""
    folder = tmp_path_factory.mktemp("fresh") / "model"
    write_fresh(folder, ARCHITECTURE, seed=3, captions=CAPTIONS, lora=LORA)
    return folder


@pytest.mark.jit
def test_every_parameter_loads_and_starts_at_its_scale(fresh):
    config, params = conversion.load(fresh)
    assert config.lora == LORA
    assert config.decoder.mrope_sections == (2, 3, 3) and config.vision.output_size == 32
    assert {path: tuple(x.shape) for path, x in params.items()} == {
        path: shape for path, shape in engine.tree_shapes(config).items() if path not in carried_shapes(config)
    }
    kernel = np.asarray(params["decoder", "layers", "mlp", "gate", "kernel"])
    assert kernel.std() * np.sqrt(32) == pytest.approx(1, rel=0.1)
    assert not np.array_equal(kernel[0], kernel[1])
    assert not np.asarray(params["decoder", "layers", "attn", "q", "lora_b"]).any()
    assert np.asarray(params["decoder", "layers", "attn", "q", "lora_a"]).all()
    assert (np.asarray(params["vision", "layers", "norm1", "scale"]) == 1).all()


def test_a_seed_gives_the_same_weights_and_another_seed_others():
    one = fresh_value("decoder.embed.embedding", (7, 5), 0)
    assert np.array_equal(one, fresh_value("decoder.embed.embedding", (7, 5), 0))
    assert not np.array_equal(one, fresh_value("decoder.embed.embedding", (7, 5), 1))


@pytest.mark.jit
def test_its_tokenizer_fits_its_config_and_knows_the_words(fresh):
    config, _ = conversion.load(fresh)
    tokenizer = Tokenizer.from_pretrained(fresh)
    tokenizer.check(config.tokens)
    assert len(tokenizer.encode_text("a red ring on black")) == 5
    assert len(tokenizer.encode_text("zebra")) > 1
    ids = tokenizer.encode_text("<|AUDIO|> a red disc Ω")
    assert config.tokens.audio not in ids and max(ids) < config.decoder.vocab_size


def test_the_slow_tokenizer_files_say_the_same(fresh, tmp_path):
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).write_bytes((fresh / name).read_bytes())
    text = "the ring is blue; a disc, 3 reds"
    assert Tokenizer.from_pretrained(tmp_path).encode_text(text) == Tokenizer.from_pretrained(fresh).encode_text(text)


@pytest.mark.jit
def test_it_goes_to_torch_and_back_bit_for_bit(fresh, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    conversion.to_torch(fresh, base_out=base, adapter_out=adapter)
    config, params = conversion.load(fresh)
    base_keys = {key for key in engine.base_entries(config) if "1.self_attn.relative" not in key}  # tied: stored once
    assert set(open_checkpoint(epath.Path(base)).tensors) == base_keys
    assert set(read_header(epath.Path(adapter / "adapter_model.safetensors"))[0]) == set(adapter_entries(config))
    again = tmp_path / "again"
    conversion.to_jax(base, again, adapter=adapter)
    config_again, params_again = conversion.load(again)
    assert dataclasses.replace(config_again, lora=None) == dataclasses.replace(config, lora=None)
    for path, value in params.items():
        assert np.array_equal(np.asarray(value), np.asarray(params_again[path])), path


def test_golden_key_set_is_that_of_a_wave_checkpoint(golden, tmp_path):
    """The golden checkpoint's own architecture gives its very tensor names and shapes."""
    model = model_config(open_checkpoint(epath.Path(golden.checkpoint)))
    sections = {name: dataclasses.asdict(getattr(model, name)) for name in ("decoder", "vision", "audio", "beats")}
    del sections["decoder"]["vocab_size"]
    write_fresh(tmp_path / "fresh", sections, captions=CAPTIONS)
    conversion.to_torch(tmp_path / "fresh", base_out=tmp_path / "base")
    made, wanted = (open_checkpoint(epath.Path(folder)).tensors for folder in (tmp_path / "base", golden.checkpoint))
    assert set(made) == set(wanted)
    tables = {name for name, info in wanted.items() if model.decoder.vocab_size in info.shape}
    assert {n: i.shape for n, i in made.items() if n not in tables} == {n: i.shape for n, i in wanted.items() if n not in tables}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"towers": {}}, "section towers is unknown"),
        ({"beats": None}, "section beats is missing"),
        ({"audio": {"depth": 2}}, "architecture.audio: depth is unknown"),
        ({"vision": {"hidden_size": 16}}, "architecture.vision: missing"),
        ({"audio": {**ARCHITECTURE["audio"], "output_size": 30}}, "output_size 30 must be the decoder's hidden_size"),
        ({"decoder": {**ARCHITECTURE["decoder"], "num_heads": 5}}, "architecture.decoder: text_config.num_attention_heads"),
    ],
)
def test_an_architecture_that_does_not_fit_is_named(tmp_path, change, message):
    sections = {name: value for name, value in {**ARCHITECTURE, **change}.items() if value is not None}
    with pytest.raises(InputError, match=message):
        write_fresh(tmp_path / "model", sections, captions=CAPTIONS)
    assert not (tmp_path / "model").exists()
