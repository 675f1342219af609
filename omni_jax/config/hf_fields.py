"""Fields of a checkpoint's `config.json`: every one is read, known to change no embedding, or refused by name.

Names are those of transformers 4 and 5 (Qwen2.5-Omni thinker) and of WAVE. A field that is unknown may change what the model computes, so
that it is refused unless it is empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omni_jax.config.errors import ConfigError

SECTIONS = ("text_config", "vision_config", "audio_config")

NAMES: dict[str, dict[str, str]] = {
    "text_config": {
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "vocab_size": "vocab_size",
        "rms_norm_eps": "rms_norm_eps",
        "max_positions": "max_position_embeddings",
    },
    "vision_config": {
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_layers": "depth",
        "num_heads": "num_heads",
        "output_size": "out_hidden_size",
        "full_attention_layers": "fullatt_block_indexes",
        "window_size": "window_size",
    },
    "audio_config": {
        "hidden_size": "d_model",
        "intermediate_size": "encoder_ffn_dim",
        "num_layers": "encoder_layers",
        "num_heads": "encoder_attention_heads",
        "output_size": "output_dim",
        "n_window": "n_window",
        "max_source_positions": "max_source_positions",
    },
}
"""Section -> our name of a field -> its name there."""

BEATS_NAMES = {
    "num_layers": "encoder_layers",
    "hidden_size": "encoder_embed_dim",
    "intermediate_size": "encoder_ffn_embed_dim",
    "num_heads": "encoder_attention_heads",
    "embed_dim": "embed_dim",
    "conv_pos": "conv_pos",
    "conv_pos_groups": "conv_pos_groups",
    "num_buckets": "num_buckets",
    "max_distance": "max_distance",
}
"""Our name of a whole number of BEATs -> its name in the `cfg` of a published file."""

TOKEN_NAMES = {
    "audio": "audio_token_index",
    "audio_bos": "audio_start_token_id",
    "audio_eos": "audio_end_token_id",
    "video": "video_token_index",
    "vision_bos": "vision_start_token_id",
    "vision_eos": "vision_end_token_id",
    "pad": "pad_token_id",
}
"""Field of `SpecialTokens` -> its name there."""

# Beside those of NAMES.
_READ = {
    "": "text_config vision_config audio_config model_type classify_type position_id_per_seconds seconds_per_chunk audio_token_id "
    f"video_token_id train_classify {' '.join(TOKEN_NAMES.values())}",
    "text_config": "rope_theta rope_scaling rope_parameters layer_types use_sliding_window sliding_window max_window_layers head_dim "
    "partial_rotary_factor pad_token_id",
    "vision_config": "rope_parameters embed_dim num_attention_heads num_hidden_layers",
    "audio_config": "beats_path beats_cfg hidden_size intermediate_size num_attention_heads num_hidden_layers",
}

# Field -> the values that mean what this model computes.
_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "": {"classify_type": ("all_layer", None)},
    "text_config": {
        "hidden_act": ("silu",),
        "attention_bias": (True, None),
        "qkv_bias": (True, None),
        "mlp_bias": (False, None),
        "is_causal": (True, None),
    },
    "vision_config": {
        "hidden_act": ("silu",),
        "patch_size": (14,),
        "spatial_patch_size": (14, None),
        "temporal_patch_size": (2,),
        "spatial_merge_size": (2,),
        "in_channels": (3, None),
        "in_chans": (3, None),
    },
    "audio_config": {
        "activation_function": ("gelu",),
        "scale_embedding": (False,),
        "beats_only": (False, None),
        "use_beats": (True, None),
        "num_mel_bins": (128,),
    },
}

# Field -> the field of the same section that it must agree with where both are there: names that transformers maps to each other.
_SAME = {
    "vision_config": {
        "embed_dim": "hidden_size",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "depth",
    },
    "audio_config": {
        "hidden_size": "d_model",
        "intermediate_size": "encoder_ffn_dim",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    },
}

# What every section may hold: bookkeeping, and settings of training and of generation, none of which an embedding depends on.
_HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _name_or_path architectures
    attn_implementation auto_map base_model_tp_plan chunk_size_feed_forward dtype finetuning_task id2label initializer_range init_std
    is_decoder keys_to_ignore_at_inference label2id model_type name_or_path num_labels output_attentions
    output_hidden_states problem_type return_dict tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class torch_dtype
    torchscript transformers_version use_bfloat16 use_cache task_specific_params prefix
    activation_dropout attention_dropout dropout encoder_layerdrop layerdrop hidden_dropout
    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens bos_token_id decoder_start_token_id
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty eos_token_id epsilon_cutoff
    eta_cutoff exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_scores
    pad_token_id remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id suppress_tokens target_lookbehind
    temperature top_k top_p typical_p
    image_token_index image_token_id user_token_id vision_token_id ignore_index sim_temperature tokens_per_second mlp_ratio
    enable_audio_output enable_talker talker_config token2wav_config
    gradient_checkpointing unsloth_version unsloth_fixed transformers.js_config tokenizer_model_max_length tokenizer_padding_side
    """.split()
)
# Of a base class that could do otherwise; this model has none of it.
_EMPTY = ("add_cross_attention", "cross_attention_hidden_size", "is_encoder_decoder", "pruned_heads")

