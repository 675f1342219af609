"""The first part of `omni-jax demo`: a tiny checkpoint converted, embedded and scored, beside what PyTorch computed."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from omni_jax.config import Preset
from omni_jax.types import InputError

REFERENCE = {"text": "label", "video": "v", "audio": "a", "av": "va", "tv": "tv", "at": "ta", "tva": "tva"}
"""Table -> the reference run's name for the same prompt."""


def compare_with_reference(out: Path) -> int:
    """Converts, embeds and scores the tiny checkpoint, prints how far it is from the reference, and returns the exit status.

    Raises:
      InputError: when the demo's data are not at hand, or `out` holds something else.
    """
    source = _source()
    manifest = str(source / "manifest.jsonl")
    shown = ["--manifest", manifest, "--media", str(source)]  # captions, pictures and sounds in the report
    model, embeddings = out / "model", out / "demo.npz"
    if model.exists():
        if not (model / "omni_jax.json").is_file():
            raise InputError(f"{model}: is not a folder of an earlier demo; choose another --out")
        shutil.rmtree(model)
    out.mkdir(parents=True, exist_ok=True)

    from omni_jax.cli.main import main
    from omni_jax.retrieval import read_embeddings

    steps = [
        ["convert", "to-jax", "--base", str(source / "checkpoint"), "--adapter", str(source / "adapter"), "--out", str(model)],
        ["embed", "--model", str(model), "--manifest", manifest, "--out", str(embeddings), *_settings(source)],
        ["eval", str(embeddings), "--json", str(out / "demo.json"), "--html", str(out / "demo.html"), *shown],
    ]
    for step in steps:
        print(f"\n$ omni-jax {' '.join(step)}", flush=True)
        status = main(step)
        if status:
            return status
    difference, cosine = compare(read_embeddings(embeddings).tables, source)
    print(f"\nThe report of these clips, to open in a browser: {out / 'demo.html'}")
    print(f"Largest difference from the PyTorch reference: {difference:.1e} of the largest entry (smallest cosine {cosine:.7f}).")
    return 0


def compare(tables: dict[str, Any], source: Path) -> tuple[float, float]:
    """Returns the largest |difference| as a share of the largest entry, and the smallest cosine, over every table and clip."""
    import numpy as np

    worst, least = 0.0, 1.0
    with np.load(source / "outputs_adapter.npz") as reference:
        for table, rows in tables.items():
            wanted = np.stack([reference[f"{i}/embed/{REFERENCE[table]}"] for i in range(len(rows))])
            wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
            worst = max(worst, float(np.abs(rows - wanted).max() / np.abs(wanted).max()))
            least = min(least, float((rows * wanted).sum(axis=1).min()))
    return worst, least


def _settings(source: Path) -> list[str]:
    """Returns the preset fields the reference run was made with."""
    spec = json.loads((source / "spec.json").read_text())
    names = [field.name for field in dataclasses.fields(Preset) if field.name in spec]
    return [part for name in names for part in ("--set", f"{name}={spec[name]}")]


def _source() -> Path:
    """Returns the folder of the tiny checkpoint, its clips and the reference outputs: that of OMNI_GOLDEN, or the package's own."""
    folder = Path(os.environ.get("OMNI_GOLDEN") or Path(__file__).parent / "wave_tiny")
    if not (folder / "spec.json").is_file():
        raise InputError(f"{folder}: the demo's checkpoint is not here; install omni-jax again, or name a folder with OMNI_GOLDEN")
    return folder
