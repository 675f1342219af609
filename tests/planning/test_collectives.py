"""The collectives of the tiny step on eight devices, all of them; and slices, which change where numbers cross and not what they are."""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh

from omni_jax.parallel import make_mesh
from omni_jax.planning.abstract import abstract_batch, abstract_state
from omni_jax.planning.hlo import Collective, collectives
from omni_jax.train import LossConfig, TrainStep, place_batch, step_kind
from omni_jax.types import BatchShapes
from tests.tolerances import assert_close
from tests.train.random_batches import CHUNKS, FBANK, MODEL, QUICK, STEPS, batch, recipe, weights

pytestmark = pytest.mark.jit

# Three layers: the fusion head's weight (192, 64) has a shape of its own.
DEEPER = dataclasses.replace(MODEL, decoder=dataclasses.replace(MODEL.decoder, num_layers=3))

# Shape -> runs. Each matrix is gathered for each pass over its layers: towers once; in the decoder forward, and again where the backward
# pass computes a layer anew and passes gradients on. A layer's are gathered in the loop, as they are cut out of the stack.
WEIGHTS = {
    # Vision: patches, 2 layers of q, k, v, proj (with the audio tower's 2 x 4), gate and up, down; merger.
    "f32[1176,32]": 1,
    "f32[1,32,32]": 16,
    "f32[1,32,24]": 4,
    "f32[1,24,32]": 2,
    "f32[128,128]": 1,
    "f32[128,64]": 1,
    # Audio: convolutions (3 x 128 and 3 x 32 inputs), fc1, fc2, proj.
    "f32[384,32]": 1,
    "f32[96,32]": 1,
    "f32[1,32,40]": 2,
    "f32[1,40,32]": 2,
    "f32[32,64]": 1,
    # BEATs: patches, projection, 2 layers of q, k, v, out, fc1, fc2.
    "f32[256,24]": 1,
    "f32[24,48]": 1,
    "f32[1,48,48]": 8,
    "f32[1,48,32]": 2,
    "f32[1,32,48]": 2,
    # Decoder, 3 layers: q and o, k and v, gate and up, down, and LoRA's A of q, k, v.
    "f32[1,64,64]": 18,
    "f32[1,64,32]": 18,
    "f32[1,64,48]": 18,
    "f32[1,48,64]": 9,
    "f32[1,64,3]": 27,
    # The second maps of bridge and head.
    "f32[64,64]": 2,
    # Biases and scales of the towers' layers, and of what stands around them.
    "f32[1,32]": 8,
    "f32[1,48]": 4,
    "f32[32]": 2,
    "f32[48]": 1,
    "f32[64]": 4,
}
ACTIVATIONS = {
    # What the hard negative exchanges within its block, Whisper tokens and BEATs features; row numbers.
    "f32[1,8,1,14,64]": 1,
    "f32[1,8,1,24,48]": 1,
    "s32[1,8,1,64]": 1,
    "s32[1,8,3,64]": 1,
    # Of the fusion head, pooled states of the batch, three of each clip or one.
    "f32[24,64]": 1,
    "f32[64,8]": 1,
    # What a clip is compared with in the losses: anchors (L_T and L_D), positives, and two modalities.
    "f32[8,64]": 5,
}


def found_on(mesh: Mesh, per_slice: int = 0) -> list[Collective]:
    step = TrainStep(DEEPER, recipe(), dtype=jnp.float32, mesh=mesh, compiler_options=QUICK)
    kind, shapes = step_kind(1, step.config.losses), BatchShapes(STEPS, 24, CHUNKS, FBANK, row_tokens=64, hard_tokens=64)
    made = abstract_batch(DEEPER, kind, shapes, clips=8, micro_batches=1, mesh=mesh)
    return collectives(step.lower(*abstract_state(step, DEEPER, jnp.float32), made).compile().as_text() or "", per_slice)


def test_the_step_gathers_what_it_must_and_never_the_fusion_head():
    found = found_on(make_mesh())
    runs: dict[str, Counter[str]] = {}
    for c in found:
        runs.setdefault(c.kind, Counter())[c.shape] += c.runs
    assert runs.keys() == {"all-gather", "reduce-scatter", "all-reduce", "all-to-all"} and {c.group for c in found} == {8}
    assert dict(runs["all-gather"]) == WEIGHTS | ACTIVATIONS
    # The gradient of each gathered embedding goes back to its shard; L_D's teacher has none, its students are gathered for it alone.
    assert dict(runs["reduce-scatter"]) == {"f32[1,64]": 6}
    # Sums are merged by the compiler; among them are the scalars of two norms, of gradients and of updates; LoRA of the last layer apart.
    assert {kind: sum(runs[kind].values()) for kind in ("all-reduce", "all-to-all")} == {"all-reduce": 13, "all-to-all": 5}
    fused = 3 * 64
    assert not any(f"{fused},64]" in shape or f"[8,{fused}]" in shape for shapes in runs.values() for shape in shapes)


def test_weights_are_gathered_within_a_slice():
    found = found_on(make_mesh(slices=2), per_slice=4)
    across = Counter(c.shape for c in found if c.across and c.kind == "all-gather")
    within = Counter(c.shape for c in found if not c.across and c.kind == "all-gather")
    layers = {"f32[1,64,64]", "f32[1,64,32]", "f32[1,64,48]", "f32[1,48,64]", "f32[1,32,32]", "f32[1,48,48]"}
    assert layers <= within.keys() and not layers & across.keys()
    assert any(c.across and c.kind == "all-reduce" for c in found)  # gradients
    assert {c.group for c in found if not c.across} == {4}


def test_two_slices_of_four_give_the_losses_of_one_of_eight():
    losses = LossConfig(negatives="global", temperature=0.2)

    def run(mesh: Mesh) -> list[dict[str, jax.Array]]:
        step = TrainStep(MODEL, recipe(), dtype=jnp.float32, mesh=mesh, compiler_options=QUICK)
        state, frozen = step.init(weights())
        rows = []
        for update in (0, 3):
            made = place_batch(batch(losses, update, micro=2, clips=16, seed=update), mesh)
            state, metrics = step(state, frozen, made)
            rows.append(jax.device_get(metrics))
        return rows

    one, two = run(make_mesh()), run(make_mesh(slices=2))
    for got, want in zip(two, one, strict=True):
        assert got.keys() == want.keys()
        for name in ("loss", "L_T", "L_D", "L_A"):
            assert_close(got[name], want[name], "update_loss")
        assert_close(got["grad_norm"], want["grad_norm"], "gradient_norm")