_BEATS_READ = {*BEATS_NAMES.values(), "conv_bias", "predictor_class", "finetuned_model"}
BEATS_FIXED: dict[str, Any] = {
    "input_patch_size": 16,
    "deep_norm": True,
    "gru_rel_pos": True,
    "relative_position_embedding": True,
    "layer_norm_first": False,
    "activation_fn": "gelu",
}
_BEATS_TRAINING = frozenset(
    "dropout attention_dropout activation_dropout encoder_layerdrop dropout_input predictor_dropout layer_wise_gradient_decay_ratio".split()
)


def thinker_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration of the thinker, which may come alone or within that of the whole model (`thinker_config`).

    Raises:
      ConfigError: a part stands in both places with different values.
    """
    inner = config.get("thinker_config")
    if not isinstance(inner, Mapping):
        return dict(config)
    fields = (*_READ[""].split(), *_FIXED[""])
    outer = {name: config[name] for name in fields if name != "model_type" and config.get(name) is not None}
    for name, value in outer.items():
        if name in inner and inner[name] is not None and inner[name] != value:
            raise ConfigError(f"config.json: {name} and thinker_config.{name} differ; remove the one that is not this checkpoint's")
    _refuse_unknown("", config, allowed={"thinker_config"})
    kind = config.get("model_type")
    # An embedder that wraps a whole model is named outside; a thinker's own name says nothing more.
    return {**inner, **outer, **({"model_type": kind} if kind and not str(kind).startswith("qwen2_5_omni") else {})}


def check_fields(config: Mapping[str, Any]) -> None:
    """Raises ConfigError for a field of a thinker's `config.json` that asks for what this model does not compute, or is not known."""
    for name, value in _FIXED[""].items():
        if config.get(name) not in value:
            raise ConfigError(f"config.json: {name} {config[name]!r} is not supported, only {value[0]!r}")
    _refuse_unknown("", config)
    for section in SECTIONS:
        fields = config[section]
        for name, values in _FIXED[section].items():
            if name in fields and fields[name] not in values:
                raise ConfigError(f"config.json: {section}.{name} {fields[name]!r} is not supported, only {values[0]!r}")
        for name, other in _SAME.get(section, {}).items():
            if fields.get(name) is not None and other in fields and fields[name] != fields[other]:
                raise ConfigError(f"config.json: {section}.{name} is {fields[name]!r}, but {section}.{other} is {fields[other]!r}")
        _refuse_unknown(section, fields)
    _check_attention(config["text_config"])


def token_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the control tokens' ids by field of `SpecialTokens`; KeyError where one is absent."""
    pad = config["text_config"]["pad_token_id"] if config.get("pad_token_id") is None else config["pad_token_id"]
    return {ours: _token_id({**config, "pad_token_id": pad}, name) for ours, name in TOKEN_NAMES.items()}


def _token_id(config: Mapping[str, Any], name: str) -> Any:
    """Returns a control token's id, which transformers calls `..._token_index` or `..._token_id`."""
    other = name.replace("_token_index", "_token_id")
    if config.get(other) is None or other == name:
        return config[name]
    if config.get(name) not in (None, config[other]):
        raise ConfigError(f"config.json: {name} is {config[name]!r}, but {other} is {config[other]!r}; use the one of the tokenizer")
    return config[other]


