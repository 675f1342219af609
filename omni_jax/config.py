"""Architecture and preset records: `ModelConfig` describes a checkpoint, `Preset` how clips and captions become tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field and the mend."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Text decoder (Qwen2.5 with TMRoPE)."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_sections: tuple[int, int, int] = (16, 24, 24)
    max_positions: int = 32768  # longest prompt, tokens

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def __post_init__(self) -> None:
        _divides("text_config.num_attention_heads", self.num_heads, "hidden_size", self.hidden_size)
        _divides("text_config.num_key_value_heads", self.num_kv_heads, "num_attention_heads", self.num_heads)
        if 2 * sum(self.mrope_sections) != self.head_dim:
            raise ConfigError(
                f"text_config.rope_scaling.mrope_section {self.mrope_sections} must sum to half the head width ({self.head_dim // 2})"
            )


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Vision tower (Qwen2.5-VL: window attention, full attention in a few blocks)."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    output_size: int
    full_attention_layers: tuple[int, ...]
    window_size: int = 112  # pixels
    patch_size: int = 14  # pixels
    temporal_patch_size: int = 2  # frames
    merge_size: int = 2  # patches per side joined into one token
    in_channels: int = 3
    norm_eps: float = 1e-6
    rope_theta: float = 1e4

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        """Length of one flattened patch row (1176 at 7B)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_tokens(self) -> int:
        """Side of an attention window in merged tokens (4 at 7B)."""
        return self.window_size // self.patch_size // self.merge_size

    def __post_init__(self) -> None:
        _divides("vision_config.num_heads", self.num_heads, "hidden_size", self.hidden_size)
        bad = [i for i in self.full_attention_layers if not 0 <= i < self.num_layers]
        if bad:
            raise ConfigError(f"vision_config.fullatt_block_indexes names blocks {bad}, but depth is {self.num_layers}")


