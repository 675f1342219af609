"""Resident memory of embedding with a model of 0.5 GB in bfloat16, and with its matrices in int8.

Run alone: python -m tools.benchmarks.embed_memory
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CAPTIONS = ("a red ball", "rain on a tin roof", "two dogs bark", "a whistle over a gradient sky")
WIDTH, INNER = 1536, 8960

# Anonymous pages alone: what is mapped from files (libraries, a store) is the system's to drop.
_CHILD = """
import json, sys
import jax.numpy as jnp
import omni_jax, omni_jax.model
jnp.zeros(1).block_until_ready()
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return {key: int(line.split()[1]) * 1024 for line in lines for key in ("RssAnon", "VmHWM") if line.startswith(key + ":")}
before = resident()["RssAnon"]
model = omni_jax.OmniRetriever.from_pretrained(sys.argv[1], dtype="bfloat16", weights=sys.argv[2])
loaded = resident()["RssAnon"] - before
model.encode(texts=sys.argv[3:])
after = resident()
print(json.dumps({"loaded": loaded, "embedding": after["RssAnon"] - before, "peak": after["VmHWM"]}))
"""


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


def measure(folder: Path, weights: str) -> dict[str, int]:
    """Loads and embeds in a process of its own; returns bytes resident after loading and after embedding, and the peak of all pages."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "OMNI_JAX_CACHE": "off"}
    command = [sys.executable, "-c", _CHILD, str(folder), weights, *CAPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"embedding ended with status {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(layers: int = 5) -> dict[str, dict[str, int]]:
    """Returns weights -> {loaded, embedding, peak} in bytes, and prints a line for each kind and their ratio."""
    from omni_jax.conversion.fresh import write_fresh

    scratch = Path(tempfile.mkdtemp(prefix="omni_jax-embed-"))
    try:
        made = write_fresh(scratch / "model", architecture(layers), captions=CAPTIONS)
        found = {weights: measure(scratch / "model", weights) for weights in ("keep", "int8")}
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
