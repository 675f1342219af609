"""Architecture and preset records: `ModelConfig` describes a checkpoint, `Preset` how clips and captions become tokens."""

from omni_jax.config.errors import ConfigError
from omni_jax.config.model import ModelConfig
from omni_jax.config.parts import AudioConfig, BeatsConfig, DecoderConfig, LoraConfig, SpecialTokens, VisionConfig
from omni_jax.config.presets import PRESETS, TABLE_MODALITIES, TABLES, Preset, preset

__all__ = [
    "PRESETS",
    "TABLES",
    "TABLE_MODALITIES",
    "AudioConfig",
    "BeatsConfig",
    "ConfigError",
    "DecoderConfig",
    "LoraConfig",
    "ModelConfig",
    "Preset",
    "SpecialTokens",
    "VisionConfig",
    "preset",
]
