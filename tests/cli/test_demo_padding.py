"""How much of the demo's training batches is padding, counted on clips of its own kind by its own settings."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest

from omni_jax.cli.config_file import read_config
from omni_jax.cli.demo_training import DEMO
from omni_jax.conversion.folder import read_manifest
from omni_jax.conversion.fresh import write_fresh
from omni_jax.data.pipeline import TrainPipeline
from omni_jax.data.plan import BatchConfig
from omni_jax.data.sources import open_source
from omni_jax.data.synthetic import SyntheticConfig, write_set
from omni_jax.tokens.tokenizer import Tokenizer
from omni_jax.train import kinds_of_update, pack_update

pytestmark = pytest.mark.jit

LARGEST = 0.15


def test_at_most_15_percent_of_the_demos_training_tokens_are_padding(tmp_path: Path) -> None:
    made = write_set(tmp_path / "clips", SyntheticConfig(clips=1, held_out=4, combinations=100))
    run = read_config(DEMO.config, [f"data.train={made.train}", "data.workers=0"])
    preset = run.data.resolved_preset()
    source = open_source(run.data.train, preset)
    write_fresh(tmp_path / "base", run.model.architecture or {}, seed=0, captions=source.captions, lora=run.model.lora)
    sizes, model = run.batch, read_manifest(tmp_path / "base").model
    data = TrainPipeline(
        source,
        tokenizer=Tokenizer.from_pretrained(tmp_path / "base"),
        config=model,
        preset=preset,
        batch=BatchConfig(**dataclasses.asdict(sizes), distinct=run.data.distinct, seed=run.seed),
        kinds=functools.partial(kinds_of_update, micro_batches=sizes.micro_batches, losses=run.losses),
        pack=functools.partial(pack_update, config=model),
    )
    batches = list(data.batches(0, 1))
    used, total = (sum(batch.counts[name] for batch in batches) for name in ("used_tokens", "total_tokens"))
    assert 0 < used < total
    assert 1 - used / total <= LARGEST
