"""Decoded clips to model-ready arrays: patches, log-mel, filter banks. NumPy only."""

from omni_jax.features.audio import audio_segments, audio_tokens, kaldi_fbank, log_mel
from omni_jax.features.vision import smart_resize, vision_features

__all__ = ["audio_segments", "audio_tokens", "kaldi_fbank", "log_mel", "smart_resize", "vision_features"]
