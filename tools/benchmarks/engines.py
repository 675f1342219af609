"""Engine overhead: `omni-jax prepare` with two processes of this machine, beside the same on a local Ray cluster of two CPUs, in seconds.

Both prepare the same clips (8 frames and 8 s of sound, from ten-second files at 720p) into shards, which are compared: they must be equal.
The sides take turns. Starting Ray and its processes is counted.

Run alone: python -m tools.benchmarks --only engines
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tools.benchmarks.media import SIZES, write_clip, write_sound

CLIPS, WORKERS, CLIPS_PER_SHARD = 500, 2, 25
ENGINES: dict[str, list[str]] = {"local": [], "ray": ["--ray", "local"]}


def run(pairs: int = 1, clips: int = CLIPS, size: tuple[int, int] = SIZES["720p"]) -> dict[str, Any]:
    """Prints and returns the seconds of both engines and their ratio. Raises ValueError where the shards differ."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        clip = write_clip(folder / "0.mp4", *size, group=60)
        write_sound(folder / "sound.wav", 1)
        rows = []
        for number in range(clips):
            file = folder / f"{number}.mp4"
            if number:
                file.hardlink_to(clip)
            rows.append({"id": str(number), "text": f"caption {number}", "video": file.name, "audio": "sound.wav"})
        (folder / "clips.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        spent: dict[str, list[float]] = {engine: [] for engine in ENGINES}
        for number in range(pairs):
            for engine in list(ENGINES) if number % 2 == 0 else reversed(list(ENGINES)):
                spent[engine].append(prepare(folder, engine, -(-clips // CLIPS_PER_SHARD)))
            compare(folder)
    median = {engine: float(np.median(seconds)) for engine, seconds in spent.items()}
    results = median | {"clips": clips, "runs": spent, "ratio": median["ray"] / median["local"]}
    print(f"{clips} clips: local {median['local']:.1f} s, on Ray {median['ray']:.1f} s, {results['ratio'] - 1:+.0%}")
    return results


def prepare(folder: Path, engine: str, shards: int) -> float:
    """Prepares the clips of a folder and returns the seconds that it took."""
    out = folder / engine
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "omni_jax.cli.main", "prepare", "--manifest", str(folder / "clips.jsonl"), "--out", str(out)]
    start = time.monotonic()
    subprocess.run([*command, "--shards", str(shards), "--workers", str(WORKERS), *ENGINES[engine]], check=True, capture_output=True)
    return time.monotonic() - start


def compare(folder: Path) -> None:
    """Raises ValueError where the engines did not write the same."""
    local, ray = (
        {path.relative_to(folder / engine): path.read_bytes() for path in (folder / engine).rglob("*") if path.is_file()}
        for engine in ENGINES
    )
    if local != ray:
        raise ValueError("the shards of the two engines differ")