def rope_of(text: Mapping[str, Any]) -> tuple[float, tuple[int, int, int]]:
    """Returns base and mrope sections of the decoder's rotary positions, which transformers 4 and 5 write in different places.

    Raises:
      ConfigError: two places that contradict each other, or a kind of scaling that is not computed here.
      KeyError: nothing says what they are.
    """
    old, new = text.get("rope_scaling") or {}, text.get("rope_parameters") or {}
    sources = {"rope_scaling": old, "rope_parameters": new, "text_config": {k: text[k] for k in ("rope_theta",) if text.get(k) is not None}}
    if any(isinstance(value, Mapping) for value in new.values()):
        raise ConfigError("config.json: text_config.rope_parameters differs by layer type, which is not supported")
    found: dict[str, tuple[str, Any]] = {}
    for place, fields in sources.items():
        for name, value in fields.items():
            if value is None:
                continue
            if name in ("type", "rope_type"):  # "mrope" is Qwen's older name for the same
                if value not in ("default", "mrope"):
                    raise ConfigError(f"config.json: text_config.{place} type {value!r} is not supported, only 'default' and 'mrope'")
                continue
            where, other = found.setdefault(name, (place, value))
            if other != value:
                raise ConfigError(
                    f"config.json: {name} is {other!r} in {where} and {value!r} in {place} of text_config; "
                    "remove the one that is not this checkpoint's"
                )
    values = {name: value for name, (_, value) in found.items()}
    if values.pop("partial_rotary_factor", 1) != 1:
        raise ConfigError("config.json: text_config.rope_parameters.partial_rotary_factor is not supported, only 1")
    if values.pop("mrope_interleaved", False):
        raise ConfigError("config.json: text_config.rope_scaling.mrope_interleaved is not supported, only false")
    if odd := values.keys() - {"rope_theta", "mrope_section"}:
        raise ConfigError(
            f"config.json: text_config.rope_scaling.{min(odd)}={values[min(odd)]!r} is not known; remove it if it has no effect"
        )
    if not old and not new:
        raise KeyError("rope_parameters")
    theta, sections = values["rope_theta"], tuple(values["mrope_section"])
    if len(sections) != 3:
        raise ConfigError(f"config.json: text_config's mrope_section {list(sections)} has {len(sections)} parts, expected 3")
    return theta, sections


def check_beats_fields(cfg: Mapping[str, Any]) -> None:
    """Raises ConfigError for a setting of BEATs that this port does not compute, or does not know."""
    for key, value in BEATS_FIXED.items():
        if cfg.get(key, value) != value:
            raise ConfigError(f"BEATs cfg: {key}={cfg[key]!r} is not supported, only {value!r}")
    known = _BEATS_READ | _BEATS_TRAINING | BEATS_FIXED.keys()
    strange = sorted(str(key) for key, value in cfg.items() if key not in known and not _is_empty(value))
    if strange:
        raise ConfigError(
            f"BEATs cfg: {strange[0]}={cfg[strange[0]]!r} is not known, and may change what BEATs computes; use the published file"
        )


def _check_attention(text: Mapping[str, Any]) -> None:
    layers, heads = text["num_hidden_layers"], text["num_attention_heads"]
    kinds = text.get("layer_types")
    if kinds is not None and (list(kinds) != ["full_attention"] * layers):
        raise ConfigError(f"config.json: text_config.layer_types is supported for {layers} layers of 'full_attention' only")
    windowed = text.get("use_sliding_window") and text.get("sliding_window") is not None
    if windowed and kinds is None and (text.get("max_window_layers") or 0) < layers:
        raise ConfigError("config.json: text_config.use_sliding_window is not supported, only false")
    if text.get("head_dim") is not None and text["head_dim"] * heads != text["hidden_size"]:
        raise ConfigError(
            f"config.json: text_config.head_dim {text['head_dim']!r} is not supported, only hidden_size / num_attention_heads"
        )
    if text.get("partial_rotary_factor") not in (None, 1):
        raise ConfigError(f"config.json: text_config.partial_rotary_factor {text['partial_rotary_factor']!r} is not supported, only 1")


def _refuse_unknown(section: str, fields: Mapping[str, Any], allowed: set[str] | None = None) -> None:
    known = {*_READ[section].split(), *NAMES.get(section, {}).values(), *_FIXED[section], *_HARMLESS, *(allowed or ())}
    for name in _EMPTY:
        if fields.get(name):
            raise ConfigError(f"config.json: {f'{section}.{name}'.lstrip('.')} {fields[name]!r} is not supported; this model has none")
    strange = sorted(name for name, value in fields.items() if name not in known and name not in _EMPTY and not _is_empty(value))
    if strange:
        raise ConfigError(
            f"config.json: field {f'{section}.{strange[0]}'.lstrip('.')}={repr(fields[strange[0]])[:80]} is not known, and may change what "
            "the model computes; remove it if it does not"
        )


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, list | dict | str) and not value)
