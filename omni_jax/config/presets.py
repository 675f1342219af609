"""Presets: how clips and captions become model inputs, and the embedding tables they are made into."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from omni_jax.config.errors import ConfigError

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


PREFIXES = ("passage", "query")
"""What a caption may be for a backbone trained with prefixes: something to be found, or something to find with."""


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
      prefix: "passage" or "query": what stands before a caption ("passage: ") where its record names nothing else; "" for nothing. Only
        for backbones whose prompts follow the chat template.
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
    prefix: str = ""

    def __post_init__(self) -> None:
        choices = {
            "text_head": ("last", "fused"),
            "audio_crop": ("first", "center"),
            "channels": ("first", "mean"),
            "frame_crop": ("none", "square"),
            "prefix": ("", *PREFIXES),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"preset field {name}={getattr(self, name)!r}: choose one of {', '.join(filter(None, allowed))}")
        if self.frames < 2 or self.frames % 2:
            raise ConfigError(f"preset field frames={self.frames}: must be even and at least 2 (frames are embedded in pairs)")
        if self.pixels < 28 * 28:
            raise ConfigError(f"preset field pixels={self.pixels}: must be at least 784 (28 x 28)")
        if not (math.isfinite(self.audio_seconds) and self.audio_seconds >= 0):
            raise ConfigError(f"preset field audio_seconds={self.audio_seconds}: must be 0 (the whole track) or positive")
        if self.max_text_tokens < 1:
            raise ConfigError(f"preset field max_text_tokens={self.max_text_tokens}: must be at least 1")

    def check(self, prompt: str) -> None:
        """Raises ConfigError for a prefix where the backbone's prompts ("plain" or "chat", `ModelConfig.prompt`) take none."""
        if self.prefix and prompt == "plain":
            names = ", ".join(presets_for(prompt))
            raise ConfigError(
                f"preset field prefix={self.prefix!r}: this backbone takes no prefix; leave it away, or use a preset of {names}"
            )

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
    # Omni-Embed-Nemotron-3B: the whole track, no filler, captions as passages.
    "nemotron": Preset(filler="", audio_seconds=0.0, audio_pad=False, prefix="passage"),
}


def preset(name: str) -> Preset:
    """Returns a preset by name; raises ConfigError naming the known ones."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def presets_for(prompt: str) -> dict[str, Preset]:
    """Returns the presets of a backbone whose prompts are of this kind ("plain" or "chat", `ModelConfig.prompt`), its own first."""
    return {name: found for name, found in PRESETS.items() if bool(found.prefix) == (prompt == "chat")}


def default_preset(prompt: str) -> Preset:
    """Returns the preset that a backbone was trained with."""
    return next(iter(presets_for(prompt).values()))
