"""Speed and memory of a training step on two CPU threads beside the torch thinker with PEFT, run as the release runs it: same clips, same
weights, same losses.

A round is three steps, one of each step kind. Ours computes what is active in packed rows, the other caption behind the anchor's media;
torch makes the release's six forwards (`torch_training`). Neither checkpoints layers; both have micro-batch negatives and are float32.
Packing and padding of prompts are within the time on both sides.

Run alone: python -m tools.benchmarks --only train_mid
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni_jax import conversion
from omni_jax.config import LoraConfig, ModelConfig
from omni_jax.model import Encoder
from omni_jax.tokens.batching import attention_cost
from omni_jax.tokens.prompts import build_sequence
from omni_jax.tokens.training import EDGES, PromptLengths, lay_out
from omni_jax.towers.base import multiple_of
from omni_jax.towers.vision import step_layout
from omni_jax.train import LossConfig, OptimizerConfig, StepConfig, TrainBatch, TrainStep, fit_shapes, pack_micro_batch, step_kind
from omni_jax.types import AudioBatch, BeatsBatch, Example, Features, MediaBatch, TokenSequence, VisionBatch
from tools import training_cost
from tools.benchmarks import mid_size
from tools.benchmarks.process_memory import alone, forget_peak, status
from tools.benchmarks.timing import PAIRS, Pairs, interleave, product_rates

THREADS = 2
CLIPS = 2  # clips of a micro-batch
KINDS = 3
SHAPES = {"grid": (4, 8, 12), "mel_frames": 400}  # 8 frames of 112 x 168 and 4 s of audio: ten minutes on two idle cores
REMAT = "dots"  # ours: all but attention's S x S arrays, which torch's fused attention does not keep either
LEARNING_RATE = 1e-5
TEMPERATURE = 0.05
ROW_MULTIPLE = 8  # rows are padded to a multiple of so many tokens, as `BatchConfig.row_multiple` has it
LARGEST_DIFFERENCE = 2e-4  # of the first round's losses, relative: both sides are float32

TABLES = {"anchor": "tva", "positive": "tva", "hard": "tva", "text": "text", "audio": "audio", "video": "video"}


def adapted(config: ModelConfig) -> ModelConfig:
    """Returns the settings with the release's adapter; its dropout is off, so that the losses can be compared."""
    return dataclasses.replace(config, lora=LoraConfig(rank=16, alpha=32.0, dropout=0.0))


@dataclasses.dataclass(frozen=True)
class Material:
    """The clips of a micro-batch, their augmented copies, prompts by clip for each step kind, and whose features hard negatives take."""

    clips: Sequence[Features]
    copies: Sequence[Features]
    prompts: Sequence[Sequence[Mapping[str, TokenSequence]]]
    shuffle: np.ndarray

    @classmethod
    def make(cls, config: ModelConfig, count: int, **shapes: Any) -> Material:
        """Returns synthetic material; `shapes` go to `mid_size.synthetic_clips`."""
        made = mid_size.synthetic_clips(config, 2 * count, **shapes)
        clips, copies = made[:count], made[count:]
        words: Any = mid_size.RandomWords(config.decoder.vocab_size)
        shuffle = np.roll(np.arange(count), -1)

        def prompt(features: Features, name: str, caption: str | None) -> TokenSequence:
            assert features.vision is not None
            return build_sequence(words, config, mid_size.PRESET, TABLES[name], caption, features.vision.grid, features.audio_tokens)

        captions = [clip.record.text for clip in clips]
        prompts = [
            [
                {
                    **{name: prompt(clip, name, captions[i]) for name in ("anchor", "text", "audio", "video")},
                    "positive": prompt(copies[i], "positive", copies[i].record.text),
                    "hard": prompt(clip, "hard", captions[shuffle[i] if step_kind(kind, LossConfig()).hard == "text" else i]),
                }
                for i, clip in enumerate(clips)
            ]
            for kind in range(KINDS)
        ]
        return cls(clips, copies, prompts, shuffle)

    def sizes(self) -> list[training_cost.ClipSizes]:
        """Returns the sizes of each clip, for `tools.training_cost`."""
        found = []
        for clip, prompts in zip(self.clips, self.prompts[0], strict=True):
            assert clip.vision is not None and clip.audio is not None
            filler = len(prompts["video"].ids) - prompts["video"].prefix
            sizes = training_cost.ClipSizes(clip.vision.grid, clip.audio[0].log_mel.shape[1], len(prompts["text"].ids), filler)
            assert sizes.prompt("anchor") == len(prompts["anchor"].ids)
            found.append(sizes)
        return found


