"""A run that takes seconds: synthetic clips, their shards, a model of a few thousand parameters, and the command that trains it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omni_jax.data.synthetic import SyntheticConfig, write_set
from tests.programs import QUICK
from tests.repository import ROOT

CONFIG = '''"""omni-jax train --config tiny_run.py"""
import ml_collections

def get_config():
    width = 32
    tower = {{"hidden_size": width, "intermediate_size": 32, "num_layers": 1, "num_heads": 2}}
    return ml_collections.ConfigDict({{
        "model": {{"base": "", "dtype": "float32", "architecture": {{
            "decoder": {{**tower, "num_layers": 2, "num_kv_heads": 1, "mrope_sections": (2, 3, 3)}},
            "vision": {{**tower, "full_attention_layers": (0,)}},
            "audio": dict(tower),
            "beats": {{**tower, "embed_dim": 16, "conv_pos": 4, "conv_pos_groups": 2, "num_buckets": 8, "max_distance": 16,
                      "predictor_classes": 0}},
        }}}},
        "data": {{"train": "{shards}", "preset_fields": {{"frames": 2, "pixels": 3136, "audio_seconds": 1.0}}, "workers": 0,
                 "distinct": "id_prefix"}},
        "batch": {{"micro_batch": 8, "blocks": 2}},
        "losses": {{"temperature": 0.1, "pairs": "all", "negatives": "global"}},
        "optimizer": {{"learning_rate": 3e-3, "warmup_steps": 2}},
        "trainable": {{"recipe": "all", "freeze": ("vision", "audio", "beats")}},
        "remat": "none",
        "steps": 6,
        "checkpoint": {{"every": 2, "keep": 2}},
        "evaluation": {{"manifest": "{held_out}", "batch_size": 4}},
        "log": {{"every": 1}},
    }})
'''

CLIPS = SyntheticConfig(clips=1, held_out=4, combinations=20, seconds=1.0)


def make_files(folder: Path) -> Path:
    """Writes clips, shards and the config into a folder; returns the config's path."""
    from omni_jax.cli.main import main

    made = write_set(folder / "clips", CLIPS)
    fields = ["--set", "frames=2", "--set", "pixels=3136", "--set", "audio_seconds=1"]
    assert main(["prepare", "--manifest", str(made.train), "--out", str(folder / "shards"), *fields, "--workers", "0"]) == 0
    config = folder / "tiny_run.py"
    config.write_text(CONFIG.format(shards=folder / "shards", held_out=made.held_out))
    return config


def environment(cache: Path, devices: int = 1) -> dict[str, str]:
    """Returns the environment of a process with so many CPU devices, whose compiled programs are kept in the run's folder or in `cache`."""
    return {
        **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "XLA_FLAGS": QUICK,
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(cache)),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": str(ROOT),
    }


def command(config: Path, workdir: Path, *flags: str, **changes: Any) -> list[str]:
    """Returns the command line of a run; changes are config fields with "__" for a dot."""
    assigned = [f"--config.{name.replace('__', '.')}={value}" for name, value in changes.items()]
    return omni_jax("train", "--config", str(config), "--workdir", str(workdir), *assigned, *flags)


def omni_jax(*arguments: str) -> list[str]:
    """Returns the command line that `omni-jax` stands for."""
    return [sys.executable, "-m", "omni_jax.cli.main", *arguments]


def start(arguments: list[str], environment: Mapping[str, str], before: Callable[[], object] | None = None) -> subprocess.Popen[str]:
    """Starts a command; `before` runs in its process, ahead of it."""
    return subprocess.Popen(
        arguments, env=dict(environment), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=before
    )


def finish(arguments: list[str], environment: Mapping[str, str], status: int = 0) -> str:
    """Runs a command to its end and returns what it said."""
    process = start(arguments, environment)
    said = process.communicate(timeout=570)[0]
    assert process.returncode == status, said
    return said


def free_port() -> int:
    """Returns a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
