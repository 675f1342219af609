"""Mined hard negatives in the training step and in a run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.cli.main import main
from omni_jax.model import abstract_encoder
from omni_jax.planning.abstract import abstract_batch
from omni_jax.towers import of_modalities
from omni_jax.train import LossConfig, fit_shapes, pack_micro_batch, step_kind
from omni_jax.train.streams import embed_hard_negatives, run_towers
from tests.train.golden_batches import next_sample
from tests.train.random_batches import MODEL, QUICK, example, weights
from tests.train.tiny_run import make_files


def both_ways(count: int) -> tuple[Any, Any, Any]:
    """Returns a kind, and the same micro-batch packed with the clips of a shuffle and with those very clips as mined ones."""
    plain, mined = (step_kind(count, LossConfig(), mined) for mined in (False, True))
    shuffle = next_sample(4)
    clips = [example(seed, hard=plain.hard) for seed in range(4)]
    given = [dataclasses.replace(clip, hard_media=clips[taken].media) for clip, taken in zip(clips, shuffle.ravel(), strict=True)]
    shapes = fit_shapes(clips, plain)
    assert fit_shapes(given, mined) == shapes
    return mined, pack_micro_batch(clips, plain, shapes, MODEL, shuffle), pack_micro_batch(given, mined, shapes, MODEL, shuffle)


@pytest.mark.jit
@pytest.mark.parametrize("count", [1, 2], ids=["audio", "video"])
def test_a_mined_clip_gives_the_negative_that_a_shuffle_to_it_gives(count: int) -> None:
    kind, shuffled, mined = both_ways(count)
    model = abstract_encoder(MODEL, dtype=jnp.float32)

    def hard(params: Any, batch: Any) -> jax.Array:
        from omni_jax.model import with_params

        encoder = with_params(model, params)
        return embed_hard_negatives(encoder, batch, run_towers(encoder, batch.clips, of_modalities(kind.media)), kind)

    program = jax.jit(hard, compiler_options=QUICK)
    found = [np.asarray(program(weights(), jax.tree.map(lambda x: x[0], dataclasses.replace(b, kinds=())))) for b in (shuffled, mined)]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6, atol=1e-6 * np.abs(found[0]).max())
    assert np.ptp(found[0], axis=0).max() > 0


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_planned_batch_has_the_shapes_of_a_packed_one(count: int) -> None:
    kind = step_kind(count, LossConfig(), mined=True)
    clips = [dataclasses.replace(example(seed, hard=kind.hard), hard_media=example(9).media) for seed in range(4)]
    shapes = fit_shapes(clips, kind)
    packed = pack_micro_batch(clips, kind, shapes, MODEL, next_sample(4))
    planned = abstract_batch(MODEL, kind, shapes, clips=4, micro_batches=1)
    sizes = [jax.tree.map(lambda x: (x.shape, x.dtype.name), dataclasses.replace(b, kinds=())) for b in (packed, planned)]
    assert jax.tree.leaves(sizes[0]) == jax.tree.leaves(sizes[1])
    assert (packed.hard_media is None) == (kind.hard == "text")


@pytest.mark.jit
def test_a_run_trains_with_mined_negatives_of_prepared_clips(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = make_files(tmp_path)
    records = [json.loads(line) for line in (tmp_path / "clips" / "train.jsonl").read_text().splitlines()]
    names = [record["id"] for record in records]
    lists = {name: {"t2v": [names[i - 1]], "v2t": [names[i - 2], names[i - 3]], "v2a": [names[i - 4]]} for i, name in enumerate(names)}
    lists[names[0]] = {}
    mined = tmp_path / "mined.jsonl"
    mined.write_text("".join(json.dumps({**record, "negatives": lists[record["id"]]}) + "\n" for record in records))
    command = ["train", "--config", str(config), "--workdir", str(tmp_path / "run"), "--config.data.negatives=mined"]
    command += ["--config.evaluation.manifest=", "--config.steps=2", "--config.batch.micro_batches=2", "--config.losses.hn_audio_only=true"]
    assert main(command) == 2
    assert "is a prepared folder, which holds no mined negatives" in capfd.readouterr().err
    command += [f"--config.data.mined={mined}"]
    assert main(command) == 0
    assert "1 of 16 records have no mined negative that exchanges audio (from tv2a, v2a, t2a)" in capfd.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["mined"]) for row in rows] == [(1, 15), (2, 15)]
    assert all(np.isfinite(row["loss"]) for row in rows)
    mined.write_text(mined.read_text().replace(f'"v2a": ["{names[1]}"]', f'"v2a": ["{names[9]}"]'))
    assert main(command) == 2
    assert "its mined negatives differ (digest mismatch)" in capfd.readouterr().err
