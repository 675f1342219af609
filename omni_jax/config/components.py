"""Architecture of the parts of a model: decoder, towers, adapter, control tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from omni_jax.config.errors import ConfigError, check_divides
from omni_jax.config.hf_fields import BEATS_NAMES, check_beats_fields


class _Heads:
    """A width that is split into heads."""

    hidden_size: int
    num_heads: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclasses.dataclass(frozen=True)
class DecoderConfig(_Heads):
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

    def __post_init__(self) -> None:
        check_divides("text_config.num_attention_heads", self.num_heads, "hidden_size", self.hidden_size)
        check_divides("text_config.num_key_value_heads", self.num_kv_heads, "num_attention_heads", self.num_heads)
        if 2 * sum(self.mrope_sections) != self.head_dim:
            raise ConfigError(
                f"text_config.rope_scaling.mrope_section {self.mrope_sections} must sum to half the head width ({self.head_dim // 2})"
            )


@dataclasses.dataclass(frozen=True)
class VisionConfig(_Heads):
    """Vision tower (Qwen2.5-VL: window attention, full attention in a few blocks)."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    output_size: int
    full_attention_layers: tuple[int, ...]
    window_size: int = 112  # pixels

    patch_size: ClassVar[int] = 14  # pixels
    temporal_patch_size: ClassVar[int] = 2  # frames
    merge_size: ClassVar[int] = 2  # patches per side joined into one token
    in_channels: ClassVar[int] = 3
    norm_eps: ClassVar[float] = 1e-6
    rope_theta: ClassVar[float] = 1e4

    @property
    def patch_values(self) -> int:
        """Length of one flattened patch row (1176 at 7B)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_tokens(self) -> int:
        """Side of an attention window in merged tokens (4 at 7B)."""
        return self.window_size // self.patch_size // self.merge_size

    def __post_init__(self) -> None:
        check_divides("vision_config.num_heads", self.num_heads, "hidden_size", self.hidden_size)
        bad = [i for i in self.full_attention_layers if not 0 <= i < self.num_layers]
        if bad:
            raise ConfigError(f"vision_config.fullatt_block_indexes names blocks {bad}, but depth is {self.num_layers}")


@dataclasses.dataclass(frozen=True)
class AudioConfig(_Heads):
    """Audio tower (Whisper encoder on chunks of 2 * n_window frames)."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    output_size: int
    n_window: int = 100
    max_source_positions: int = 1500

    num_mel_bins: ClassVar[int] = 128
    norm_eps: ClassVar[float] = 1e-5

    @property
    def chunk_frames(self) -> int:
        """Mel frames convolved and attended together (200)."""
        return 2 * self.n_window

    @property
    def chunk_tokens(self) -> int:
        """Tokens a full chunk yields: a stride-2 convolution, then pairs averaged (50)."""
        return self.chunk_frames // 4

    def __post_init__(self) -> None:
        check_divides("audio_config.encoder_attention_heads", self.num_heads, "d_model", self.hidden_size)
        check_divides("4", 4, "chunk of 2 * audio_config.n_window frames", self.chunk_frames)
        if self.n_window > self.max_source_positions:
            raise ConfigError(f"audio_config.n_window {self.n_window} exceeds max_source_positions {self.max_source_positions}")


@dataclasses.dataclass(frozen=True)
class BeatsConfig(_Heads):
    """BEATs audio encoder. The defaults are those of the published AS2M checkpoint, which WAVE-7B uses."""

    num_layers: int = 12
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_heads: int = 12
    embed_dim: int = 512  # width of the patch embedding; no post_extract_proj where it equals hidden_size
    conv_pos: int = 128  # kernel of the position convolution
    conv_pos_groups: int = 16
    num_buckets: int = 320
    max_distance: int = 800
    conv_bias: bool = False  # bias of the patch embedding
    predictor_classes: int = 527  # carried classifier, 0 where the checkpoint has none

    patch_size: ClassVar[int] = 16  # fbank frames and bins
    num_mel_bins: ClassVar[int] = 128
    norm_eps: ClassVar[float] = 1e-5

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
        check_divides("BEATs encoder_attention_heads", self.num_heads, "encoder_embed_dim", self.hidden_size)
        check_divides("BEATs conv_pos_groups", self.conv_pos_groups, "encoder_embed_dim", self.hidden_size)

    @classmethod
    def from_pt_config(cls, cfg: Mapping[str, Any]) -> BeatsConfig:
        """Reads the `cfg` dict of a published BEATs `.pt` file.

        Raises:
          ConfigError: for the variants this port does not compute (no deep norm, ungated positions, other activations).
        """
        check_beats_fields(cfg)
        numbers = {ours: cfg[theirs] for ours, theirs in BEATS_NAMES.items()}
        numbers["predictor_classes"] = (cfg.get("predictor_class") or 0) if cfg.get("finetuned_model") else 0
        for ours, value in numbers.items():
            if type(value) is not int:
                raise ConfigError(f"BEATs cfg: {BEATS_NAMES.get(ours, 'predictor_class')} is {value!r}, expected a whole number")
        return cls(**numbers, conv_bias=bool(cfg.get("conv_bias", False)))


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """A PEFT LoRA adapter, plus modules saved whole.

    Attributes:
      rank: inner dimension of the two matrices.
      alpha: scale; the update is multiplied by alpha / rank.
      rslora: multiply by alpha / sqrt(rank) instead.
      dropout: rate on the input of the update while training.
      targets: linear maps with an adapter, as paths of the parameter tree ("decoder/layers/attn/q" stands for all layers).
      modules_to_save: modules that train in full and are saved with the adapter, by their names in PEFT.
    """

    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    dropout: float = 0.05
    targets: tuple[str, ...] = ("decoder/layers/attn/q", "decoder/layers/attn/k", "decoder/layers/attn/v")
    modules_to_save: tuple[str, ...] = ("classify_linear", "beats_ln", "beats_proj")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora rank {self.rank}: must be 1 or more; without an adapter, omit lora")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora dropout {self.dropout}: must be at least 0 and below 1")
        if not math.isfinite(self.alpha):
            raise ConfigError(f"lora alpha {self.alpha}: must be a finite number")

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


CONTROL_TOKENS = {
    "pad": "<|endoftext|>",
    "audio": "<|AUDIO|>",
    "audio_bos": "<|audio_bos|>",
    "audio_eos": "<|audio_eos|>",
    "video": "<|VIDEO|>",
    "vision_bos": "<|vision_bos|>",
    "vision_eos": "<|vision_eos|>",
}
"""Field of `SpecialTokens` -> the token's string in the tokenizer."""


def constants(kind: type) -> dict[str, Any]:
    """Returns what is the same in every model of a kind: name -> value. Preprocessing and tower are made for these values alone."""
    return {name: getattr(kind, name) for name, hint in kind.__annotations__.items() if hint.startswith("ClassVar")}
