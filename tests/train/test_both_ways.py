"""Embedding and training compute the same of the same batch, to the bit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.config import TABLES
from omni_jax.model import Encoder
from omni_jax.model.runner import Runner
from omni_jax.towers import NAMES
from omni_jax.train import TrainBatch, TrainStep, fit_shapes, pack_micro_batch
from omni_jax.train.streams import media_table, run_towers
from omni_jax.types import EncoderBatch, StepKind
from tests.train.golden_batches import next_sample
from tests.train.random_batches import MODEL, example, parts, recipe

pytestmark = [pytest.mark.jit, pytest.mark.exact]

KIND = StepKind(anchor=True, positive=False, hard=None, singles=("text", "audio", "video"), pairs=())
TABLE_OF = {"anchor": "tva", "text": "text", "audio": "audio", "video": "video"}


def test_one_batch_has_the_same_embeddings_in_a_training_step_and_in_the_embedding_pass() -> None:
    """Program by program, as the compiler rounds otherwise where it sees more at once: each tower, the media table, the rows."""
    step = TrainStep(MODEL, recipe(), dtype=jnp.float32)
    trainable, frozen = parts(step)
    examples = [example(seed, grid) for seed, grid in enumerate([(4, 6), (4, 4), (4, 6)])]
    packed = pack_micro_batch(examples, KIND, fit_shapes(examples, KIND), MODEL, next_sample(len(examples)))
    one = jax.tree.map(lambda x: x[0], dataclasses.replace(packed, kinds=()))

    def program(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(jax.jit(lambda t, f, *args: function(step.forward.model(t, f), *args)), trainable, frozen)

    with jax.default_matmul_precision("highest"):  # as step and runner set it for float32
        features = {name: program(lambda m, clips, n=name: run_towers(m, clips, [n])[n])(one.clips) for name in NAMES}
        media = program(media_table)(features, one.clips)
        fused, last = program(Encoder.embed_rows)(one.rows, media)
    embedded = {(clip, table): vector for clip, table, vector in Runner(step.forward.model(trainable, frozen)).embed(as_embedded(one))}
    assert embedded.keys() == {(clip, table) for clip in range(len(examples)) for table in TABLE_OF.values()}
    for r, names in enumerate(KIND.pooled(share_prefix=True)):
        for k, name in enumerate(names):
            trained = np.asarray(last if name == "text" else fused)[:, r, k]
            for clip, vector in enumerate(trained):
                np.testing.assert_array_equal(vector, embedded[clip, TABLE_OF[name]])


def as_embedded(batch: TrainBatch) -> EncoderBatch:
    """Returns the arrays of a training batch as the embedding pass has them: items of all clips on one axis, one media table for all."""
    clips, rows = batch.clips, batch.rows
    count, _, steps, patches = clips.vision.window.shape
    seen, heard = steps * patches // 4, clips.beats.max_tokens
    # A clip's table is its video, Whisper and BEATs tokens; the pass has those of all clips after one another.
    sizes = [seen, heard, heard]
    first, size = (np.repeat(values, sizes) for values in ([0, seen, seen + heard], sizes))
    places = count * first + np.arange(count)[:, None] * size + np.arange(sum(sizes)) - first
    index = np.where(rows.media_index < 0, -1, np.take_along_axis(places[:, None], np.maximum(rows.media_index, 0), axis=2))
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), dataclasses.replace(rows, media_index=index))
    owners = np.full((*flat.pool.shape, 2), -1, np.int32)
    for r, names in enumerate(KIND.pooled(share_prefix=True)):
        for k, name in enumerate(names):
            owners[r :: len(KIND.rows), k] = [(n, TABLES.index(TABLE_OF[name])) for n in range(count)]
    return EncoderBatch(
        vision=(jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), clips.vision),),
        audio=(jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), clips.audio),),
        beats=(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), clips.beats),),
        rows=(flat,),
        owners=(owners,),
        used_tokens=0,
        total_tokens=0,
    )