class Ours:
    """omni_jax: packing and the compiled step."""

    def __init__(self, encoder: Encoder, material: Material, compiler_options: Mapping[str, Any] | None = None):
        self.material, self.config = material, encoder.config
        losses = LossConfig(temperature=TEMPERATURE, negatives="micro")
        optimizer = OptimizerConfig(total_steps=1000, learning_rate=LEARNING_RATE, warmup_steps=0)
        self.recipe = StepConfig(optimizer=optimizer, losses=losses, remat=REMAT, frozen_dtype=None)
        self.step = TrainStep(encoder.config, self.recipe, dtype=jnp.float32, compiler_options=compiler_options)
        self.state, self.frozen = self.step.init(leaves(encoder))
        self.media = [(media(a, self.config), media(b, self.config)) for a, b in zip(material.clips, material.copies, strict=True)]

    def round(self) -> list[float]:
        """Returns the losses of three steps."""
        return [self.update(kind) for kind in range(KINDS)]

    def batch(self, number: int) -> TrainBatch:
        """Returns the packed batch of a step kind."""
        examples = [Example(*both, prompts) for both, prompts in zip(self.media, self.material.prompts[number], strict=True)]
        kind = lay_out(
            step_kind(number, self.recipe.losses),
            [lengths(prompts) for prompts in self.material.prompts[number]],
            share_prefix=True,
            multiple=ROW_MULTIPLE,
            attention=attention_cost(self.config.decoder),
        )
        shapes = fit_shapes(examples, kind)
        row, hard = (multiple_of(ROW_MULTIPLE, size) for size in (shapes.row_tokens, shapes.hard_tokens))
        shapes = dataclasses.replace(shapes, row_tokens=row, hard_tokens=hard)
        return jax.tree.map(jnp.asarray, pack_micro_batch(examples, kind, shapes, self.config, self.material.shuffle[None]))

    def rows(self, number: int) -> str:
        """Returns the rows of a clip and their tokens, in words."""
        batch = self.batch(number)
        _, _, count, size = batch.rows.ids.shape
        return f"{count} x {size} tokens" + ("" if batch.hard is None else f" and {batch.hard.ids.shape[3]} for the hard negative")

    def update(self, number: int) -> float:
        """Returns the loss of a step of a step kind."""
        self.state, metrics = self.step(self.state, self.frozen, self.batch(number))
        return float(metrics["loss"])


class Theirs:
    """torch and PEFT; the adapter comes to it as a folder, as a user's would."""

    def __init__(self, encoder: Encoder, material: Material, adapter: Mapping[tuple[str, ...], Any] | None = None):
        """Takes the base from the encoder, and the adapter from there too unless its leaves are given."""
        from tools.benchmarks.torch_training import Adapted, Trainer

        with tempfile.TemporaryDirectory() as scratch:
            conversion.write_adapter(Path(scratch) / "adapter", encoder.config, adapter or leaves(encoder))
            weights = mid_size.checkpoint_weights(encoder)
            self.model = Adapted(encoder.config, weights, Path(scratch) / "adapter")
        self.trainer, self.material = Trainer(self.model, TEMPERATURE, LEARNING_RATE), material

    def round(self) -> list[float]:
        """Returns the losses of three steps."""
        return [self.update(kind) for kind in range(KINDS)]

    def update(self, kind: int) -> float:
        """Returns the loss of a step of a step kind."""
        return self.trainer.update(kind, *self.inputs(kind))

    def inputs(self, kind: int) -> tuple[Any, ...]:
        """Returns the material of a step kind, as the trainer takes it."""
        m = self.material
        return m.clips, m.copies, m.prompts[kind], m.shuffle


