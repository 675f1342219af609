"""Architecture and preset records: `ModelConfig` describes a checkpoint, `Preset` how clips and captions become tokens."""

from omni_jax.config.backbones import BACKBONES
from omni_jax.config.components import AudioConfig, BeatsConfig, DecoderConfig, LoraConfig, SpecialTokens, VisionConfig
from omni_jax.config.errors import ConfigError
from omni_jax.config.model import EMBED_MODEL_TYPE, EMBED_STYLE, WAVE_STYLE, ModelConfig
from omni_jax.config.presets import (
    PREFIXES,
    PRESETS,
    TABLE_MODALITIES,
    TABLES,
    Preset,
    default_preset,
    mteb_preset,
    preset,
    preset_key,
    presets_for,
)
