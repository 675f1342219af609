"""How many programs a mixed job really compiles: counted where jax traces them, not planned."""

from __future__ import annotations

import dataclasses

import pytest
from flax import nnx

from omni_jax.config import TABLES, BeatsConfig, ModelConfig, Preset, preset
from omni_jax.model import Encoder
from omni_jax.model.runner import Runner
from omni_jax.tokens.batching import Planner
from omni_jax.tokens.tokenizer import Tokenizer
from tests.golden_set import GoldenSet
from tests.tokens import synthetic
from tests.tokens.batched import batched

CLIPS, GROUP = 200, 16
MOST_PROGRAMS = 16
MOST_PADDING = 0.20


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seconds"), [("training", (8.0, 8.0)), ("mteb", (1.0, 20.0))])
def test_golden_tokenizer_200_mixed_clips_compile_few_programs(golden: GoldenSet, name: str, seconds: tuple[float, float]):
    config = _smallest(ModelConfig.from_hf(golden.config, BeatsConfig()))
    tokenizer, chosen = Tokenizer.from_pretrained(golden.checkpoint), preset(name)
    runner, planner = Runner(Encoder(config, nnx.Rngs(0))), Planner()
    features = synthetic.clips(CLIPS, chosen, seed=11, seconds=seconds)
    used, total, rows = _embed(runner, planner, features, tokenizer, config, chosen)
    print(f"{name}: {len(runner.programs)} programs, {1 - used / total:.1%} padded")
    assert rows == CLIPS * len(TABLES)
    assert len(runner.programs) <= MOST_PROGRAMS, "\n".join(runner.programs)
    assert 1 - used / total <= MOST_PADDING


def _embed(
    runner: Runner, planner: Planner, features: list, tokenizer: Tokenizer, config: ModelConfig, chosen: Preset
) -> tuple[int, int, int]:
    """Returns (used tokens, total tokens, embeddings)."""
    used = total = rows = 0
    for start in range(0, len(features), GROUP):
        batch = batched(features[start : start + GROUP], TABLES, tokenizer, config, chosen, planner=planner)
        used, total = used + batch.used_tokens, total + batch.total_tokens
        rows += sum(1 for _ in runner.embed(batch, chosen.text_head))
    return used, total, rows


def _smallest(config: ModelConfig) -> ModelConfig:
    """One layer a tower: what is counted is programs, not arithmetic."""
    return dataclasses.replace(
        config,
        decoder=dataclasses.replace(config.decoder, num_layers=1),
        vision=dataclasses.replace(config.vision, num_layers=1, full_attention_layers=(0,)),
        audio=dataclasses.replace(config.audio, num_layers=1),
        beats=BeatsConfig(num_layers=1, hidden_size=32, intermediate_size=32, num_heads=2, embed_dim=16, conv_pos=16, conv_pos_groups=4),
    )