def lengths(prompts: Mapping[str, TokenSequence]) -> PromptLengths:
    """Returns the lengths of a clip's prompts, whose hard negative has media of the same sizes."""
    behind = {name: len(prompt.ids) - prompt.prefix for name, prompt in prompts.items()}
    video, audio = (prompts[name].prefix - EDGES for name in ("video", "audio"))
    return PromptLengths(
        video, audio, video, audio, behind["anchor"], behind["positive"], behind["hard"], len(prompts["text"].ids), behind["video"]
    )


def leaves(encoder: Encoder) -> dict[tuple[str, ...], jax.Array]:
    """Returns the encoder's parameters by path."""
    return {tuple(map(str, path)): p[...] for path, p in nnx.to_flat_state(nnx.state(encoder, nnx.Param))}


def media(clip: Features, config: ModelConfig) -> MediaBatch:
    """Returns tower inputs of one clip with a single audio segment."""
    assert clip.vision is not None and clip.audio is not None
    (segment,), (t, h, w) = clip.audio, clip.vision.grid.thw
    coords, window = step_layout(h, w, config.vision.merge_size, config.vision.window_tokens)
    frames = config.audio.chunk_frames
    chunks = [segment.log_mel.T[start : start + frames] for start in range(0, segment.log_mel.shape[1], frames)]
    whole = len(segment.fbank) // config.beats.patch_size * config.beats.patch_size
    return MediaBatch(
        vision=VisionBatch(clip.vision.patches.reshape(t, h * w, -1), np.stack([coords] * t), np.stack([window] * t)),
        audio=AudioBatch(
            np.stack([np.pad(c, ((0, frames - len(c)), (0, 0))) for c in chunks]), np.array([len(c) for c in chunks], np.int32)
        ),
        beats=BeatsBatch(segment.fbank[:whole], np.int32(whole), np.int32(segment.tokens), segment.tokens),
    )


def run(pairs: int = PAIRS, config: ModelConfig | None = None, clips: int = CLIPS, memory: bool = True, **shapes: Any) -> dict[str, Any]:
    """Returns ratios (torch's time and memory over ours), rates and operations, and prints them.

    Args:
      config: the mid-size settings unless told otherwise; `shapes` go to `mid_size.synthetic_clips`, over SHAPES.
      clips: clips of a micro-batch.
      memory: whether to measure the peak memory of each side, in a process of its own and at the mid size.

    Raises:
      AssertionError: where the two sides' losses differ, for then they do not train the same.
    """
    import torch

    torch.set_num_threads(THREADS)
    config = adapted(config or mid_size.mid_config())
    encoder = mid_size.random_encoder(config)
    material = Material.make(config, clips, **{**SHAPES, **shapes})
    results: dict[str, Any] = {"parameters": mid_size.parameter_count(encoder), "threads": THREADS, "clips": clips}
    print(
        f"{results['parameters'] / 1e6:.0f} M parameters, float32, {THREADS} threads; micro-batches of {clips} clips, LoRA and heads train"
    )
    if memory:
        results["peak_bytes"] = {side: alone("train_mid.peak", side, clips) for side in ("ours", "torch")}
        ratio = results["peak_bytes"]["torch"] / results["peak_bytes"]["ours"]
        results["memory_ratio"] = ratio
        print(
            "peak memory of a process, step kind 2: "
            + ", ".join(f"{side} {size / 2**30:.2f} GiB" for side, size in results["peak_bytes"].items())
            + f" ({ratio:.2f}x)",
            flush=True,
        )
    ours, theirs = Ours(encoder, material), Theirs(encoder, material)
    found: dict[str, list[float]] = {"ours": [], "torch": []}
    timed = interleave(lambda: found["ours"].extend(ours.round()), lambda: found["torch"].extend(theirs.round()), pairs)
    # Adam's first steps are as large as the learning rate whatever a gradient's size is: rounding in a gradient near zero moves a weight
    # by as much as a large one does, and the two sides part slowly. The first round, where this has hardly begun, says that they agree.
    differences = [abs(a - b) / abs(b) for a, b in zip(found["ours"], found["torch"], strict=True)]
    first, worst = max(differences[:KINDS]), max(differences)
    if not first <= LARGEST_DIFFERENCE:
        raise AssertionError(f"the losses of the two sides differ by {first:.1e}; they do not train the same")
    results |= {"loss_difference": first, "last_loss_difference": worst, "losses": found["ours"], "first_call_seconds": timed.first_ours}
    print(
        f"largest difference between the losses of the first {KINDS} steps: {first:.1e}, of all {len(differences)}: {worst:.1e}; "
        f"first call {timed.first_ours:.0f} s"
    )
    print("rows of a clip, by step kind: " + ", ".join(ours.rows(kind) for kind in range(KINDS)))
    results["matrix_product_gflops"] = product_rates()
    print("matrix product: " + ", ".join(f"{side} {rate:.0f} GFLOP/s" for side, rate in results["matrix_product_gflops"].items()))
    return results | _report(config, material, ours.recipe, timed)


