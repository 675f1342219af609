"""The decoder's rungs: attention, layer, packed rows against each prompt alone, both heads."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.model import Encoder, decoder
from omni_jax.model.attention import row_attention, row_mask
from omni_jax.model.encoder import FusionHead
from omni_jax.model.rope import rotate
from tests.model import builders, reference
from tests.model.builders import Prompt
from tests.model.reference import Weights
from tests.tolerances import assert_close

pytestmark = pytest.mark.jit

CFG = builders.ODD.decoder
MEDIA = builders.noise(9, 8, CFG.hidden_size)


def angles(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    turns = decoder.tmrope_angles(jnp.asarray(positions), CFG.head_dim, CFG.rope_theta, CFG.mrope_sections)
    return np.cos(turns), np.sin(turns)


@pytest.fixture(scope="module")
def one_row() -> tuple[np.ndarray, np.ndarray]:
    """(x, positions) of 13 tokens, all one prompt."""
    positions = builders.random_prompt(3, 13, 8, CFG.vocab_size).positions[:, None]
    return builders.noise(1, 1, 13, CFG.hidden_size), positions


def run_row(module: Any, x: np.ndarray, positions: np.ndarray) -> jax.Array:
    attend = row_attention(jnp.ones((1, 13), jnp.int32), jnp.zeros((1, 13), jnp.int32))
    cos, sin = angles(positions)
    return module(jnp.asarray(x), lambda x, pick: rotate(x, pick(cos), pick(sin)), attend, None)


def test_attention(one_row: tuple[np.ndarray, ...]):
    x, positions = one_row
    module, w = builders.random_part(lambda: decoder.Attention(builders.maker(), CFG))
    got = run_row(module, x, positions)
    assert_close(got[0], reference.decoder_attention(w, CFG, x[0], positions[:, 0]), "layer")


def test_layer(one_row: tuple[np.ndarray, ...]):
    x, positions = one_row
    module, w = builders.random_part(lambda: decoder.Layer(builders.maker(), CFG))
    got = run_row(module, x, positions)
    assert_close(got[0], reference.decoder_layer(w, CFG, x[0], positions[:, 0]), "layer")


def test_fusion_head():
    module, w = builders.random_part(lambda: FusionHead(builders.maker(), 3, 12))
    states = builders.noise(1, 5, 3, 12)
    assert_close(builders.run(module, states), np.stack([reference.fusion_head(w, s) for s in states.astype(np.float64)]), "layer")


def test_row_mask_is_causal_within_a_segment_and_its_branch():
    segment = np.array([[0, 1, 1, 1, 1, 2, 2, 0]])
    branch = np.array([[0, 0, 0, 1, 2, 0, 1, 0]])
    want = [
        "1.......",  # padding sees itself
        ".1......",  # the prefix sees itself and what went before
        ".11.....",
        ".111....",  # branch 1: prefix and itself
        ".11.1...",  # branch 2: prefix and itself, not branch 1
        ".....1..",  # the next segment sees nothing of the first
        ".....11.",
        "1......1",
    ]
    got = np.asarray(row_mask(jnp.asarray(segment), jnp.asarray(branch)))[0]
    assert ["".join("1" if seen else "." for seen in row) for row in got] == want


def prompt_alone(w: Weights, prompt: Prompt) -> np.ndarray:
    """(L, D): the reference's states of the prompt's last token."""
    media = {place: MEDIA[index] for place, index in enumerate(prompt.media_index) if index >= 0}
    embeddings = reference.embed_prompt(w / "decoder", prompt.ids, media)
    return reference.decoder(w / "decoder", CFG, embeddings, prompt.positions)[:, -1]


def packed() -> tuple[dict[str, np.ndarray], dict[tuple[int, int], Prompt]]:
    """Two rows with shared prefixes, several segments and padding on either side; and the prompt behind each pooled place."""
    lengths = {"prefix": 7, "one": 4, "two": 3, "plain": 6, "padding": 3, "other": 5, "tail": 2, "single": 1}
    p = {name: builders.random_prompt(seed, n, len(MEDIA), CFG.vocab_size) for seed, (name, n) in enumerate(lengths.items())}
    rows = [
        # prefix with two continuations, then a prompt of its own, padding at the end
        [(p["prefix"], 1, 0), (p["one"], 1, 1), (p["two"], 1, 2), (p["plain"], 2, 1), (p["padding"], 0, 0)],
        # padding first, a single token, a prefix of which one prompt is the prefix itself
        [(p["padding"], 0, 0), (p["single"], 1, 0), (p["other"], 2, 0), (p["tail"], 2, 1)],
    ]
    places = {
        (0, 10): builders.joined(p["prefix"], p["one"]),
        (0, 13): builders.joined(p["prefix"], p["two"]),
        (0, 19): p["plain"],
        (1, 3): p["single"],
        (1, 8): p["other"],
        (1, 10): builders.joined(p["other"], p["tail"]),
    }
    pools = [[token for row, token in places if row == r] for r in range(2)]
    return builders.pack(rows, pools, 25), places


def test_packed_rows_agree_with_each_prompt_alone(odd: tuple[Encoder, Weights]):
    encoder, w = odd
    rows, places = packed()
    fused, last = builders.run(encoder, rows, MEDIA, method="embed_rows")
    pooled = builders.run(encoder.decoder, *(rows[n] for n in ("ids", "media_index", "positions", "segment", "branch", "pool")), MEDIA,
                          dtype=jnp.float32)  # fmt: skip
    for (r, token), prompt in places.items():
        k = list(rows["pool"][r]).index(token)
        states = prompt_alone(w, prompt)
        assert_close(pooled[r, k], states, "last_token_hidden")
        assert_close(fused[r, k], reference.fusion_head(w / "head", states), "embed")
        assert_close(last[r, k], states[-1], "embed")


def test_a_text_only_batch_needs_no_media(odd: tuple[Encoder, Weights]):
    encoder, w = odd
    prompt = builders.random_prompt(5, 6, 1, CFG.vocab_size)
    text = Prompt(prompt.ids, prompt.positions, np.full(6, -1))
    rows = builders.pack([[(text, 1, 1)]], [[5]], 6)
    _, last = builders.run(encoder, rows, np.zeros((0, CFG.hidden_size), np.float32), method="embed_rows")
    assert_close(last[0, 0], prompt_alone(w, text)[-1], "embed")
