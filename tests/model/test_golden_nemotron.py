"""The second backbone: bidirectional attention, mean pooling, no BEATs, no head; from recorded arrays to embeddings."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from omni_jax import conversion
from omni_jax.config import TABLES, ConfigError, ModelConfig
from omni_jax.features import audio_tokens
from omni_jax.model import Encoder, abstract_encoder, with_params
from omni_jax.model.runner import Runner
from omni_jax.parallel import make_mesh
from omni_jax.tokens.buckets import Planner
from omni_jax.tokens.tokenizer import Tokenizer
from omni_jax.types import AudioSegment, EncoderBatch, Features, VideoGrid, VisionFeatures
from tests.golden_set import GoldenSet
from tests.tokens.batched import batched
from tests.tolerances import assert_close

pytestmark = [pytest.mark.jit, pytest.mark.exact]

NAMES = {"text": "t", "video": "v", "audio": "a", "av": "va", "tv": "tv", "at": "ta", "tva": "tva"}
Embeddings = dict[tuple[int, str], np.ndarray]


@pytest.fixture(scope="module")
def encoder(golden_nemotron: GoldenSet, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("nemotron") / "model"
    conversion.to_jax(golden_nemotron.checkpoint, folder)
    config, params = conversion.load(folder, dtype="float32")
    return with_params(abstract_encoder(config), params)


@pytest.fixture(scope="module")
def runner(encoder: Encoder) -> Runner:
    return Runner(encoder)


def features(golden: GoldenSet) -> list[Features]:
    """What the reference fed its towers; there is no filter bank, and nothing may ask for one."""
    made = []
    for i, record in enumerate(golden.records):
        grid = tuple(int(n) for n in golden.inputs[f"{i}/grid_thw"].reshape(3))
        mel = golden.inputs[f"{i}/log_mel"]
        vision = VisionFeatures(golden.inputs[f"{i}/pixel_values"], VideoGrid(grid, float(golden.inputs[f"{i}/second_per_grid"])))
        segment = AudioSegment(mel, np.zeros((0, 128), np.float32), audio_tokens(mel.shape[1]))
        made.append(Features(record, vision, (segment,)))
    return made


def plan(golden: GoldenSet, config: ModelConfig, clips: list[Features], planner: Planner, tables: tuple[str, ...] = TABLES) -> EncoderBatch:
    return batched(clips, tables, Tokenizer.from_pretrained(golden.checkpoint), config, golden.preset, planner=planner)


def embed(runner: Runner, batch: EncoderBatch) -> Embeddings:
    return {(clip, table): vector for clip, table, vector in runner.embed(batch)}


@pytest.fixture(scope="module")
def mixed(golden_nemotron: GoldenSet, encoder: Encoder, runner: Runner) -> Embeddings:
    """All clips and tables in one batch."""
    return embed(runner, plan(golden_nemotron, encoder.config, features(golden_nemotron), Planner()))


def test_golden_configuration(golden_nemotron: GoldenSet, encoder: Encoder):
    config = encoder.config
    assert (config.attention, config.pooling, config.prompt, config.beats) == ("bidirectional", "mean", "chat", None)
    assert ModelConfig.from_json(config.to_json()) == config
    assert (encoder.head, encoder.beats, encoder.bridge) == (None, None, None)


def test_golden_embed_from_arrays(golden_nemotron: GoldenSet, mixed: Embeddings):
    assert mixed.keys() == {(i, table) for i in range(golden_nemotron.clips) for table in TABLES}
    for (clip, table), vector in mixed.items():
        expected = golden_nemotron.base[f"{clip}/embed/{NAMES[table]}"]
        assert_close(vector / np.linalg.norm(vector), expected / np.linalg.norm(expected), "embed")
        # Recorded with or without their length.
        assert_close(vector if np.linalg.norm(expected) > 1.001 else vector / np.linalg.norm(vector), expected, "embed")


def test_golden_embeddings_differ_by_more_than_the_tolerance(mixed: Embeddings):
    """Agreeing with the wrong prompt, or with a prompt whose padding was averaged, would be seen."""
    vectors = np.stack(list(mixed.values()))
    distances = np.abs(vectors[:, None] - vectors[None]).max(axis=-1) + np.eye(len(vectors))
    assert distances.min() > 1e-3


def test_golden_invariance_of_mean_pooling(golden_nemotron: GoldenSet, encoder: Encoder, runner: Runner, mixed: Embeddings):
    """Each prompt alone in its row, and in rows with more padding, gives what it gives in company."""
    clips = features(golden_nemotron)
    alone = embed(runner, plan(golden_nemotron, encoder.config, clips[:1], Planner(), ("tva",)))
    assert_close(alone[0, "tva"], mixed[0, "tva"], "invariance")
    batch = plan(golden_nemotron, encoder.config, clips, Planner())
    wider = {"ids": encoder.config.tokens.pad + 0 * batch.rows[0].ids[:, :64], "media_index": -1 + 0 * batch.rows[0].ids[:, :64]}
    rows = batch.rows[0]
    for name in ("segment", "branch"):
        wider[name] = np.zeros_like(wider["ids"])
    padded = {name: np.concatenate([getattr(rows, name), extra], axis=1) for name, extra in wider.items()}
    padded["positions"] = np.pad(rows.positions, ((0, 0), (0, 0), (0, 64)))
    got = embed(runner, dataclasses.replace(batch, rows=(dataclasses.replace(rows, **padded), *batch.rows[1:])))
    for key, vector in got.items():
        assert_close(vector, mixed[key], "invariance")


def test_golden_sharding_of_the_second_backbone(golden_nemotron: GoldenSet, encoder: Encoder, mixed: Embeddings):
    meshed = Runner(encoder, make_mesh(data=2, fsdp=2, tensor=2))
    batch = plan(golden_nemotron, encoder.config, features(golden_nemotron), Planner(row_multiple=4), ("at", "tva"))
    for key, vector in embed(meshed, batch).items():
        assert_close(vector, mixed[key], "sharding")


def test_golden_prefix_sharing_is_refused(golden_nemotron: GoldenSet, encoder: Encoder):
    with pytest.raises(ConfigError, match="bidirectional, not causal"):
        batched(
            features(golden_nemotron),
            TABLES,
            Tokenizer.from_pretrained(golden_nemotron.checkpoint),
            encoder.config,
            golden_nemotron.preset,
            share_prefix=True,
            planner=Planner(),
        )