def _report(config: ModelConfig, material: Material, recipe: StepConfig, timed: Pairs) -> dict[str, Any]:
    """Speed as figures and lines, with the operations of each side, without padding, beside it."""
    counted = {
        side: training_cost.mean(
            [part for sizes in material.sizes() for part in count(config, sizes, recipe.losses, remat=REMAT if side == "ours" else "none")]
        )
        for side, count in (("ours", training_cost.per_triple), ("torch", training_cost.released_per_triple))
    }
    operations = {side: training_cost.total(made) for side, made in counted.items()}
    rows = KINDS * len(material.clips)
    speed = {side: rows / seconds for side, seconds in zip(("ours", "torch"), timed.seconds, strict=True)}
    figures = {
        "ratio": timed.ratio,
        "ratios": [b / a for a, b in zip(timed.ours, timed.theirs, strict=True)],
        "clips_per_second": speed,
        "gflop_per_clip": {side: x / 1e9 for side, x in operations.items()},
        "gflops": {side: operations[side] * speed[side] / 1e9 for side in speed},
        "operations_ratio": operations["torch"] / operations["ours"],
    }
    print(f"operations of a clip, GFLOP, mean of the step kinds; ours:\n{training_cost.table(counted['ours'], 1e9)}")
    print(f"the release's way:\n{training_cost.table(counted['torch'], 1e9)}")
    print(
        f"training step: {figures['ratio']:.2f}x torch (median of {len(timed.ours)} pairs: "
        f"{', '.join(f'{r:.2f}' for r in figures['ratios'])}); {speed['ours']:.3f} and {speed['torch']:.3f} clips/s; "
        f"{figures['gflops']['ours']:.0f} and {figures['gflops']['torch']:.0f} GFLOP/s; the release's way has "
        f"{figures['operations_ratio']:.2f}x the operations",
        flush=True,
    )
    return figures


def peak(side: str, clips: int) -> int:
    """Returns the peak memory of this process, in bytes, in a step of the largest kind on one side, compilation apart."""
    config = adapted(mid_size.mid_config())
    material = Material.make(config, clips, **SHAPES)
    made = (Ours if side == "ours" else Theirs)(mid_size.random_encoder(config), material)
    made.update(KINDS - 1)  # compiles
    return peak_of(lambda: made.update(KINDS - 1))


def peak_of(call: Callable[[], object]) -> int:
    """Returns the largest resident memory of this process during a call, in bytes (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed goes back to the system first
    forget_peak()
    call()
    return status("VmHWM")
