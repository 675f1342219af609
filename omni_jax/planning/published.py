"""The published architecture, for planning where no converted folder is at hand. Source: SPEC section 1."""

from __future__ import annotations

import dataclasses

from omni_jax.config import BACKBONES, LoraConfig

WAVE_7B = dataclasses.replace(BACKBONES["wave_7b"], lora=LoraConfig())
