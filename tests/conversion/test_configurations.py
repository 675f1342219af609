"""`config.json` as other people's folders have it: the same model in every spelling, and no field that is silently without effect."""

from __future__ import annotations

import copy
import json

import pytest

from omni_jax.config import ModelConfig
from omni_jax.conversion.source import model_config, open_checkpoint
from omni_jax.types import InputError
from tests.conversion import checkpoints
from tests.conversion.test_round_trip import beats_file

BEATS_CFG = {
    "encoder_layers": 3,
    "encoder_embed_dim": 24,
    "encoder_ffn_embed_dim": 40,
    "encoder_attention_heads": 3,
    "embed_dim": 16,
    "input_patch_size": 16,
    "conv_pos": 8,
    "conv_pos_groups": 4,
    "num_buckets": 12,
    "max_distance": 800,
    "conv_bias": False,
    "deep_norm": True,
    "gru_rel_pos": True,
    "relative_position_embedding": True,
    "layer_norm_first": False,
    "activation_fn": "gelu",
    "layer_wise_gradient_decay_ratio": 0.6,
    "encoder_layerdrop": 0.05,
    "finetuned_model": True,
    "predictor_class": 5,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.write_base(tmp_path_factory.mktemp("config") / "base", checkpoints.tensors(checkpoints.model_config()))


def read(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return model_config(open_checkpoint(folder))


def changed(path, value, config=None):
    """Returns the tiny config with one field (`section.name`) set."""
    config = copy.deepcopy(config or checkpoints.tiny_config())
    *sections, name = path.split(".")
    at = config
    for section in sections:
        at = at.setdefault(section, {})
    at[name] = value
    return config


def transformers_5():
    """The same model as transformers 5 saves it."""
    config = copy.deepcopy(checkpoints.tiny_config())
    text = config["text_config"]
    text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta"), "type": "default"}
    text |= {"layer_types": ["full_attention"] * 2, "sliding_window": None, "use_sliding_window": False, "max_window_layers": 28}
    text |= {"dtype": "bfloat16", "pad_token_id": None, "tie_word_embeddings": True, "head_dim": 16}
    config["vision_config"]["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "axial"}
    config |= {"dtype": "bfloat16", "transformers_version": "5.23.0", "user_token_id": 872, "image_token_index": 9}
    return config


def nested(config):
    return {
        "architectures": ["Qwen2_5OmniModel"],
        "model_type": "qwen2_5_omni",
        "enable_audio_output": True,
        "thinker_config": config | {"model_type": "qwen2_5_omni_thinker"},
        "talker_config": {"head_dim": 128, "vocab_size": 8448},
        "token2wav_config": {"dit_config": {}},
    }


def with_token_ids():
    config = copy.deepcopy(checkpoints.tiny_config())
    return config | {name.replace("_index", "_id"): config.pop(name) for name in ("audio_token_index", "video_token_index")}


SAME = {
    "transformers 5": transformers_5(),
    "nested": nested(checkpoints.tiny_config()),
    "nested, transformers 5": nested(transformers_5()),
    "partly nested": nested({k: v for k, v in checkpoints.tiny_config().items() if k != "pad_token_id"}) | {"pad_token_id": 0},
    "partly nested, null inside": nested(checkpoints.tiny_config() | {"pad_token_id": None}) | {"pad_token_id": 0},
    "both ropes alike": changed("text_config.rope_parameters", {"mrope_section": [2, 3, 3], "rope_theta": 1e6, "rope_type": "mrope"}),
    "token ids": with_token_ids(),
    "inlined BEATs": changed("audio_config.beats_cfg", BEATS_CFG),
    "remote code": changed("auto_map", {"AutoModel": "modeling_wave.WaveModel"}) | {"classify_type": "all_layer", "sim_temperature": 0.01},
    "windows that no layer reaches": changed(
        "text_config.max_window_layers", 2, changed("text_config.use_sliding_window", True, changed("text_config.sliding_window", 4096))
    ),
    "old names of the vision tower": changed("vision_config.embed_dim", 8, changed("vision_config.in_chans", 3)),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_model_in_another_spelling(folder, name):
    expected = read(folder, checkpoints.tiny_config() | {})
    beats_file(folder / "BEATs.pt")
    try:
        settled = read(folder, checkpoints.tiny_config())
        assert read(folder, SAME[name]) == settled != expected
    finally:
        (folder / "BEATs.pt").unlink()


def test_inlined_beats_settings_are_used_and_compared_with_the_file(folder):
    inlined = changed("audio_config.beats_cfg", BEATS_CFG)
    assert read(folder, inlined).beats == checkpoints.BEATS
    beats_file(folder / "BEATs.pt")
    try:
        with pytest.raises(InputError, match=r"audio_config.beats_cfg and BEATs.pt differ \(max_distance 300 and 800\)"):
            read(folder, changed("audio_config.beats_cfg.max_distance", 300, inlined))
    finally:
        (folder / "BEATs.pt").unlink()
    with pytest.raises(InputError, match=r"beats_cfg: BEATs cfg: num_patches=3 is not known"):
        read(folder, changed("audio_config.beats_cfg.num_patches", 3, inlined))


def test_a_model_without_beats_says_no(folder):
    assert read(folder, changed("audio_config.beats_path", "No", changed("audio_config.beats_cfg", BEATS_CFG))).beats == checkpoints.BEATS


REFUSED = [
    ("text_config.sliding_window", 4096, {"text_config.use_sliding_window": True}, "use_sliding_window"),
    ("text_config.layer_types", ["full_attention", "sliding_attention"], {}, "layer_types"),
    ("text_config.layer_types", ["full_attention"], {}, "layer_types"),
    ("text_config.head_dim", 64, {}, "head_dim"),
    ("text_config.partial_rotary_factor", 0.5, {}, "partial_rotary_factor"),
    ("text_config.attention_bias", False, {}, "attention_bias"),
    ("text_config.qk_norm", True, {}, "text_config.qk_norm=True"),
    ("text_config.logit_scale", 2.0, {}, "text_config.logit_scale=2.0"),
    ("text_config.add_cross_attention", True, {}, "add_cross_attention"),
    ("text_config.pruned_heads", {"0": [1]}, {}, "pruned_heads"),
    ("text_config.rope_scaling.factor", 2.0, {}, "rope_scaling.factor=2.0"),
    ("text_config.rope_scaling.mrope_interleaved", True, {}, "mrope_interleaved"),
    ("text_config.rope_parameters", {"rope_theta": 1e4, "mrope_section": [2, 3, 3]}, {}, "rope_theta is"),
    ("text_config.rope_parameters", {"mrope_section": [3, 2, 3]}, {}, "mrope_section is"),
    ("text_config.rope_parameters", {"rope_type": "yarn"}, {}, "type 'yarn'"),
    ("text_config.rope_parameters", {"full_attention": {"rope_theta": 1e6}}, {}, "differs by layer type"),
    ("text_config.rope_parameters", {"partial_rotary_factor": 0.25}, {}, "partial_rotary_factor"),
    ("vision_config.rope_parameters", {"rope_theta": 1e5}, {}, "vision_config.rope_parameters.rope_theta"),
    ("vision_config.embed_dim", 16, {}, "vision_config.embed_dim is 16, but vision_config.hidden_size is 8"),
    ("vision_config.deepstack_visual_indexes", [1], {}, "deepstack_visual_indexes"),
    ("audio_config.beats_only", True, {}, "beats_only"),
    ("audio_config.scale_embedding", True, {}, "scale_embedding"),
    ("audio_config.num_hidden_layers", 5, {}, "audio_config.num_hidden_layers is 5, but audio_config.encoder_layers is 2"),
    ("audio_config.n_window_infer", 800, {}, "n_window_infer=800"),
    ("classify_type", "last_layer", {}, "classify_type 'last_layer' is not supported"),
    ("train_classify", False, {}, "train_classify is false"),
    ("audio_token_id", 39, {}, "audio_token_id is 39"),
    ("quantization_config", {"bits": 4}, {}, "quantization_config="),
    ("thinker_config", {"seconds_per_chunk": 3}, {}, "seconds_per_chunk and thinker_config.seconds_per_chunk differ"),
]


@pytest.mark.parametrize(("path", "value", "more", "expected"), REFUSED, ids=[f"{path}={value}"[:60] for path, value, _, _ in REFUSED])
def test_what_would_change_the_model_is_refused_by_name(folder, path, value, more, expected):
    config = changed(path, value)
    for name, other in more.items():
        config = changed(name, other, config)
    with pytest.raises(InputError) as caught:
        read(folder, config)
    assert expected in str(caught.value) and str(caught.value).startswith(str(folder / "config.json")) and "\n" not in str(caught.value)


def test_an_embedder_around_a_whole_model_stays_one(tmp_path):
    config = checkpoints.tiny_config()
    del config["audio_config"]["beats_path"]
    plain = ModelConfig.from_hf(nested(config) | {"model_type": "nvomniembed"}, None)
    assert plain.pooling == "mean" and ModelConfig.from_hf(nested(config), None).pooling == "last_all_layers"
