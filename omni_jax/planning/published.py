"""The published architecture, for planning where no converted folder is at hand. Source: SPEC section 1."""

from __future__ import annotations

from omni_jax.config import AudioConfig, BeatsConfig, DecoderConfig, LoraConfig, ModelConfig, SpecialTokens, VisionConfig

WAVE_7B = ModelConfig(
    decoder=DecoderConfig(hidden_size=3584, intermediate_size=18944, num_layers=28, num_heads=28, num_kv_heads=4, vocab_size=152064),
    vision=VisionConfig(
        hidden_size=1280, intermediate_size=3420, num_layers=32, num_heads=16, output_size=3584, full_attention_layers=(7, 15, 23, 31)
    ),
    audio=AudioConfig(hidden_size=1280, intermediate_size=5120, num_layers=32, num_heads=20, output_size=3584),
    beats=BeatsConfig(),
    tokens=SpecialTokens(pad=151643, audio=151646, audio_bos=151647, audio_eos=151648, video=151656, vision_bos=151652, vision_eos=151653),
    lora=LoraConfig(),
)
