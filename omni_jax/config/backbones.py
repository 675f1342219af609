"""The published backbones as records, for compiling, counting and testing without their weights. Source: SPEC sections 1 and 10."""

from __future__ import annotations

import dataclasses

from omni_jax.config.components import AudioConfig, BeatsConfig, DecoderConfig, LoraConfig, SpecialTokens, VisionConfig
from omni_jax.config.model import EMBED_STYLE, ModelConfig


def _omni(decoder: DecoderConfig, beats: BeatsConfig | None) -> ModelConfig:
    """A backbone with the towers of Qwen2.5-Omni, which differ from size to size in their output alone."""
    width = decoder.hidden_size
    return ModelConfig(
        decoder=decoder,
        vision=VisionConfig(
            hidden_size=1280,
            intermediate_size=3420,
            num_layers=32,
            num_heads=16,
            output_size=width,
            full_attention_layers=(7, 15, 23, 31),
        ),
        audio=AudioConfig(hidden_size=1280, intermediate_size=5120, num_layers=32, num_heads=20, output_size=width),
        beats=beats,
        tokens=SpecialTokens(
            pad=151643, audio=151646, audio_bos=151647, audio_eos=151648, video=151656, vision_bos=151652, vision_eos=151653
        ),
    )


_DECODER_7B = DecoderConfig(hidden_size=3584, intermediate_size=18944, num_layers=28, num_heads=28, num_kv_heads=4, vocab_size=152064)
_DECODER_3B = DecoderConfig(hidden_size=2048, intermediate_size=11008, num_layers=36, num_heads=16, num_kv_heads=2, vocab_size=151936)

BACKBONES: dict[str, ModelConfig] = {
    "wave_7b": _omni(_DECODER_7B, BeatsConfig()),
    "qwen2_5_omni_7b": _omni(_DECODER_7B, None),  # the plain thinker, whose fusion head is none of its own
    "qwen2_5_omni_3b": _omni(_DECODER_3B, None),
    "omni_embed_nemotron_3b": dataclasses.replace(_omni(_DECODER_3B, None), **EMBED_STYLE),
}

WAVE_7B = dataclasses.replace(BACKBONES["wave_7b"], lora=LoraConfig())
"""With the adapter of OmniRetriever-7B."""
