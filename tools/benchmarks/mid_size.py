"""The mid-size subject of the speed benchmarks: settings, random weights (for both sides the same) and synthetic clips.

Letters: N clips, F frames, L layers, D decoder width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni_jax.config import AudioConfig, BeatsConfig, DecoderConfig, ModelConfig, Preset, SpecialTokens, VisionConfig
from omni_jax.model import Encoder, abstract_encoder, abstract_params, with_params
from omni_jax.model.runner import Runner
from omni_jax.tokens.batching import Planner, build_batches
from omni_jax.tokens.prompts import build_sequences
from omni_jax.towers.work import FlopCount
from omni_jax.types import AudioSegment, EncoderBatch, Features, Record, TokenizedClip, TokenSequence, VideoGrid, VisionFeatures
from tools.benchmarks.forward_work import forward_work, total

PRESET = Preset()
WORDS = 1000  # vocabulary indices from here on are ordinary text
CAPTION_TOKENS = (12, 60)


def mid_config() -> ModelConfig:
    """Returns settings with 0.15 B parameters, the decoder's share of them as at 7B, heads as wide as at 7B."""
    width = 768
    return ModelConfig(
        decoder=DecoderConfig(hidden_size=width, intermediate_size=3840, num_layers=10, num_heads=6, num_kv_heads=2, vocab_size=8192),
        vision=VisionConfig(
            hidden_size=400, intermediate_size=1080, num_layers=8, num_heads=5, output_size=width, full_attention_layers=(1, 3, 5, 7)
        ),
        audio=AudioConfig(hidden_size=384, intermediate_size=1536, num_layers=8, num_heads=6, output_size=width),
        beats=BeatsConfig(
            num_layers=3, hidden_size=384, intermediate_size=1536, num_heads=6, embed_dim=256, conv_pos_groups=8, predictor_classes=0
        ),
        tokens=SpecialTokens(pad=0, audio=1, audio_bos=2, audio_eos=3, video=4, vision_bos=5, vision_eos=6),
    )


def random_encoder(config: ModelConfig, seed: int = 0) -> Encoder:
    """Returns a float32 encoder with random weights; norms and biases are random as well, so that each of them counts in a comparison."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for path, spec in abstract_params(config).items():
        values = rng.standard_normal(spec.shape, np.float32) * np.float32(0.02)
        leaves[path] = jnp.asarray(values + 1 if path[-1] in ("scale", "g", "gate_scale") else values)
    return with_params(abstract_encoder(config), leaves)


def checkpoint_weights(encoder: Encoder) -> dict[str, np.ndarray]:
    """Returns the weights under the names and in the layouts of a released checkpoint; what no embedding depends on is drawn."""
    from omni_jax.conversion.engine import base_entries
    from omni_jax.model import carried_shapes

    leaves = {tuple(map(str, path)): np.asarray(p[...]) for path, p in nnx.to_flat_state(nnx.state(encoder, nnx.Param))}
    rng = np.random.default_rng(0)
    leaves |= {path: rng.standard_normal(shape, np.float32) for path, shape in carried_shapes(encoder.config).items()}
    weights = {}
    for name, entry in base_entries(encoder.config).items():
        leaf = leaves[entry.path]
        weights[name] = np.array(entry.to_torch(leaf if entry.layer is None else leaf[entry.layer]))
    return weights


class RandomWords:
    """Stands in for a tokenizer: a caption written as a number n becomes n random words."""

    im_end = WORDS - 1

    def __init__(self, vocabulary: int):
        self._vocabulary = vocabulary

    def encode_text(self, text: str) -> list[int]:
        """Returns as many indices as the text says; the filler text has five words."""
        count, seed = (int(text), int(text)) if text.isdigit() else (5, 0)
        return np.random.default_rng(seed).integers(WORDS, self._vocabulary, count).tolist()


def synthetic_clips(config: ModelConfig, count: int, *, grid: tuple[int, int, int] = (4, 12, 18), mel_frames: int = 800) -> list[Features]:
    """Returns clips with random features in the shapes of the `training` preset: 8 frames of 168 x 252, 8 s of audio, a caption."""
    rng = np.random.default_rng(1)
    clips = []
    for n in range(count):
        values = config.vision.patch_values
        vision = VisionFeatures(rng.normal(size=(int(np.prod(grid)), values)).astype(np.float32), VideoGrid(grid, 2.0))
        segment = AudioSegment(
            log_mel=rng.normal(0, 0.5, (config.audio.num_mel_bins, mel_frames)).astype(np.float32),
            fbank=rng.normal(0, 0.5, (mel_frames - 2, config.beats.num_mel_bins)).astype(np.float32),
            tokens=mel_frames // 4,
        )
        caption = str(int(rng.integers(*CAPTION_TOKENS)))
        clips.append(Features(Record(id=f"clip{n}", text=caption), vision=vision, audio=(segment,)))
    return clips


def sequences(clips: Sequence[Features], tables: Sequence[str], config: ModelConfig) -> list[Mapping[str, TokenSequence]]:
    """Returns each clip's prompts by table."""
    words: object = RandomWords(config.decoder.vocab_size)
    return [build_sequences(clip, tables, words, config, PRESET) for clip in clips]  # pyright: ignore[reportArgumentType]


def batch(clips: Sequence[Features], tables: Sequence[str], config: ModelConfig, planner: Planner) -> EncoderBatch:
    """Returns the encoder's batch of these clips, as `embed` would build it."""
    made = map(TokenizedClip, clips, sequences(clips, tables, config))
    return build_batches(list(made), config, planner=planner)


class Ours:
    """omni_jax as `embed` runs it: the planner's shapes, compiled programs, one media table."""

    def __init__(self, encoder: Encoder):
        self.config: ModelConfig = encoder.config
        self.runner = Runner(encoder)
        self.planner = Planner()

    def embed(self, clips: Sequence[Features], tables: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns table -> (N, D)."""
        packed = batch(clips, tables, self.config, self.planner)
        found = {(clip, table): row for clip, table, row in self.runner.embed(packed, text_head="fused")}
        return {table: np.stack([found[clip, table] for clip in range(len(clips))]) for table in tables}

    def work(self, clips: Sequence[Features], tables: Sequence[str]) -> FlopCount:
        """Returns the operations of embedding the clips in one batch."""
        return total(forward_work(self.config, batch(clips, tables, self.config, self.planner)))


def parameter_count(encoder: Encoder) -> int:
    """Returns how many parameters an embedding uses."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(encoder, nnx.Param)))
