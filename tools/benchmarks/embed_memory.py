"""Resident memory of embedding with a model of 0.5 GB in bfloat16, and with its matrices in int8.

Run alone: python -m tools.benchmarks.embed_memory
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from tools.benchmarks.process_memory import alone, status

CAPTIONS = ("a red ball", "rain on a tin roof", "two dogs bark", "a whistle over a gradient sky")
WIDTH, INNER = 1536, 8960


def architecture(layers: int) -> dict:
    """Returns small towers and a decoder of this depth with the matrices of a model of 1.5 billion parameters."""
    tower = {"hidden_size": 128, "intermediate_size": 256, "num_layers": 1, "num_heads": 2}
    return {
        "decoder": {
            "hidden_size": WIDTH,
            "intermediate_size": INNER,
            "num_layers": layers,
            "num_heads": 12,
            "num_kv_heads": 2,
            "mrope_sections": (16, 24, 24),
        },
        "vision": {**tower, "full_attention_layers": (0,)},
        "audio": tower,
        "beats": None,
    }


def measured(folder: str, weights: str) -> dict[str, int]:
    """Loads and embeds; returns bytes resident after loading and after embedding, and the peak of all pages.

    The former two are anonymous pages alone: what is mapped from files (libraries, a store) is the system's to drop.
    """
    import jax.numpy as jnp

    import omni_jax.model  # what is there before a model is loaded does not count

    jnp.zeros(1).block_until_ready()
    before = status("RssAnon")
    model = omni_jax.OmniRetriever.from_pretrained(folder, dtype="bfloat16", weights=weights)
    loaded = status("RssAnon") - before
    model.encode(texts=CAPTIONS)
    return {"loaded": loaded, "embedding": status("RssAnon") - before, "peak": status("VmHWM")}


def run(layers: int = 5) -> dict[str, dict[str, int]]:
    """Returns weights -> {loaded, embedding, peak} in bytes, and prints a line for each kind and their ratio."""
    from omni_jax.conversion.fresh import write_fresh

    scratch = Path(tempfile.mkdtemp(prefix="omni_jax-embed-"))
    try:
        made = write_fresh(scratch / "model", architecture(layers), captions=CAPTIONS)
        found = {weights: alone("embed_memory.measured", str(scratch / "model"), weights) for weights in ("keep", "int8")}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for weights, at in found.items():
        sizes = ", ".join(f"{what} {size / 1e6:.0f} MB" for what, size in at.items())
        print(f"{'bfloat16' if weights == 'keep' else weights}: {sizes}")
    ratio = found["int8"]["loaded"] / found["keep"]["loaded"]
    print(f"{2 * made.parameters / 1e9:.2f} GB of bfloat16 weights: int8 takes {ratio:.2f} of their memory")
    return found


if __name__ == "__main__":
    run()
