"""The top rung: hidden states and embeddings of every prompt of every clip against the PyTorch reference, without and with the adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni_jax.model import Encoder
from tests.golden_set import GoldenSet
from tests.model import builders, golden_inputs, reference
from tests.model.golden_inputs import COMBINATIONS
from tests.model.reference import Weights
from tests.tolerances import assert_close

pytestmark = [pytest.mark.jit, pytest.mark.exact]

FUSED = tuple(c for c in COMBINATIONS if c != "label")


@dataclasses.dataclass(frozen=True)
class Outputs:
    """One clip: prompt -> states (L, D), and prompt -> embedding of the head it goes through."""

    hidden: Mapping[str, np.ndarray]
    embed: Mapping[str, np.ndarray]


def outputs(golden: GoldenSet, encoder: Encoder) -> list[Outputs]:
    """Every clip from the golden inputs through towers, bridge, decoder and heads."""
    return [_clip(golden, encoder, clip) for clip in range(golden.clips)]


def _clip(golden: GoldenSet, encoder: Encoder, clip: int) -> Outputs:
    config = encoder.config
    width = config.decoder.hidden_size
    video = np.asarray(builders.run(encoder, *golden_inputs.video(golden, config, clip), method="video_tokens")).reshape(-1, width)
    mel, frames = golden_inputs.mel_chunks(golden, config, clip)
    whisper = golden_inputs.valid_tokens(builders.run(encoder, mel, frames, method="whisper_tokens"), frames)
    fbank = golden_inputs.fbank(golden, config, clip)
    beats = np.asarray(builders.run(encoder, *fbank, method="beats_tokens", max_tokens=len(whisper)))[0]
    rows = golden_inputs.rows(golden, config, clip, len(video))
    media = np.concatenate([video, whisper, beats])
    order = ("ids", "media_index", "positions", "segment", "branch", "pool")
    pooled = np.asarray(builders.run(encoder.decoder, *(rows[name] for name in order), media, dtype=jnp.float32))[:, 0]
    fused = np.asarray(builders.run(encoder.head, pooled))
    by_prompt = {c: pooled[r] for r, c in enumerate(COMBINATIONS)}
    return Outputs(by_prompt, {c: pooled[r, -1] if c == "label" else fused[r] for r, c in enumerate(COMBINATIONS)})


@pytest.fixture(scope="module")
def base(golden: GoldenSet, golden_base: Encoder) -> list[Outputs]:
    return outputs(golden, golden_base)


@pytest.fixture(scope="module")
def adapted(golden: GoldenSet, golden_adapted: Encoder) -> list[Outputs]:
    return outputs(golden, golden_adapted)


def test_golden_sets_hold_every_clip(golden: GoldenSet, base: list[Outputs]):
    assert len(base) == golden.clips == len(golden.records) > 0


@pytest.mark.parametrize("prompt", FUSED)
def test_golden_last_token_hidden(golden: GoldenSet, base: list[Outputs], prompt: str):
    for clip, out in enumerate(base):
        assert_close(out.hidden[prompt], golden.base[f"{clip}/last_token_hidden/{prompt}"], "last_token_hidden")


@pytest.mark.parametrize("prompt", COMBINATIONS)
def test_golden_embed(golden: GoldenSet, base: list[Outputs], prompt: str):
    for clip, out in enumerate(base):
        assert_close(out.embed[prompt], golden.base[f"{clip}/embed/{prompt}"], "embed")


@pytest.mark.parametrize("prompt", COMBINATIONS)
def test_golden_embed_with_adapter(golden: GoldenSet, adapted: list[Outputs], prompt: str):
    for clip, out in enumerate(adapted):
        assert_close(out.embed[prompt], golden.adapter[f"{clip}/embed/{prompt}"], "embed")


def test_golden_adapter_moves_every_embedding(golden: GoldenSet):
    """The two sets of outputs differ by much more than the tolerance, so that neither test could pass on the other's weights."""
    for clip in range(golden.clips):
        for prompt in COMBINATIONS:
            with_adapter, without = golden.adapter[f"{clip}/embed/{prompt}"], golden.base[f"{clip}/embed/{prompt}"]
            with pytest.raises(AssertionError, match="values are too far"):
                assert_close(with_adapter, without, "embed")


def test_golden_adapter_settings(golden: GoldenSet, golden_adapted: Encoder):
    """The scale is that of the adapter's own file."""
    lora, source = golden_adapted.config.lora, golden.adapter_config
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.dropout) == (source["r"], source["lora_alpha"], source["lora_dropout"])
    root = source["r"] ** 0.5 if source["use_rslora"] else source["r"]
    assert lora.scale == pytest.approx(source["lora_alpha"] / root)


def test_golden_rewrite_of_the_decoder(golden: GoldenSet, golden_base: Encoder):
    """The ladder's own yardstick measured, on the captions: where this fails the rewrite is wrong, not the model."""
    config = golden_base.config.decoder
    flat = nnx.to_flat_state(nnx.state(golden_base, nnx.Param))
    w = Weights({"/".join(str(p) for p in path): np.asarray(leaf[...]) for path, leaf in flat})
    for clip in range(golden.clips):
        embeddings = reference.embed_prompt(w / "decoder", golden.inputs[f"{clip}/ids/t"], {})
        states = reference.decoder(w / "decoder", config, embeddings, golden.base[f"{clip}/position_ids/t"])[:, -1]
        assert_close(states, golden.base[f"{clip}/last_token_hidden/t"], "last_token_hidden")
        assert_close(reference.fusion_head(w / "head", states), golden.base[f"{clip}/embed/t"], "embed")
