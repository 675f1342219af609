"""`ModelConfig`: everything needed to build one encoder, read from a checkpoint's `config.json` or from a converted folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from omni_jax.config.components import AudioConfig, BeatsConfig, DecoderConfig, LoraConfig, SpecialTokens, VisionConfig, constants
from omni_jax.config.errors import ConfigError, check_choices
from omni_jax.config.hf_fields import NAMES, check_fields, rope_of, thinker_config, token_ids

ATTENTIONS = ("causal", "bidirectional")
POOLINGS = ("last_all_layers", "mean")
PROMPTS = ("plain", "chat")
WEIGHTS = ("float", "int8", "int8-dynamic")

PARTS = {
    "decoder": DecoderConfig,
    "vision": VisionConfig,
    "audio": AudioConfig,
    "beats": BeatsConfig,
    "tokens": SpecialTokens,
    "lora": LoraConfig,
}
"""Field of `ModelConfig` -> the record that it is."""

EMBED_MODEL_TYPE = "nvomniembed"
"""`model_type` of Omni-Embed-Nemotron-3B."""

EMBED_STYLE: Mapping[str, Any] = {"attention": "bidirectional", "pooling": "mean", "prompt": "chat"}
"""How Omni-Embed-Nemotron-3B turns a Qwen2.5-Omni thinker into an embedder (SPEC section 10)."""

WAVE_STYLE: Mapping[str, Any] = {"attention": "causal", "pooling": "last_all_layers", "prompt": "plain"}
"""How WAVE-7B does (SPEC sections 3 and 5)."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything needed to build one encoder.

    Attributes:
      beats: None for a backbone without BEATs; then no audio token is doubled and there is no bridge.
      attention: "causal", or "bidirectional": every token of a prompt sees all of them.
      pooling: "last_all_layers": the last token's states of all layers through the fusion head; "mean": the mean of the final norm's states
        over all tokens of the prompt, no head.
      prompt: "plain": media, text, end token; "chat": the same as the user's turn of the chat template, after a system turn.
      weights: how the matrices of linear maps are held: "float"; "int8" with a float32 scale for each output; "int8-dynamic": as int8, and
        their inputs are rounded to int8 too, token by token.
      kept: linear maps that stay "float" all the same, since they train ("head/fc1").
    """

    decoder: DecoderConfig
    vision: VisionConfig
    audio: AudioConfig
    beats: BeatsConfig | None
    tokens: SpecialTokens
    lora: LoraConfig | None = None
    positions_per_second: int = 25
    seconds_per_chunk: int = 2
    attention: str = "causal"
    pooling: str = "last_all_layers"
    prompt: str = "plain"
    weights: str = "float"
    kept: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choices(self, "model field ", attention=ATTENTIONS, pooling=POOLINGS, prompt=PROMPTS, weights=WEIGHTS)

    def with_weights(self, weights: str, kept: tuple[str, ...] = ()) -> ModelConfig:
        """Returns the same architecture with its matrices held otherwise."""
        return dataclasses.replace(self, weights=weights, kept=kept)

    @property
    def audio_repeat(self) -> int:
        """Prompt tokens for each token of the audio tower: Whisper's and BEATs' in turn, or Whisper's alone."""
        return 1 if self.beats is None else 2

    @property
    def has_head(self) -> bool:
        """Whether pooled states go through the fusion head."""
        return self.pooling == "last_all_layers"

    @property
    def shares_prefix(self) -> bool:
        """Whether prompts that start with the same media may share its tokens: only where media do not see what follows them."""
        return self.attention == "causal"

    def check_share_prefix(self, share_prefix: bool) -> None:
        """Raises ConfigError where prefixes are to be shared and cannot be."""
        if share_prefix and not self.shares_prefix:
            raise ConfigError(
                f"share_prefix: this backbone's attention is {self.attention}, not causal: the states of a media prefix depend on the text "
                f"behind it, so that two prompts cannot share them; pass share_prefix=False"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], beats: BeatsConfig | None) -> ModelConfig:
        """Reads the `config.json` (already parsed) of a WAVE checkpoint, of Omni-Embed-Nemotron, or of a Qwen2.5-Omni thinker.

        Args:
          beats: None where the checkpoint has no BEATs.

        Raises:
          ConfigError: naming the missing or unsupported field.
        """
        try:
            return cls._from_hf(config, beats)
        except KeyError as e:
            raise ConfigError(
                f"config.json: field {e.args[0]!r} is missing; is this a WAVE-7B or Qwen2.5-Omni checkpoint folder?"
            ) from None

    @classmethod
    def _from_hf(cls, config: Mapping[str, Any], beats: BeatsConfig | None) -> ModelConfig:
        config = thinker_config(config)
        check_fields(config)
        text, vision, audio = config["text_config"], config["vision_config"], config["audio_config"]
        width = text["hidden_size"]
        for name, value in (("vision_config.out_hidden_size", vision["out_hidden_size"]), ("audio_config.output_dim", audio["output_dim"])):
            if value != width:
                raise ConfigError(f"config.json: {name} is {value}, but text_config.hidden_size is {width}; they must agree")
        rope = vision.get("rope_parameters") or {}
        if rope.get("rope_theta", VisionConfig.rope_theta) != VisionConfig.rope_theta:
            raise ConfigError(f"config.json: vision_config.rope_parameters.rope_theta {rope['rope_theta']!r} is not supported")
        theta, sections = rope_of(text)
        return cls(
            decoder=DecoderConfig(**_read(text, "text_config"), rope_theta=theta, mrope_sections=sections),
            vision=VisionConfig(**_read(vision, "vision_config")),
            audio=AudioConfig(**_read(audio, "audio_config")),
            beats=beats,
            tokens=SpecialTokens(**token_ids(config)),
            positions_per_second=config["position_id_per_seconds"],
            seconds_per_chunk=config["seconds_per_chunk"],
            **(EMBED_STYLE if config.get("model_type") == EMBED_MODEL_TYPE else {}),
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict that `from_json` reads back to an equal record; it holds the constants of the parts, too."""
        value = dataclasses.asdict(self)
        return value | {name: value[name] | constants(kind) for name, kind in PARTS.items() if value[name] is not None}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ModelConfig:
        """Reads what `to_json` gives. Raises ConfigError for a part that is not made for its constants."""
        fields: dict[str, Any] = {name: tuple(field) if isinstance(field, list) else field for name, field in value.items()}
        for name, kind in PARTS.items():
            if fields.get(name) is None:
                continue
            part = {k: tuple(v) if isinstance(v, list) else v for k, v in fields[name].items()}
            for constant, only in constants(kind).items():
                if (found := part.pop(constant, only)) != only:
                    raise ConfigError(
                        f"the model's {name}.{constant} is {found}, must be {only}: the preprocessing is fixed at 14/2/2/16 "
                        f"(patch, merge, temporal patch, fbank patch); use a WAVE-7B or Qwen2.5-Omni checkpoint"
                    )
            fields[name] = kind(**part)
        return cls(**fields)


def _read(section: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns the fields of a section under our names. Raises KeyError for one that is missing, but for the longest prompt."""
    found = {ours: section[theirs] for ours, theirs in NAMES[name].items() if ours != "max_positions" or theirs in section}
    return {ours: tuple(value) if isinstance(value, list) else value for ours, value in found.items()}