@dataclasses.dataclass(frozen=True)
class AudioConfig:
    """Audio tower (Whisper encoder on chunks of 2 * n_window frames)."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    output_size: int
    num_mel_bins: int = 128
    n_window: int = 100
    max_source_positions: int = 1500
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def chunk_frames(self) -> int:
        """Mel frames convolved and attended together (200)."""
        return 2 * self.n_window

    @property
    def chunk_tokens(self) -> int:
        """Tokens a full chunk yields: a stride-2 convolution, then pairs averaged (50)."""
        return self.chunk_frames // 4

    def __post_init__(self) -> None:
        _divides("audio_config.encoder_attention_heads", self.num_heads, "d_model", self.hidden_size)
        _divides("4", 4, "chunk of 2 * audio_config.n_window frames", self.chunk_frames)
        if self.n_window > self.max_source_positions:
            raise ConfigError(f"audio_config.n_window {self.n_window} exceeds max_source_positions {self.max_source_positions}")


@dataclasses.dataclass(frozen=True)
class BeatsConfig:
    """BEATs audio encoder. The defaults are those of the published AS2M checkpoint, which WAVE-7B uses."""

    num_layers: int = 12
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_heads: int = 12
    embed_dim: int = 512  # width of the patch embedding; no post_extract_proj where it equals hidden_size
    patch_size: int = 16  # fbank frames and bins
    conv_pos: int = 128  # kernel of the position convolution
    conv_pos_groups: int = 16
    num_buckets: int = 320
    max_distance: int = 800
    num_mel_bins: int = 128
    norm_eps: float = 1e-5
    conv_bias: bool = False  # bias of the patch embedding
    predictor_classes: int = 527  # carried classifier, 0 where the checkpoint has none

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def has_input_projection(self) -> bool:
        return self.embed_dim != self.hidden_size

    @property
    def frequency_patches(self) -> int:
        return self.num_mel_bins // self.patch_size

    @property
    def residual_scale(self) -> float:
        """Deep-norm factor on the residual branch, (2 * layers) ** (1/4)."""
        return math.pow(2.0 * self.num_layers, 0.25)

    def __post_init__(self) -> None:
        _divides("BEATs encoder_attention_heads", self.num_heads, "encoder_embed_dim", self.hidden_size)
        _divides("BEATs conv_pos_groups", self.conv_pos_groups, "encoder_embed_dim", self.hidden_size)

    @classmethod
    def from_pt_config(cls, cfg: Mapping[str, Any]) -> BeatsConfig:
        """Reads the `cfg` dict of a published BEATs `.pt` file.

        Raises:
          ConfigError: for the variants this port does not compute (no deep norm, ungated positions, other activations).
        """
        wanted = {
            "deep_norm": True,
            "gru_rel_pos": True,
            "relative_position_embedding": True,
            "layer_norm_first": False,
            "activation_fn": "gelu",
        }
        for key, value in wanted.items():
            if cfg.get(key, value) != value:
                raise ConfigError(f"BEATs cfg: {key}={cfg[key]!r} is not supported, only {value!r}")
        return cls(
            num_layers=int(cfg["encoder_layers"]),
            hidden_size=int(cfg["encoder_embed_dim"]),
            intermediate_size=int(cfg["encoder_ffn_embed_dim"]),
            num_heads=int(cfg["encoder_attention_heads"]),
            embed_dim=int(cfg["embed_dim"]),
            patch_size=int(cfg["input_patch_size"]),
            conv_pos=int(cfg["conv_pos"]),
            conv_pos_groups=int(cfg["conv_pos_groups"]),
            num_buckets=int(cfg["num_buckets"]),
            max_distance=int(cfg["max_distance"]),
            conv_bias=bool(cfg.get("conv_bias", False)),
            predictor_classes=int(cfg.get("predictor_class", 0)) if cfg.get("finetuned_model") else 0,
        )


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """A PEFT LoRA adapter, plus modules saved whole.

    `targets` are the linear maps with an adapter, as paths of the parameter tree ("decoder/layers/attn/q" stands for all layers).
    """

    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    dropout: float = 0.05
    targets: tuple[str, ...] = ("decoder/layers/attn/q", "decoder/layers/attn/k", "decoder/layers/attn/v")
    modules_to_save: tuple[str, ...] = ("classify_linear", "beats_ln", "beats_proj")

    @property
    def scale(self) -> float:
        """Factor on B A x: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Vocabulary indices of the control tokens, as in the checkpoint's `config.json` (im_end is looked up in its tokenizer)."""

    pad: int
    audio: int
    audio_bos: int
    audio_eos: int
    video: int
    vision_bos: int
    vision_eos: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything needed to build one encoder."""

    decoder: DecoderConfig
    vision: VisionConfig
    audio: AudioConfig
    beats: BeatsConfig
    tokens: SpecialTokens
    lora: LoraConfig | None = None
    positions_per_second: int = 25
    seconds_per_chunk: int = 2

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], beats: BeatsConfig, lora: LoraConfig | None = None) -> ModelConfig:
        """Reads a WAVE `config.json` (already parsed).

        Raises:
          ConfigError: naming the missing or unsupported field.
        """
        try:
            return cls._from_hf(config, beats, lora)
        except KeyError as e:
            raise ConfigError(f"config.json: field {e.args[0]!r} is missing; is this a WAVE-7B checkpoint folder?") from None

    @classmethod
    def _from_hf(cls, config: Mapping[str, Any], beats: BeatsConfig, lora: LoraConfig | None) -> ModelConfig:
        if config.get("classify_type", "all_layer") != "all_layer":
            raise ConfigError(f"config.json: classify_type {config['classify_type']!r} is not supported, only 'all_layer'")
        text, vision, audio = config["text_config"], config["vision_config"], config["audio_config"]
        for section, key, value in ((text, "hidden_act", "silu"), (vision, "hidden_act", "silu"), (audio, "activation_function", "gelu")):
            if section.get(key, value) != value:
                raise ConfigError(f"config.json: {key} {section[key]!r} is not supported, only {value!r}")
        width = text["hidden_size"]
        for name, value in (("vision_config.out_hidden_size", vision["out_hidden_size"]), ("audio_config.output_dim", audio["output_dim"])):
            if value != width:
                raise ConfigError(f"config.json: {name} is {value}, but text_config.hidden_size is {width}; they must agree")
        rope = text.get("rope_scaling") or text["rope_parameters"]
        if odd := {rope.get("type"), rope.get("rope_type")} - {None, "default", "mrope"}:
            raise ConfigError(f"config.json: text_config.rope_scaling type {odd.pop()!r} is not supported, only 'default' and 'mrope'")
        return cls(
            decoder=DecoderConfig(
                hidden_size=width,
                intermediate_size=text["intermediate_size"],
                num_layers=text["num_hidden_layers"],
                num_heads=text["num_attention_heads"],
                num_kv_heads=text["num_key_value_heads"],
                vocab_size=text["vocab_size"],
                rms_norm_eps=text["rms_norm_eps"],
                rope_theta=text.get("rope_theta") or rope["rope_theta"],
                mrope_sections=tuple(rope["mrope_section"]),
                max_positions=text.get("max_position_embeddings", 32768),
            ),
            vision=VisionConfig(
                hidden_size=vision["hidden_size"],
                intermediate_size=vision["intermediate_size"],
                num_layers=vision["depth"],
                num_heads=vision["num_heads"],
                output_size=vision["out_hidden_size"],
                full_attention_layers=tuple(vision["fullatt_block_indexes"]),
                window_size=vision["window_size"],
                patch_size=vision["patch_size"],
                temporal_patch_size=vision["temporal_patch_size"],
                merge_size=vision["spatial_merge_size"],
                in_channels=vision.get("in_channels", vision.get("in_chans", 3)),
            ),
            audio=AudioConfig(
                hidden_size=audio["d_model"],
                intermediate_size=audio["encoder_ffn_dim"],
                num_layers=audio["encoder_layers"],
                num_heads=audio["encoder_attention_heads"],
                output_size=audio["output_dim"],
                num_mel_bins=audio["num_mel_bins"],
                n_window=audio["n_window"],
                max_source_positions=audio["max_source_positions"],
            ),
            beats=beats,
            tokens=SpecialTokens(
                pad=config["pad_token_id"],
                audio=config["audio_token_index"],
                audio_bos=config["audio_start_token_id"],
                audio_eos=config["audio_end_token_id"],
                video=config["video_token_index"],
                vision_bos=config["vision_start_token_id"],
                vision_eos=config["vision_end_token_id"],
            ),
            lora=lora,
            positions_per_second=config["position_id_per_seconds"],
            seconds_per_chunk=config["seconds_per_chunk"],
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict that `from_json` reads back to an equal record."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ModelConfig:
        rooms = {
            "decoder": DecoderConfig,
            "vision": VisionConfig,
            "audio": AudioConfig,
            "beats": BeatsConfig,
            "tokens": SpecialTokens,
            "lora": LoraConfig,
        }
        fields = dict(value)
        for name, kind in rooms.items():
            if fields.get(name) is not None:
                fields[name] = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields[name].items()})
        return cls(**fields)


def _divides(name: str, divisor: int, of_name: str, value: int) -> None:
    if divisor <= 0 or value % divisor:
        raise ConfigError(f"{name} ({divisor}) must divide {of_name} ({value})")


# ------------------------------------------------------------------------------------------------------------------ presets

TABLES = ("text", "video", "audio", "av", "tv", "at", "tva")
"""Embedding tables by name, in the order they are written."""

TABLE_MODALITIES = {
    "text": frozenset("t"),
    "video": frozenset("v"),
    "audio": frozenset("a"),
    "av": frozenset("va"),
    "tv": frozenset("tv"),
    "at": frozenset("ta"),
    "tva": frozenset("tva"),
}
"""Modalities (t, v, a) each table's prompt contains."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """How clips and captions become model inputs.

    Attributes:
      text_head: "last" pools text alone from the last layer, without the fusion head; "fused" sends it through the fusion head.
      end_token: whether a prompt ends with `<|im_end|>`.
      filler: text that stands where a prompt has media and no caption; "" for none.
      audio_crop: "first" or "center": which part of a longer track is kept.
      audio_seconds: length kept, seconds; 0 keeps the whole track.
      audio_pad: whether a shorter track is zero-padded to `audio_seconds`.
      channels: "first" or "mean": how several audio channels become one.
      frames: frames sampled per clip; even.
      frame_crop: "none" or "square" (centre).
      pixels: minimum and maximum area of a resized frame, pixels.
      max_text_tokens: a longer caption is cut, and counted.
    """

    text_head: str = "last"
    end_token: bool = True
    filler: str = "Please describe the video."
    audio_crop: str = "first"
    audio_seconds: float = 8.0
    audio_pad: bool = True
    channels: str = "first"
    frames: int = 8
    frame_crop: str = "none"
    pixels: int = 50176
    max_text_tokens: int = 512

    def __post_init__(self) -> None:
        choices = {
            "text_head": ("last", "fused"),
            "audio_crop": ("first", "center"),
            "channels": ("first", "mean"),
            "frame_crop": ("none", "square"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"preset field {name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        if self.frames < 2 or self.frames % 2:
            raise ConfigError(f"preset field frames={self.frames}: must be even and at least 2 (frames are embedded in pairs)")
        if self.pixels < 28 * 28:
            raise ConfigError(f"preset field pixels={self.pixels}: must be at least 784 (28 x 28)")
        if not (math.isfinite(self.audio_seconds) and self.audio_seconds >= 0):
            raise ConfigError(f"preset field audio_seconds={self.audio_seconds}: must be 0 (the whole track) or positive")
        if self.max_text_tokens < 1:
            raise ConfigError(f"preset field max_text_tokens={self.max_text_tokens}: must be at least 1")

    def override(self, assignments: list[str]) -> Preset:
        """Returns a copy with `field=value` strings applied, each value read as the field's own type.

        Raises:
          ConfigError: for an unknown field or a value of the wrong type.
        """
        changes: dict[str, Any] = {}
        types = {f.name: type(getattr(self, f.name)) for f in dataclasses.fields(self)}
        for text in assignments:
            name, sep, value = text.partition("=")
            if not sep or name not in types:
                raise ConfigError(f"--set {text}: write field=value with one of {', '.join(types)}")
            try:
                changes[name] = _parse(value, types[name])
            except ValueError:
                raise ConfigError(f"--set {text}: {name} takes a value like {getattr(self, name)!r}") from None
        return dataclasses.replace(self, **changes)


def _parse(value: str, kind: type) -> Any:
    if kind is bool:
        if value.lower() not in ("true", "false", "1", "0"):
            raise ValueError(value)
        return value.lower() in ("true", "1")
    return kind(value)


PRESETS: dict[str, Preset] = {
    # As the model was trained; golden data and published numbers are reproduced with it.
    "training": Preset(),
    # The published inference code (its undoubled audio tokens cannot run with BEATs, so doubling stays on).
    "release": Preset(
        text_head="fused", end_token=False, filler="", audio_crop="center", channels="mean", frame_crop="square", pixels=336 * 336
    ),
    # The wrapper of the MTEB benchmark.
    "mteb": Preset(text_head="fused", audio_seconds=300.0, audio_pad=False, channels="mean"),
}


def preset(name: str) -> Preset:
    """Returns a preset by name; raises ConfigError naming the known ones."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
