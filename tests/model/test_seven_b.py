"""The published size as shapes without storage: counts of every part, in seconds and without memory."""

from __future__ import annotations

import math

from omni_jax.conversion.engine import tree_shapes
from tests.golden_set import manifest_7b
from tests.model import builders

# Part of our tree -> names in the published checkpoint.
PARTS = {
    "decoder": ("model.",),
    "vision": ("visual.",),
    "audio": ("audio_tower.",),
    "beats": ("beats.",),
    "bridge": ("beats_ln.", "beats_proj."),
    "head": ("classify_linear.",),
    "lm_head": ("lm_head.",),
}
LORA = 6_881_280
SHARED_TABLES = 11 * 320 * 12  # BEATs layers 1..11 share the table of layer 0


def counts() -> dict[str, int]:
    """Values of each part; those of the adapter apart."""
    found: dict[str, int] = {}
    for path, shape in tree_shapes(builders.SEVEN_B).items():
        part = "lora" if path[-1].startswith("lora_") else path[0]
        found[part] = found.get(part, 0) + math.prod(shape)
    return found


def test_published_counts():
    """SPEC section 1: the base, its adapter, and what the adapter trains."""
    found = counts()
    assert found["lora"] == LORA
    assert sum(found.values()) == 9_410_693_247 - SHARED_TABLES + LORA == 9_417_532_287
    assert found["lora"] + found["head"] + found["bridge"] == 395_001_344


def test_golden_manifest_counts_of_every_part():
    found = counts()
    published = manifest_7b("wave7b")
    for part, prefixes in PARTS.items():
        want = sum(math.prod(shape) for name, shape in published.items() if name.startswith(prefixes))
        assert found[part] == want - (SHARED_TABLES if part == "beats" else 0), part
    assert set(found) == {*PARTS, "lora"}


def test_golden_manifest_counts_of_the_adapter():
    assert sum(math.prod(shape) for shape in manifest_7b("adapter7b").values()) == 395_001_344
